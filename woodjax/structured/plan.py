"""A plan of what stays: applied to every tree of the network alike, and written as JSON."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from woodjax.structured.channels import FIXED, ChannelGroups, Kept, stays
from woodjax.structured.find import Streams, Unknown
from woodjax.structured.matching import match

VERSION = 1


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


class LeafPlan(NamedTuple):
    """What stays of a leaf."""

    path: str
    shape: tuple[int, ...]  # of the whole leaf
    axes: tuple[AxisPlan, ...]

    @property
    def small(self) -> tuple[int, ...]:
        """Shape of what stays."""
        found = [axis.indices() for axis in self.axes]
        return tuple(size if at is None else len(at) for size, at in zip(self.shape, found, strict=True))


@dataclass(frozen=True)
class PrunePlan:
    """Which channels stay. Made by `make_plan`; equal by value, and whole in itself: no network is needed to use it.

    Attributes:
        groups: For each group its name, its size and the indices that stay.
        leaves: What stays of each leaf of the variables.
        streams: Option of `channel_groups` that the groups were found with.
        unknown: The same.
    """

    groups: tuple[tuple[str, int, tuple[int, ...]], ...]
    leaves: tuple[LeafPlan, ...]
    streams: Streams
    unknown: Unknown

    @property
    def kept(self) -> dict[str, np.ndarray]:
        """Indices that stay of each group."""
        return {name: np.array(kept) for name, _, kept in self.groups}

    def shrink(self, tree: PyTree) -> PyTree:
        """Take what stays out of a tree: parameters, statistics, masks, or the state of an optimizer."""

        def leaf(plan: LeafPlan | None, value: Any) -> Any:
            if plan is None:
                return value
            for i, axis in enumerate(plan.axes):
                at = axis.indices()
                if at is not None:
                    value = jnp.take(value, at, axis=i)
            return value

        return self._mapped(leaf, self.leaves, tree)

    def masks(self, tree: PyTree) -> PyTree:
        """Full-shape masks of a tree: True = stays, True on leaves that are not of the network."""

        def leaf(plan: LeafPlan | None, value: Any) -> Any:
            mask = np.ones(np.shape(value), bool)
            for i, axis in enumerate(plan.axes if plan is not None else ()):
                at = axis.indices()
                if at is not None:
                    along = np.isin(np.arange(mask.shape[i]), at)
                    mask &= along.reshape([-1 if k == i else 1 for k in range(mask.ndim)])
            return jnp.asarray(mask)

        return self._mapped(leaf, self.leaves, tree)

    def _mapped(self, function: Any, leaves: Sequence[LeafPlan], tree: PyTree) -> PyTree:
        results = [function(plan, value) for plan, _, value in match(leaves, tree)]
        return jax.tree.unflatten(jax.tree.structure(tree), results)


def make_plan(groups: ChannelGroups, kept: Kept) -> PrunePlan:
    """Plan what stays of every leaf, from what stays of every group."""
    units = groups.kept_units(kept)
    leaves = []
    for leaf in groups.leaves:
        axes = []
        for axis in leaf.axes:
            masks = [stays(factor, units) for factor in axis]
            ids = tuple(None if mask.all() else tuple(map(int, np.flatnonzero(mask))) for mask in masks)
            axes.append(AxisPlan(tuple(len(factor) for factor in axis), ids))
        leaves.append(LeafPlan(leaf.path, leaf.shape, tuple(axes)))
    described = []
    for group in groups.groups:
        mask = np.asarray(kept.get(group.name, np.ones(group.size, bool)))
        described.append((group.name, group.size, tuple(map(int, np.flatnonzero(mask)))))
    return PrunePlan(tuple(described), tuple(leaves), groups.streams, groups.unknown)
