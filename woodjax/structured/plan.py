"""A plan of what stays: applied to every tree of the network alike, and written as JSON."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, PyTree, Shaped

from woodjax.structured.channels import FIXED, ChannelGroup, ChannelGroups, Kept, stays
from woodjax.structured.find import Streams, Unknown
from woodjax.structured.implants import split_kernel
from woodjax.structured.matching import match

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
                value = jnp.take(value, at, axis=i)
        return value if self.implants is None else split_kernel(value, *self.implants)

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


@dataclass(frozen=True)
class PrunePlan:
    """Which channels stay. Made by `make_plan`; equal by value, and whole in itself: no network is needed to use it.

    Attributes:
        groups: What stays of each group.
        leaves: What stays of each leaf of the variables.
        streams: Option of `channel_groups` that the groups were found with.
        unknown: The same.
    """

    groups: tuple[GroupPlan, ...]
    leaves: tuple[LeafPlan, ...]
    streams: Streams
    unknown: Unknown

    @property
    def kept(self) -> dict[str, np.ndarray]:
        """Indices that stay of each group."""
        return {group.name: np.array(group.kept, int) for group in self.groups}

    def shrink(self, tree: PyTree) -> PyTree:
        """Take what stays out of a tree: variables, masks, or the state of an optimizer."""
        return self._mapped(lambda plan, value: value if plan is None else plan.shrink(value), tree)

    def masks(self, tree: PyTree) -> PyTree:
        """Full-shape masks of a tree: True = stays, True on leaves that are not of the network."""
        return self._mapped(
            lambda plan, value: jnp.ones(jnp.shape(value), bool) if plan is None else jnp.asarray(plan.mask()), tree
        )

    def _mapped(self, function: Callable[[LeafPlan | None, Any], Any], tree: PyTree) -> PyTree:
        results = [function(plan, value) for plan, _, value in match(self.leaves, tree)]
        return jax.tree.unflatten(jax.tree.structure(tree), results)


def _indices(masks: Kept, group: ChannelGroup, default: bool) -> tuple[int, ...]:
    mask = np.asarray(masks.get(group.name, np.full(group.size, default)))
    return tuple(map(int, np.flatnonzero(mask)))


def make_plan(groups: ChannelGroups, kept: Kept, implanted: Kept | None = None) -> PrunePlan:
    """Plan what stays of every leaf, from what stays of every group."""
    units, implants = groups.kept_units(kept), groups.implanted_units(implanted)
    kernels = {kernel.path: kernel for kernel in groups.kernels}
    leaves = []
    for leaf in groups.leaves:
        axes = []
        for axis in leaf.axes:
            masks = [stays(factor, units) for factor in axis]
            left = tuple(None if mask.all() else tuple(map(int, np.flatnonzero(mask))) for mask in masks)
            axes.append(AxisPlan(tuple(len(factor) for factor in axis), left))
        plan = None
        if leaf.path in kernels:
            kernel = kernels[leaf.path]
            (factor,) = leaf.axes[kernel.outputs] or (np.full(1, FIXED),)
            at = np.flatnonzero(np.append(implants, False)[factor][stays(factor, units)])
            if len(at):
                plan = ImplantPlan(kernel.outputs, kernel.places, tuple(map(int, at)))
        leaves.append(LeafPlan(leaf.path, leaf.shape, tuple(axes), plan))
    described = tuple(
        GroupPlan(group.name, group.size, _indices(kept, group, True), _indices(implanted or {}, group, False))
        for group in groups.groups
    )
    return PrunePlan(described, tuple(leaves), groups.streams, groups.unknown)
