"""Rules for primitives that take parts of axes and put them together."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from woodjax.structured.axes import FREE, KEPT, ZERO, Axis, Factor, Place, Value, filled, plain, size_of, suffixes
from woodjax.structured.rules.rule import Counts, Rule, Spread, Wanted, as_they_are
from woodjax.structured.solver import Solver


def _moves(axis: Axis) -> bool:
    """Does an axis have indices that may go?"""
    return any(factor.size and (not plain(factor) or factor.units[0] != KEPT) for factor in axis)


def _pad(solver: Solver, equation: Any, values: Sequence[Value]) -> Spread:
    value, fill = values
    zero = fill.constant is not None and fill.constant == 0
    axes, wanted = [], []
    shape = equation.outvars[0].aval.shape
    for axis, (low, high, inside), size in zip(value.axes, equation.params["padding_config"], shape, strict=True):
        stored = axis
        if (low, high, inside) == (0, 0, 0):
            axes.append(axis)
        elif _pads(axis, (low, high, inside), zero=zero):
            factor = axis[0]
            units = np.concatenate([np.full(low, ZERO), factor.units, np.full(high, ZERO)])
            axes.append((factor._replace(units=units),))
        else:
            stored = solver.fix(axis)
            axes.append(filled(size, KEPT))
        wanted.append((stored,))
    return Spread((Value(tuple(axes), None, value.example),), (tuple(wanted), ()))


def _pads(axis: Axis, amounts: tuple[int, int, int], *, zero: bool) -> bool:
    low, high, inside = amounts
    units = len(axis) == 1 and bool((axis[0].units > KEPT).any())
    return zero and units and not inside and low >= 0 and high >= 0


def _pad_params(equation: Any, counts: Counts) -> dict[str, Any]:
    shapes = zip(equation.params["padding_config"], equation.outvars[0].aval.shape, counts.results[0], strict=True)
    return {"padding_config": tuple(config if full == small else (0, 0, 0) for config, full, small in shapes)}


def _slice(solver: Solver, equation: Any, values: Sequence[Value]) -> Spread:
    (value,) = values
    starts, limits = equation.params["start_indices"], equation.params["limit_indices"]
    strides = equation.params["strides"] or (1,) * len(starts)
    axes, wanted = [], []
    for axis, start, limit, stride in zip(value.axes, starts, limits, strides, strict=True):
        taken, want = _part(solver, axis, start, limit, stride)
        axes.append(taken)
        wanted.append((want,))
    return Spread((value._replace(axes=tuple(axes)),), (tuple(wanted),))


def _part(solver: Solver, axis: Axis, start: int, limit: int, stride: int) -> tuple[Axis, Axis]:
    """A part of an axis, and the axis with the rest of it not stored."""
    size = size_of(axis)
    if (start, limit, stride) == (0, size, 1):
        return axis, axis
    count = -(-(limit - start) // stride)
    if not count:
        return filled(0, KEPT), filled(size, ZERO)
    if not _moves(axis):
        return filled(count, KEPT), axis
    if len(axis) == 1 and plain(axis[0]):
        return filled(count, FREE), axis
    behind = suffixes(axis)[0] if len(axis) > 1 else 1
    if (stride == 1 or len(axis) == 1) and start % behind == 0 and limit % behind == 0:
        first, rest = axis[0], axis[1:]
        at = np.arange(start // behind, limit // behind, stride)
        taken = first._replace(units=first.units[at])
        want = np.full(first.size, ZERO)
        want[at] = first.units[at]
        if len(at) == 1:  # an axis of size one is stored
            solver.fix((taken,))
            want[at] = KEPT
        return (taken, *rest) if len(at) > 1 else rest, (first._replace(units=want), *rest)
    return filled(count, KEPT), solver.fix(axis)


def _slice_params(equation: Any, counts: Counts) -> dict[str, Any]:
    found: dict[str, list[int]] = {"start_indices": [], "limit_indices": [], "strides": []}
    shapes = zip(equation.invars[0].aval.shape, counts.operands[0], counts.results[0], strict=True)
    strides = equation.params["strides"] or (1,) * len(counts.operands[0])
    for i, (full, stored, left) in enumerate(shapes):
        part = (equation.params["start_indices"][i], equation.params["limit_indices"][i], strides[i])
        start, limit, stride = part if stored == full else (0, left, 1)
        found["start_indices"].append(start)
        found["limit_indices"].append(limit)
        found["strides"].append(stride)
    return {name: tuple(numbers) for name, numbers in found.items()}


def _split(solver: Solver, equation: Any, values: Sequence[Value]) -> Spread:
    (value,) = values
    along, limits = equation.params["axis"], np.cumsum(equation.params["sizes"])
    before, axis, after = value.axes[:along], value.axes[along], value.axes[along + 1 :]
    behind = size_of(axis[1:])
    if _moves(axis) and (limits % behind).any():  # a cut through a row
        axis = solver.fix(axis)
    taken = [
        _part(solver, axis, int(n - size), int(n), 1)[0]
        for n, size in zip(limits, equation.params["sizes"], strict=True)
    ]
    results = tuple(value._replace(axes=(*before, part, *after)) for part in taken)
    return Spread(results, (tuple((own,) for own in (*before, axis, *after)),))


def _split_params(equation: Any, counts: Counts) -> dict[str, Any]:
    along = equation.params["axis"]
    return {"sizes": tuple(shape[along] for shape in counts.results)}


def _concatenate(solver: Solver, equation: Any, values: Sequence[Value]) -> Spread:
    along, ndim = equation.params["dimension"], len(values[0].axes)
    axes: list[Axis] = []
    wanted: list[list[tuple[Axis, ...]]] = [[] for _ in values]
    for i in range(ndim):
        given = [value.axes[i] for value in values]
        if i == along:
            joined, own = _joined(
                solver, given, [value.constant is not None and value.constant == 0 for value in values]
            )
            axes.append(joined)
        else:
            axes.append(tied(solver, given))
            own = [axes[-1]] * len(values)
        for want, axis in zip(wanted, own, strict=True):
            want.append((axis,))
    result = Value(tuple(axes), None, any(value.example for value in values))
    return Spread((result,), tuple(tuple(want) for want in wanted))


def _joined(solver: Solver, given: Sequence[Axis], zeros: Sequence[bool]) -> tuple[Axis, Sequence[Axis]]:
    """Axes one behind the other, and what must be stored of each: of zeros nothing."""
    size = sum(map(size_of, given))
    if not any(_moves(axis) for axis in given):
        return filled(size, KEPT), given
    if not all(map(size_of, given)):
        return filled(size, KEPT), [solver.fix(axis) for axis in given]
    given = [filled(size_of(axis), ZERO) if zero else axis for axis, zero in zip(given, zeros, strict=True)]
    behind = max((suffixes(axis)[0] for axis in given if len(axis) > 1), default=1)
    cut = [axis if size_of(axis) % behind else solver.cut_at(axis, behind) for axis in given]
    heads = [axis[: len(axis) - len(_behind(axis, behind))] for axis in cut]
    if any(size_of(axis) % behind or len(head) > 1 for axis, head in zip(given, heads, strict=True)):
        return filled(size, KEPT), [solver.fix(axis) for axis in given]
    heads = [
        (Factor(np.full(1, ZERO), zero=True),) if zero and not head else head
        for head, zero in zip(heads, zeros, strict=True)
    ]
    parts = [_stored(head) for head in heads]
    units = np.concatenate([part.units for part in parts])
    first = Factor(units, all(part.zero for part in parts), _places(parts))
    rest = tied(solver, [_behind(axis, behind) for axis in cut])
    return (first, *rest), [(*head, *rest) for head in heads]


def _behind(axis: Axis, size: int) -> Axis:
    return next(axis[i:] for i in range(len(axis) + 1) if size_of(axis[i:]) <= size)


def tied(solver: Solver, axes: Sequence[Axis]) -> Axis:
    """One axis of several that go together.

    Args:
        solver: Of the units.
        axes: Of one size.

    Returns:
        Their axis; zero where removed if all are.
    """
    factors = []
    for parts in zip(*solver.align(axes), strict=True):
        units = parts[0].units
        for part in parts[1:]:
            units = solver.tie(units, part.units)
        mixed = np.any([part.units == ZERO for part in parts], axis=0) & (units == FREE)
        zero = all(part.zero and not (part.units == FREE).any() for part in parts)
        factors.append(Factor(np.where(mixed, KEPT, units), zero, _places(parts)))
    return tuple(factors)


def _places(factors: Sequence[Factor]) -> frozenset[Place]:
    return frozenset[Place]().union(*(factor.places for factor in factors))


def _stored(axis: Axis) -> Factor:
    """One factor whose indices are all stored, but for zeros."""
    factor = axis[0] if axis else Factor(np.zeros(1, np.int64), zero=True)
    return factor._replace(units=np.where(factor.units == FREE, KEPT, factor.units))


def _gather(solver: Solver, equation: Any, values: Sequence[Value]) -> Spread:
    value, indices = values
    numbers, sizes = equation.params["dimension_numbers"], equation.params["slice_sizes"]
    gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    through = iter(numbers.offset_dims)
    axes, stored = [filled(size, KEPT) for size in equation.outvars[0].aval.shape], []
    for i, (axis, size) in enumerate(zip(value.axes, sizes, strict=True)):
        to = None if i in gone else next(through)
        if to is None or size != size_of(axis):
            stored.append((solver.fix(axis),))
        else:
            axes[to] = axis
            stored.append((axis,))
    asked = tuple((solver.fix(axis),) for axis in indices.axes)
    result = Value(tuple(axes), None, value.example or indices.example)
    return Spread((result,), (tuple(stored), asked))


def _dynamic_slice(solver: Solver, equation: Any, values: Sequence[Value]) -> Spread:
    (value, *starts), sizes = values, equation.params["slice_sizes"]
    axes, stored = [], []
    for axis, size in zip(value.axes, sizes, strict=True):
        stored.append((axis if size == size_of(axis) else solver.fix(axis),))
        axes.append(axis if size == size_of(axis) else filled(size, KEPT))
    result = Value(tuple(axes), None, any(value.example for value in values))
    return Spread((result,), (tuple(stored), *as_they_are(starts)))


def _slice_sizes(equation: Any, counts: Counts) -> dict[str, Any]:
    sizes, shape = equation.params["slice_sizes"], equation.invars[0].aval.shape
    small = zip(sizes, shape, counts.operands[0], strict=True)
    return {"slice_sizes": tuple(left if size == full else size for size, full, left in small)}


def _update(solver: Solver, equation: Any, values: Sequence[Value]) -> Spread:
    value, update, *rest = values
    axes, given = [], []
    for i, axis in enumerate(value.axes):
        other = update.axes[i]
        if size_of(axis) == size_of(other):
            axes.append(tied(solver, [axis, other]))
            given.append((axes[-1],))
        else:
            axes.append(solver.fix(axis))
            given.append((solver.fix(other),))
    wanted: list[Wanted] = [tuple((axis,) for axis in axes), tuple(given), *as_they_are(rest)]
    return Spread((Value(tuple(axes), None, any(v.example for v in values)),), tuple(wanted))


RULES = {
    "pad": Rule(_pad, _pad_params),
    "slice": Rule(_slice, _slice_params),
    "split": Rule(_split, _split_params),
    "concatenate": Rule(_concatenate),
    "gather": Rule(_gather, _slice_sizes),
    "dynamic_slice": Rule(_dynamic_slice, _slice_sizes),
    "dynamic_update_slice": Rule(_update),
}
