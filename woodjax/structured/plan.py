"""A plan of what stays: applied to every tree of the network alike, and written as JSON."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool

from woodjax.door import checked
from woodjax.structured.channels import ChannelGroup, ChannelGroups, Kept, stay_along, stays
from woodjax.structured.find import Streams, Unknown, check_options
from woodjax.structured.implants import is_implanted
from woodjax.structured.matching import match_some
from woodjax.structured.staying import AxisPlan, GroupPlan, ImplantPlan, LeafPlan, check_plans
from woodjax.typing import PyTree

VERSION = 1
Plans: TypeAlias = tuple[LeafPlan | None, ...]  # of each leaf of a tree


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
    def kept(self) -> dict[str, Bool[np.ndarray, " n"]]:
        """Which channels of each group stay."""
        return {group.name: np.isin(np.arange(group.size), group.kept) for group in self.groups}

    @property
    def implanted(self) -> dict[str, Bool[np.ndarray, " n"]]:
        """Which of them have implants."""
        return {group.name: np.isin(np.arange(group.size), group.implanted) for group in self.groups}

    def shrink(self, tree: PyTree) -> PyTree:
        """Take what stays out of a tree: variables, masks, or the state of an optimizer.

        Args:
            tree: A tree with leaves of the variables, found by the ends of their paths, and any others. Kernels with
                implants become `ImplantedKernel`, which starts with the centres of the replaced kernels.

        Returns:
            The tree with smaller leaves; leaves that are not of the network as they are.

        Raises:
            ValueError: A leaf of the network with another shape; a tree of arrays without any leaf of the network.

        Cost:
            One gather for each leaf.
        """
        return self._mapped(_shrunk, tree)

    def expand(self, tree: PyTree) -> PyTree:
        """Put what stayed back where it was, with zeros for what went.

        Args:
            tree: A tree that `shrink` returned, trained since or not.

        Returns:
            The tree for the whole network, which gives the same output.

        Raises:
            ValueError: As `shrink`.
        """
        small = [leaf._replace(shape=leaf.small) for leaf in self.leaves]
        whole = dict(zip(small, self.leaves, strict=True))
        pairs, structure = match_some(small, tree), jax.tree.structure(tree, is_leaf=is_implanted)
        plans = tuple(None if plan is None else whole[plan] for plan, _, _ in pairs)
        return jax.tree.unflatten(structure, _expanded(plans, [value for _, _, value in pairs]))

    def masks(self, tree: PyTree) -> PyTree:
        """Full-shape masks of a tree: the network that has them is the one that `shrink` makes smaller.

        Args:
            tree: As for `shrink`.

        Returns:
            Bool trees, True = stays, True on leaves that are not of the network. Of a kernel with implants, their
            centres stay.

        Raises:
            ValueError: As `shrink`.
        """
        return self._mapped(_masks, tree)

    def then(self, later: "PrunePlan") -> "PrunePlan":
        """One plan for two: this one, and one for the network that it leaves.

        Args:
            later: Made of `shrink_groups(groups, self)`.

        Returns:
            The plan that leaves the same.

        Raises:
            ValueError: Implants in this plan; a later plan that is not for the network that it leaves.
        """
        if self.has_implants:
            raise ValueError("The first plan has implants: a network with implants is not pruned further.")
        if [leaf.small for leaf in self.leaves] != [leaf.shape for leaf in later.leaves]:
            raise ValueError("The later plan is not for the network that this one leaves: make it of shrink_groups.")
        leaves = [
            two._replace(shape=one.shape, axes=tuple(a.then(b) for a, b in zip(one.axes, two.axes, strict=True)))
            for one, two in zip(self.leaves, later.leaves, strict=True)
        ]
        after = {group.name: group for group in later.groups}
        groups = [group.then(after.get(group.name)) for group in self.groups]
        return PrunePlan(tuple(groups), tuple(leaves), self.streams, self.unknown)

    @property
    def has_implants(self) -> bool:
        """Does any kernel have implants?"""
        return any(leaf.implants is not None for leaf in self.leaves)

    def to_json(self) -> str:
        """Write the plan as text.

        Returns:
            JSON, which `from_json` reads.
        """
        return json.dumps({
            "version": VERSION,
            "streams": self.streams,
            "unknown": self.unknown,
            "groups": [group._asdict() for group in self.groups],
            "leaves": [
                leaf._asdict()
                | {"axes": [axis._asdict() for axis in leaf.axes]}
                | {"implants": None if leaf.implants is None else leaf.implants._asdict()}
                for leaf in self.leaves
            ],
        })

    @classmethod
    def from_json(cls, text: str) -> "PrunePlan":
        """Read a plan that `to_json` wrote.

        Args:
            text: JSON.

        Returns:
            The plan, equal to the one that was written.

        Raises:
            ValueError: Text that is no plan, one of another version, or one whose numbers do not fit together.
        """
        try:
            found = json.loads(text)
            if found["version"] != VERSION:
                raise ValueError(f"A plan of version {found['version']}: this woodjax reads version {VERSION}.")
            groups = tuple(GroupPlan(**_tuples(group)) for group in found["groups"])
            leaves = tuple(_leaf_plan(leaf) for leaf in found["leaves"])
            check_options(found["streams"], found["unknown"])
            check_plans(groups, leaves)
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"No plan that PrunePlan.to_json wrote: {error!r}.") from error
        return cls(groups, leaves, found["streams"], found["unknown"])

    def _mapped(self, function: Callable[[Plans, list[Any]], list[Any]], tree: PyTree) -> PyTree:
        pairs = match_some(self.leaves, tree)
        results = function(tuple(plan for plan, _, _ in pairs), [value for _, _, value in pairs])
        return jax.tree.unflatten(jax.tree.structure(tree), results)


@partial(jax.jit, static_argnums=0)
def _gathered(plans: tuple[LeafPlan, ...], values: list[Any]) -> list[Any]:
    return [plan.shrink(value) for plan, value in zip(plans, values, strict=True)]


@partial(jax.jit, static_argnums=0)
def _scattered(plans: tuple[LeafPlan, ...], values: list[Any]) -> list[Any]:
    return [plan.expand(value) for plan, value in zip(plans, values, strict=True)]


def _of_network(function: Callable[..., list[Any]], plans: Plans, values: list[Any]) -> list[Any]:
    """One program for all leaves that are of the network; the others stay as they are."""
    known = [(plan, value) for plan, value in zip(plans, values, strict=True) if plan is not None]
    results = iter(function(tuple(plan for plan, _ in known), [value for _, value in known]))
    return [value if plan is None else next(results) for plan, value in zip(plans, values, strict=True)]


_shrunk, _expanded = partial(_of_network, _gathered), partial(_of_network, _scattered)


def _masks(plans: Plans, values: list[Any]) -> list[Any]:
    return [
        jnp.asarray(np.ones(jnp.shape(value), bool) if plan is None else plan.mask())
        for plan, value in zip(plans, values, strict=True)
    ]


def _tuples(found: Any) -> Any:
    if isinstance(found, list):
        return tuple(map(_tuples, found))
    return {name: _tuples(value) for name, value in found.items()} if isinstance(found, dict) else found


def _leaf_plan(found: dict[str, Any]) -> LeafPlan:
    fields = _tuples(found)
    implants = None if fields["implants"] is None else ImplantPlan(**fields["implants"])
    axes = tuple(AxisPlan(**axis) for axis in fields["axes"])
    return LeafPlan(**fields | {"axes": axes, "implants": implants})


def _indices(masks: Kept, group: ChannelGroup, default: bool) -> tuple[int, ...]:
    mask = np.asarray(masks.get(group.name, np.full(group.size, default)))
    return tuple(map(int, np.flatnonzero(mask)))


@checked
def make_plan(groups: ChannelGroups, kept: Kept, implanted: Kept | None = None) -> PrunePlan:
    """Plan what stays of every leaf, from what stays of every group.

    Args:
        groups: Of the network.
        kept: Bool `[n]` for each group, True = stays; groups that are left out stay whole.
        implanted: Which of the channels that stay have implants in the stead of k×k kernels: all convolutions of
            several places that write them, but those with groups.

    Returns:
        The plan.

    Raises:
        ValueError: An unknown group; another number of channels; a group of which nothing stays; an implant for a
            channel that goes, or of a group without a kernel in which it could stand.

    Cost:
        None on the device.

    Example:
        >>> import jax.numpy as jnp, numpy as np, woodjax as wj
        >>> variables = {"hidden": jnp.ones((3, 4)), "head": jnp.ones((4, 2))}
        >>> apply_fn = lambda v, x: jnp.tanh(x @ v["hidden"]) @ v["head"]
        >>> groups = wj.channel_groups(apply_fn, variables, jnp.ones((1, 3)))
        >>> plan = wj.make_plan(groups, {"hidden": np.array([True, False, False, True])})
        >>> {name: leaf.shape for name, leaf in plan.shrink(variables).items()}
        {'head': (2, 2), 'hidden': (3, 2)}
    """
    units, implants = groups.kept_units(kept), groups.implanted_units(implanted)
    if (implants & ~units).any():
        raise ValueError("implanted has channels that do not stay in kept: an implant stands for a channel that stays.")
    able = groups.implantable
    if lost := [name for name, mask in (implanted or {}).items() if np.any(mask) and name not in able]:
        raise ValueError(
            f"implanted has channels of {lost}, which no convolution of several places writes: implants can stand in "
            f"{list(able)}."
        )
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
            whole, full = (stay_along(leaf.axes[kernel.outputs], left) for left in (units, units & ~implants))
            at = np.flatnonzero(~full[whole])
            if len(at):
                plan = ImplantPlan(kernel.outputs, kernel.places, tuple(map(int, at)))
        leaves.append(LeafPlan(leaf.path, leaf.shape, tuple(axes), plan))
    described = tuple(
        GroupPlan(group.name, group.size, _indices(kept, group, True), _indices(implanted or {}, group, False))
        for group in groups.groups
    )
    return PrunePlan(described, tuple(leaves), groups.streams, groups.unknown)
