"""Rules for matrix products and convolutions."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from woodjax.structured.axes import FREE, KEPT, Axis, Factor, Value, filled, size_of
from woodjax.structured.rules.rule import Counts, Rule, Spread, Wanted
from woodjax.structured.solver import Solver


class Parts(NamedTuple):
    """What a product is over: axes of the result and axes that are summed over."""

    spread: Spread
    free: tuple[Axis, ...]  # of both operands: written
    summed: tuple[Axis, ...]  # of both operands: read
    times: int  # multiply-adds of one of each


def parts_of(solver: Solver, equation: Any, values: Sequence[Value]) -> Parts:
    """Spread of a product, and what it costs.

    Args:
        solver: Of the units.
        equation: The product.
        values: Its operands.

    Returns:
        Its parts.
    """
    return (_dot if equation.primitive.name == "dot_general" else _convolution)(solver, equation, values)


def _dot(solver: Solver, equation: Any, values: Sequence[Value]) -> Parts:
    left, right = values
    (contracted, batched), example = equation.params["dimension_numbers"], left.example or right.example
    wants: tuple[list[tuple[Axis, ...]], ...] = ([(a,) for a in left.axes], [(a,) for a in right.axes])
    for one, two in zip(*contracted, strict=True):
        wants[0][one] = wants[1][two] = _summed(solver, left.axes[one], right.axes[two])
    batch = []
    for one, two in zip(*batched, strict=True):
        batch.append(_multiplied(solver, left.axes[one], right.axes[two]))
        wants[0][one] = wants[1][two] = (batch[-1],)
    free = [
        [axis for i, axis in enumerate(value.axes) if i not in (*contracted[side], *batched[side])]
        for side, value in enumerate(values)
    ]
    axes = [*batch, *free[0], *free[1]]
    summed = tuple(axes[i] for axes, at in ((left.axes, contracted[0]), (right.axes, contracted[1])) for i in at)
    spread = Spread((Value(tuple(axes), None, example),), (tuple(wants[0]), tuple(wants[1])))
    return Parts(spread, (*free[0], *free[1]), summed, 1)


def _summed(solver: Solver, left: Axis, right: Axis) -> tuple[Axis, ...]:
    """Two axes that are summed over together: what is removed from one may be missing in the other."""
    found = []
    for one, two in zip(*solver.align([left, right]), strict=True):
        units = solver.tie(one.units, two.units)
        if not (one.vanishes or two.vanishes):
            solver.fix((one, two))
        found.append([part._replace(units=np.where(part.units == FREE, units, part.units)) for part in (one, two)])
    return tuple(tuple(factors) for factors in zip(*found, strict=True)) if found else ((), ())


def _multiplied(solver: Solver, left: Axis, right: Axis) -> Axis:
    """Two axes that are multiplied index by index: zero where one of them is."""
    pair = solver.align([left, right])
    return tuple(
        Factor(solver.tie(one.units, two.units), one.vanishes or two.vanishes, one.places | two.places)
        for one, two in zip(*pair, strict=True)
    )


def _convolution(solver: Solver, equation: Any, values: Sequence[Value]) -> Parts:
    inputs, kernel = values
    numbers, groups = equation.params["dimension_numbers"], equation.params["feature_group_count"]
    out_shape = equation.outvars[0].aval.shape
    batch, channels, *places = numbers.lhs_spec
    outputs, reads, *taps = numbers.rhs_spec
    if equation.params["batch_group_count"] != 1:
        inputs, kernel = (v._replace(axes=tuple(map(solver.fix, v.axes))) for v in values)
    each = size_of(kernel.axes[reads])
    behind = size_of(kernel.axes[outputs]) // groups
    given, written = solver.cut_at(inputs.axes[channels], each), solver.cut_at(kernel.axes[outputs], behind)
    heads = (_head(given, each), _head(written, behind))
    grouped = _multiplied(solver, *heads) if groups > 1 else ()
    read = _summed(solver, given[len(heads[0]) :], kernel.axes[reads])
    result = (*grouped, *written[len(heads[1]) :])
    axes = [filled(size, KEPT) for size in out_shape]
    if equation.params["batch_group_count"] == 1:
        axes[numbers.out_spec[0]] = inputs.axes[batch]
    axes[numbers.out_spec[1]] = result
    wants: list[list[tuple[Axis, ...]]] = [[(axis,) for axis in value.axes] for value in (inputs, kernel)]
    for side, i in (*((0, i) for i in places), *((1, i) for i in taps)):
        wants[side][i] = (solver.fix(values[side].axes[i]),)
    wants[0][channels] = tuple((*grouped, *axis) for axis in read)
    wants[1][outputs], wants[1][reads] = (result,), read
    example = inputs.example or kernel.example
    results = Value(tuple(axes), None, example)
    wanted: tuple[Wanted, ...] = (tuple(wants[0]), tuple(wants[1]))
    times = math.prod(equation.invars[1].aval.shape[i] for i in taps)
    return Parts(Spread((results,), wanted), (axes[numbers.out_spec[0]], result), (read[1],), times)


def _head(axis: Axis, behind: int) -> Axis:
    """The factors before the last `behind` indices."""
    return next(axis[:i] for i in range(len(axis) + 1) if size_of(axis[i:]) <= behind)


def _spread(solver: Solver, equation: Any, values: Sequence[Value]) -> Spread:
    return parts_of(solver, equation, values).spread


def _groups(equation: Any, counts: Counts) -> dict[str, Any]:
    numbers = equation.params["dimension_numbers"]
    channels, reads = counts.operands[0][numbers.lhs_spec[1]], counts.operands[1][numbers.rhs_spec[1]]
    return {"feature_group_count": channels // reads}


RULES = {"dot_general": Rule(_spread), "conv_general_dilated": Rule(_spread, _groups)}
