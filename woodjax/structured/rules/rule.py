"""What a rule for a primitive says."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

from woodjax.structured.axes import Axis, Value
from woodjax.structured.solver import Solver

Wanted: TypeAlias = tuple[tuple[Axis, ...], ...]
"""For each axis of an operand: the axes whose indices it must have, those that stay in all of them."""


class Spread(NamedTuple):
    """What is known of the results of an equation, and what its operands must have for it to run on fewer channels."""

    results: tuple[Value, ...]
    wanted: tuple[Wanted, ...]


class Counts(NamedTuple):
    """How many indices stay."""

    operands: tuple[tuple[int, ...], ...]
    results: tuple[tuple[int, ...], ...]


class Rule(NamedTuple):
    """How channels go through a primitive."""

    spread: Callable[[Solver, Any, Sequence[Value]], Spread]
    params: Callable[[Any, Counts], dict[str, Any]] = lambda equation, counts: {}
    """What differs in the parameters of the equation, when it runs on fewer channels."""


def as_they_are(values: Sequence[Value]) -> tuple[Wanted, ...]:
    """Want of every operand what it has.

    Args:
        values: The operands.

    Returns:
        Their own axes.
    """
    return tuple(tuple((axis,) for axis in value.axes) for value in values)
