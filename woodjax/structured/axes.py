"""The algebra of axes: which indices of which values go together.

Every index along an axis of a value has a unit. Units that must stay or go together are unified. An axis is a product
of factors, row by row; `()` is an axis of size one. Of a factor it is known whether the value is zero where its units
are removed: only then may it be summed over.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Int

KEPT = 0  # the unit that always stays
FREE = -1  # the value is the same all along: any number of indices will do
ZERO = -2  # the value is zero here, and need not be stored

Units: TypeAlias = Int[np.ndarray, " size"]
Place: TypeAlias = tuple[int, int]  # leaf and axis


class Factor(NamedTuple):
    """Units along an axis, or along a part of it."""

    units: Units
    zero: bool  # is the value zero where they are removed?
    places: frozenset[Place] = frozenset()  # axes of leaves that it comes from, unless the inputs are in the value

    @property
    def size(self) -> int:
        """Number of indices."""
        return len(self.units)

    @property
    def vanishes(self) -> bool:
        """Is the value zero where the units are removed, rather than the same all along?"""
        return self.zero and not (self.units == FREE).any()


Axis: TypeAlias = tuple[Factor, ...]


class Value(NamedTuple):
    """What is known of a value in the program."""

    axes: tuple[Axis, ...]
    constant: Any = None  # the number that it is everywhere
    example: bool = False  # is it made of the inputs?
    leaf: int | None = None  # the number of the leaf that it is, unchanged

    def made_by(self, leaf: int | None) -> "Value":
        """What is known of a result, that is a leaf or none, and of no place in one if the inputs are in it."""
        if not self.example:
            return self._replace(leaf=leaf)
        axes = tuple(tuple(factor._replace(places=frozenset()) for factor in axis) for axis in self.axes)
        return self._replace(axes=axes, leaf=leaf)


def size_of(axis: Axis) -> int:
    """Number of indices of an axis.

    Args:
        axis: Its factors.

    Returns:
        The product of their sizes.
    """
    return int(np.prod([factor.size for factor in axis], dtype=np.int64))


def filled(size: int, unit: int) -> Axis:
    """An axis of one unit.

    Args:
        size: Number of indices.
        unit: KEPT, FREE or ZERO.

    Returns:
        The axis; without factors if its size is one.
    """
    return (Factor(np.full(size, unit), zero=True),) if size != 1 else ()


def kept_axes(shape: Sequence[int]) -> tuple[Axis, ...]:
    """Axes that always stay.

    Args:
        shape: Their sizes.

    Returns:
        The axes.
    """
    return tuple(filled(size, KEPT) for size in shape)


def suffixes(axis: Axis) -> list[int]:
    """Where an axis is cut: the sizes of what lies behind each cut.

    Args:
        axis: Its factors.

    Returns:
        Sizes, none of them one nor that of the axis.
    """
    return [size_of(axis[i:]) for i in range(1, len(axis))]


def plain(factor: Factor) -> bool:
    """Is a factor of one unit that always stays, or the same all along?

    Args:
        factor: The factor.

    Returns:
        Whether it can be cut anywhere.
    """
    if not factor.size:
        return True
    first = factor.units[0]
    return bool(first in (KEPT, FREE) and (factor.units == first).all())


def merged(axis: Axis) -> Axis:
    """Join neighbours that are plain and alike.

    Args:
        axis: Its factors.

    Returns:
        The same axis, of as few factors.
    """
    parts: list[Factor] = []
    for factor in axis:
        last = parts[-1] if parts else None
        if last is not None and plain(last) and plain(factor) and last.units[0] == factor.units[0]:
            parts[-1] = filled(last.size * factor.size, int(factor.units[0]))[0]
        else:
            parts.append(factor)
    return tuple(parts)
