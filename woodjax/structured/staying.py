"""What stays of an axis, of a leaf and of a group."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Shaped

from woodjax.structured.implants import ImplantedKernel, split_kernel


class AxisPlan(NamedTuple):
    """What stays of an axis: the product of what stays of its factors."""

    sizes: tuple[int, ...]
    kept: tuple[tuple[int, ...] | None, ...]  # indices of each factor; None is all

    def indices(self) -> np.ndarray | None:
        """Indices along the whole axis, or None if all stay."""
        if all(kept is None for kept in self.kept):
            return None
        masks = np.ones(1, bool)
        for size, kept in zip(self.sizes, self.kept, strict=True):
            mask = np.ones(size, bool) if kept is None else np.isin(np.arange(size), kept)
            masks = np.logical_and.outer(masks, mask).reshape(-1)
        return np.flatnonzero(masks)

    def then(self, later: "AxisPlan") -> "AxisPlan":
        """This, and then what is left of that."""
        return AxisPlan(self.sizes, tuple(map(_after, self.kept, later.kept)))


def _after(first: tuple[int, ...] | None, later: tuple[int, ...] | None) -> tuple[int, ...] | None:
    if first is None or later is None:
        return first if later is None else later
    return tuple(first[i] for i in later)


class ImplantPlan(NamedTuple):
    """Which outputs of a kernel are implants."""

    outputs: int  # axis
    places: tuple[int, ...]  # axes
    at: tuple[int, ...]  # among the outputs that stay


class LeafPlan(NamedTuple):
    """What stays of a leaf."""

    path: str
    shape: tuple[int, ...]  # of the whole leaf
    axes: tuple[AxisPlan, ...]
    implants: ImplantPlan | None = None

    @property
    def small(self) -> tuple[int, ...]:
        """Shape of what stays."""
        found = [axis.indices() for axis in self.axes]
        return tuple(size if at is None else len(at) for size, at in zip(self.shape, found, strict=True))

    def shrink(self, value: Shaped[Array, "..."]) -> Any:
        """What stays of the leaf, or of an array of its shape."""
        for i, axis in enumerate(self.axes):
            at = axis.indices()
            if at is not None:
                value = jnp.take(value, at, axis=i, mode="clip", unique_indices=True, indices_are_sorted=True)
        return value if self.implants is None else split_kernel(value, *self.implants)

    def expand(self, value: Any) -> Shaped[Array, "..."]:
        """The whole leaf, with zeros for what went."""
        value = value.dense() if isinstance(value, ImplantedKernel) else value
        for i, axis in enumerate(self.axes):
            at = axis.indices()
            if at is not None:
                stays = np.isin(np.arange(self.shape[i]), at)
                taken = jnp.take(
                    value, np.maximum(np.cumsum(stays) - 1, 0), axis=i, mode="clip"
                )  # cheaper than scatter
                value = jnp.where(_along(stays, i, value.ndim), taken, jnp.zeros((), value.dtype))
        return value

    def mask(self) -> Bool[np.ndarray, "..."]:
        """Where the leaf stays."""
        mask = np.ones(self.shape, bool)
        for i, axis in enumerate(self.axes):
            at = axis.indices()
            if at is not None:
                mask &= _along(np.isin(np.arange(mask.shape[i]), at), i, mask.ndim)
        if self.implants is not None:
            outputs, places, at = self.implants
            kept = self.axes[outputs].indices()
            replaced = np.array(at) if kept is None else kept[np.array(at)]
            centre = np.ones(self.shape, bool)
            for i in places:
                size = mask.shape[i]
                centre &= _along(np.arange(size) == (size - 1) // 2, i, mask.ndim)
            mask &= centre | ~_along(np.isin(np.arange(mask.shape[outputs]), replaced), outputs, mask.ndim)
        return mask


def _along(mask: Bool[np.ndarray, " n"], axis: int, ndim: int) -> Bool[np.ndarray, "..."]:
    return mask.reshape([-1 if i == axis else 1 for i in range(ndim)])


class GroupPlan(NamedTuple):
    """What stays of a group."""

    name: str
    size: int  # of the whole group
    kept: tuple[int, ...]
    implanted: tuple[int, ...]  # those of them whose kernels have implants

    def then(self, later: "GroupPlan | None") -> "GroupPlan":
        """This, and then what is left of that."""
        if later is None:
            return self
        kept, implanted = (tuple(self.kept[i] for i in indices) for indices in (later.kept, later.implanted))
        return self._replace(kept=kept, implanted=implanted)


def check_plans(groups: Sequence[GroupPlan], leaves: Sequence[LeafPlan]) -> None:
    """Raise unless the numbers of plans fit together.

    Args:
        groups: Of a plan.
        leaves: The same.

    Raises:
        ValueError: Names that are not text or occur twice; indices that do not rise or are out of range; factors of
            an axis that do not make up its size; implants for what goes. Naming the group or leaf.
    """
    for kind, names in (("groups", [group.name for group in groups]), ("leaves", [leaf.path for leaf in leaves])):
        if len(set(names)) < len(names) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"The {kind} of the plan are {names}: expected names, each once.")
    for group in groups:
        where = f"Group '{group.name}' of the plan"
        _check_indices(f"{where}: kept", group.kept, _whole(f"{where}: size", group.size))
        _check_indices(f"{where}: implanted", group.implanted, group.size)
        if not group.kept or not set(group.implanted) <= set(group.kept):
            raise ValueError(f"{where} keeps {group.kept}, implants are {group.implanted}: expected some of some.")
    for leaf in leaves:
        _check_leaf(leaf, f"Leaf '{leaf.path}' of the plan")


def _check_leaf(leaf: LeafPlan, where: str) -> None:
    for axis in leaf.axes:
        for size, kept in zip(axis.sizes, axis.kept, strict=False):
            if kept is not None:
                _check_indices(f"{where}: kept", kept, _whole(f"{where}: sizes", size))
    sizes = tuple(math.prod(_whole(f"{where}: sizes", size) for size in axis.sizes) for axis in leaf.axes)
    if sizes != leaf.shape or any(len(axis.sizes) != len(axis.kept) for axis in leaf.axes):
        raise ValueError(f"{where} has shape {leaf.shape}, but axes {[tuple(axis) for axis in leaf.axes]}.")
    if leaf.implants is not None:
        outputs, places, at = leaf.implants
        _check_indices(f"{where}: places of implants", places, len(leaf.shape))
        _check_indices(f"{where}: axis of implants", (outputs,), len(leaf.shape))
        if outputs in places or len(leaf.shape) - len(places) != 2:
            raise ValueError(f"{where}: outputs on axis {outputs} and places on {places} leave no axis of inputs.")
        _check_indices(f"{where}: implants", at, leaf.small[outputs])


def _whole(what: str, number: Any) -> int:
    if type(number) is not int or number < 0:
        raise ValueError(f"{what} is {number!r}: expected a whole number, 0 or more.")
    return number


def _check_indices(what: str, indices: tuple[int, ...], size: int) -> None:
    rising = all(type(i) is int and 0 <= i < size for i in indices) and all(a < b for a, b in pairwise(indices))
    if type(indices) is not tuple or not rising:
        raise ValueError(f"{what} is {indices!r}: expected rising indices below {size}.")
