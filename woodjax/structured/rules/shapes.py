"""Rules for primitives that rearrange or reduce axes."""

from collections.abc import Callable, Sequence
from itertools import cycle
from typing import Any

from woodjax.structured.axes import FREE, KEPT, ZERO, Axis, Factor, Value, filled, merged, size_of
from woodjax.structured.rules.moves import tied
from woodjax.structured.rules.rule import Counts, Rule, Spread, as_they_are
from woodjax.structured.solver import Solver

REDUCTIONS = ("reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "reduce_xor", "argmax", "argmin")
SCANS = ("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp")
WINDOWS = ("reduce_window_max", "reduce_window_min", "reduce_window_sum", "reduce_window")


def _broadcast(solver: Solver, equation: Any, values: Sequence[Value]) -> Spread:
    shape, kept = equation.params["shape"], equation.params["broadcast_dimensions"]
    (value, *_) = values
    axes = [filled(size, FREE) for size in shape]
    for axis, to in zip(value.axes, kept, strict=True):
        if size_of(axis) == shape[to]:
            axes[to] = axis
    return Spread((Value(tuple(axes), value.constant, value.example),), as_they_are(values))


def _transpose(solver: Solver, equation: Any, values: Sequence[Value]) -> Spread:
    (value,) = values
    axes = tuple(value.axes[i] for i in equation.params["permutation"])
    return Spread((value._replace(axes=axes),), as_they_are(values))


def _squeeze(solver: Solver, equation: Any, values: Sequence[Value]) -> Spread:
    (value,) = values
    gone = equation.params["dimensions"]
    axes = tuple(axis for i, axis in enumerate(value.axes) if i not in gone)
    return Spread((value._replace(axes=axes),), as_they_are(values))


def _reshape(solver: Solver, equation: Any, values: Sequence[Value]) -> Spread:
    (value, *_) = values
    shape = equation.outvars[0].aval.shape
    axes = _rows(solver, value.axes, shape)
    if axes is None:  # the two shapes have no common cut
        constant = value.constant is not None
        axes = tuple(filled(size, FREE if constant else KEPT) for size in shape)
        stored = tuple(solver.fix(axis) for axis in value.axes)
    else:
        stored = value.axes
    return Spread((value._replace(axes=axes),), (tuple((axis,) for axis in stored),))


def _rows(solver: Solver, given: Sequence[Axis], shape: Sequence[int]) -> tuple[Axis, ...] | None:
    """Axes of another shape with the same elements, if the two can be cut at the same places."""
    left = list(merged(tuple(factor for axis in given for factor in axis)))
    axes: list[Axis] = []
    for size in shape:
        axis: list[Factor] = []
        missing = size
        while missing > 1:
            factor = left.pop(0)
            if missing % factor.size:
                inner = factor.size // missing
                zeros = (factor.units == ZERO).reshape(missing, -1) if not factor.size % missing else None
                if zeros is None or (zeros != zeros[:, :1]).any():  # zeros that are not stored, in a part of a row
                    return None
                factor, rest = solver.cut((factor,), [inner])
                left.insert(0, rest)
            axis.append(factor)
            missing //= factor.size
        axes.append(tuple(axis))
    return tuple(axes)


def _stack(solver: Solver, equation: Any, values: Sequence[Value]) -> Spread:
    axes = [tied(solver, axes) for axes in zip(*(value.axes for value in values), strict=True)]
    wanted = tuple((axis,) for axis in axes)
    axes.insert(equation.params["axis"], filled(len(values), KEPT))
    result = Value(tuple(axes), None, any(value.example for value in values))
    return Spread((result,), (wanted,) * len(values))


def _unstack(solver: Solver, equation: Any, values: Sequence[Value]) -> Spread:
    (value,) = values
    axes = list(value.axes)
    along = equation.params["axis"]
    axes[along] = solver.fix(axes[along])
    result = value._replace(axes=tuple(axis for i, axis in enumerate(axes) if i != along))
    return Spread((result,) * len(equation.outvars), (tuple((axis,) for axis in axes),))


def _tile(solver: Solver, equation: Any, values: Sequence[Value]) -> Spread:
    (value,) = values
    times = zip(value.axes, equation.params["reps"], strict=True)
    axes = tuple((*filled(count, FREE), *axis) for axis, count in times)
    return Spread((value._replace(axes=axes),), as_they_are(values))


def _iota(solver: Solver, equation: Any, values: Sequence[Value]) -> Spread:
    shape, along = equation.params["shape"], equation.params["dimension"]
    axes = tuple(filled(size, KEPT if i == along else FREE) for i, size in enumerate(shape))
    return Spread((Value(axes),), as_they_are(values))


def _sum(solver: Solver, equation: Any, values: Sequence[Value]) -> Spread:
    (value,) = values
    for i in equation.params["axes"]:
        solver.fix(tuple(factor for factor in value.axes[i] if not factor.zero))
    return _reduced(equation, value, value.axes)


def _reduce(solver: Solver, equation: Any, values: Sequence[Value]) -> Spread:
    (value,) = values
    stored = [solver.fix(axis) if i in equation.params["axes"] else axis for i, axis in enumerate(value.axes)]
    return _reduced(equation, value, stored, keeps_zero=not equation.primitive.name.startswith("arg"))


def _reduced(equation: Any, value: Value, stored: Sequence[Axis], *, keeps_zero: bool = True) -> Spread:
    gone = equation.params["axes"]
    axes = tuple(
        tuple(factor._replace(zero=factor.zero and keeps_zero) for factor in axis)
        for i, axis in enumerate(value.axes)
        if i not in gone
    )
    return Spread((Value(axes, None, value.example),), (tuple((axis,) for axis in stored),))


def _whole(solver: Solver, axes: Sequence[Axis]) -> Axis:
    """What is stored of axes of one size that always stay."""
    return tied(solver, [solver.fix(axis) for axis in axes])


def _along(number_of: Callable[[Any], int], *, keeps_zero: Sequence[bool] = (True,)) -> Rule:
    """For primitives that mix what stands along one axis, and treat all others alike; which results keep zeros?"""

    def spread(solver: Solver, equation: Any, values: Sequence[Value]) -> Spread:
        mixed = number_of(equation)
        axes, stored = [], []
        for i in range(len(values[0].axes)):
            given = [value.axes[i] for value in values]
            if i == mixed:
                stored.append(_whole(solver, given))
                axes.append(filled(equation.outvars[0].aval.shape[i], KEPT))
            else:
                stored.append(tied(solver, given))
                axes.append(stored[-1])
        example = any(value.example for value in values)
        results = []
        for _, keeps in zip(equation.outvars, cycle(keeps_zero), strict=False):
            kept = tuple(tuple(factor._replace(zero=factor.zero and keeps) for factor in axis) for axis in axes)
            results.append(Value(kept, None, example))
        return Spread(tuple(results), (tuple((axis,) for axis in stored),) * len(values))

    return Rule(spread)


def _window(solver: Solver, equation: Any, values: Sequence[Value]) -> Spread:
    count = len(equation.outvars)
    keeps_zero = equation.primitive.name != "reduce_window"  # which may start from any number
    trivial = [tuple(p) == (0, 0) for p in equation.params["padding"]]
    for name in ("window_dimensions", "window_strides", "base_dilation", "window_dilation"):
        trivial = [ok and n == 1 for ok, n in zip(trivial, equation.params[name], strict=True)]
    axes, stored = [], []
    for i, (same, size) in enumerate(zip(trivial, equation.outvars[0].aval.shape, strict=True)):
        given = [value.axes[i] for value in values[:count]]
        stored.append(tied(solver, given) if same else _whole(solver, given))
        axis = tuple(factor._replace(zero=factor.zero and keeps_zero) for factor in stored[-1])
        axes.append(axis if same else filled(size, KEPT))
    result = Value(tuple(axes), None, any(value.example for value in values))
    wanted = (tuple((axis,) for axis in stored),) * count
    return Spread((result,) * count, (*wanted, *as_they_are(values[count:])))


def _reverse(solver: Solver, equation: Any, values: Sequence[Value]) -> Spread:
    (value,) = values
    axes = list(value.axes)
    for i in equation.params["dimensions"]:
        axes[i] = tuple(factor._replace(units=factor.units[::-1]) for factor in axes[i])
    return Spread((value._replace(axes=tuple(axes)),), as_they_are(values))


def _each(solver: Solver, equation: Any, values: Sequence[Value]) -> Spread:
    return Spread(tuple(values), as_they_are(values))


def _small_shape(name: str) -> Callable[[Any, Counts], dict[str, Any]]:
    return lambda equation, counts: {name: counts.results[0]}


RULES = {
    "broadcast_in_dim": Rule(_broadcast, _small_shape("shape")),
    "reshape": Rule(_reshape, _small_shape("new_sizes")),
    "transpose": Rule(_transpose),
    "squeeze": Rule(_squeeze),
    "stack": Rule(_stack),
    "unstack": Rule(_unstack),
    "tile": Rule(_tile),
    "iota": Rule(_iota),
    "rev": Rule(_reverse),
    "reduce_sum": Rule(_sum),
    "sort": _along(lambda equation: equation.params["dimension"]),
    "top_k": _along(
        lambda equation: equation.params.get("axis", len(equation.invars[0].aval.shape) - 1), keeps_zero=(True, False)
    ),
    "optimization_barrier": Rule(_each),
    "sharding_constraint": Rule(_each),
    "device_put": Rule(_each),
    **dict.fromkeys(REDUCTIONS, Rule(_reduce)),
    **dict.fromkeys(WINDOWS, Rule(_window)),
    **{name: _along(lambda equation: equation.params["axis"], keeps_zero=(name != "cumlogsumexp",)) for name in SCANS},
}
