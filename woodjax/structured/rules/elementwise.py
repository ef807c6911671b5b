"""Rules for primitives that act on each element by itself."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from woodjax.structured.axes import FREE, KEPT, ZERO, Factor, Value, filled
from woodjax.structured.rules.rule import Rule, Spread, Wanted
from woodjax.structured.solver import Solver

SUMS = ("add", "add_any", "sub")
NAMES = """
    abs acos acosh and asin asinh atan atan2 atanh bessel_i0e bessel_i1e bitcast_convert_type cbrt ceil clamp
    conj convert_element_type copy copy_p cos cosh digamma div eq erf erf_inv erfc exp exp2 expm1 floor ge gt
    imag integer_pow is_finite le lgamma log log1p logistic lt max min mul ne neg nextafter not or pow real
    reduce_precision rem round rsqrt select_n shift_left shift_right_arithmetic shift_right_logical sign sin
    sinh sqrt square stop_gradient tan tanh xor
"""


def spread(solver: Solver, equation: Any, values: Sequence[Value]) -> Spread:
    """All operands have the same channels at the same places; an axis of size one is spread over all of them."""
    shape = equation.outvars[0].aval.shape
    given = [_spread_out(value, shape) for value in values]
    full = [value for value in given if len(value.axes) == len(shape)]
    example = any(value.example for value in values)
    union = solver.union and equation.primitive.name in SUMS and all(value.example for value in full)
    axes = []
    for i in range(len(shape)):
        aligned = solver.align([value.axes[i] for value in full])
        axis: list[Factor] = []
        for factors in zip(*aligned, strict=True):
            axis.append(_joined(solver, equation, given, len(shape), factors, union=union))
        axes.append(tuple(axis))
    constant = None
    if all(value.constant is not None for value in values):
        constant = _at(equation, [value.constant for value in values])
        axes = [filled(size, FREE) for size in shape]
    result = Value(tuple(axes), constant, example)
    wanted: list[Wanted] = []
    for value in values:
        if len(value.axes) != len(shape):
            wanted.append(tuple((axis,) for axis in value.axes))
        else:
            wanted.append(tuple((axis if own else (),) for axis, own in zip(axes, value.axes, strict=True)))
    return Spread((result,) * len(equation.outvars), tuple(wanted))


def _spread_out(value: Value, shape: Sequence[int]) -> Value:
    if len(value.axes) != len(shape):
        return value
    pairs = zip(value.axes, shape, strict=True)
    return value._replace(axes=tuple(axis if axis or size == 1 else filled(size, FREE) for axis, size in pairs))


def _joined(
    solver: Solver, equation: Any, values: Sequence[Value], ndim: int, factors: Sequence[Factor], *, union: bool
) -> Factor:
    here = iter(factors)
    parts = [next(here) if len(value.axes) == ndim else None for value in values]
    zero = _vanishes(equation, values, [part is not None and part.zero and not _free(part) for part in parts])
    units = factors[0].units
    for factor in factors[1:]:
        if union and zero and factor.zero and factors[0].zero and not (_free(factor) or _free(factors[0])):
            units = solver.either(units, factor.units)
        else:
            units = solver.tie(units, factor.units)
    missing = np.any([factor.units == ZERO for factor in factors], axis=0) & (units < 0)
    if missing.any():  # no operand has a channel here, and one is zero
        stays_zero = _vanishes(equation, values, [part is not None and not _free(part) for part in parts])
        units = np.where(missing, ZERO if stays_zero else KEPT, units)
    places = frozenset[Any]().union(*(factor.places for factor in factors))
    return Factor(units, zero, places)


def _free(factor: Factor) -> bool:
    return bool((factor.units == FREE).all())


def _vanishes(equation: Any, values: Sequence[Value], zero: Sequence[bool]) -> bool:
    """Is the result zero where these operands are, whatever the others are?"""
    name = equation.primitive.name
    known = [0 if is_zero else value.constant for is_zero, value in zip(zero, values, strict=True)]
    if name in ("mul", "and"):
        return any(number is not None and number == 0 for number in known)
    if name == "div":
        return known[0] is not None and known[0] == 0 and (known[1] is None or known[1] != 0)
    if name == "select_n":
        return all(number is not None and number == 0 for number in known[1:])
    if any(number is None for number in known):
        return False
    return bool(_at(equation, known) == 0)


def _at(equation: Any, numbers: Sequence[Any]) -> Any:
    with jax.ensure_compile_time_eval():
        operands = [jnp.asarray(n, v.aval.dtype) for n, v in zip(numbers, equation.invars, strict=True)]
        return np.asarray(equation.primitive.bind(*operands, **equation.params))


RULES = dict.fromkeys((*SUMS, *NAMES.split()), Rule(spread))
