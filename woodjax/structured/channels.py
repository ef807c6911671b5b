"""Which indices of which axes go together: the channels of a network.

A channel is what is removed as one: an output of one kernel, the scale and shift behind it, an input of the next.
Channels that occur in the same axes of the same leaves form a group. Found by `channel_groups`; nothing here knows
how. An axis may be a product of several factors, row by row, as the axis of a kernel behind a flattening is: a place,
then a channel.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from woodjax.structured.matching import matched
from woodjax.typing import PyTree

Role: TypeAlias = Literal["out", "in", "each"]
"""What a leaf does with the channels of an axis: a kernel writes them, reads them, or all else."""

Kept: TypeAlias = Mapping[str, Bool[np.ndarray, " n"]]
"""Which channels of each group stay; groups that are left out stay whole."""

ChannelScores: TypeAlias = dict[str, Float[Array, " n"]]
"""A score for each channel of each group: low = prune first, `+inf` = never."""

FIXED = -1


class ChannelGroup(NamedTuple):
    """Channels that occur in the same places of the same leaves."""

    name: str  # of the first kernel that writes them
    start: int  # number of its first channel
    size: int
    places: tuple[tuple[str, int, Role], ...]  # leaf, axis and what it does there


class LeafChannels(NamedTuple):
    """The channels of a leaf: for each axis its factors, for each factor a unit at every index."""

    path: str
    shape: tuple[int, ...]
    axes: tuple[tuple[Int[np.ndarray, " size"], ...], ...]  # FIXED where an index always stays
    roles: tuple[Role, ...]


class Product(NamedTuple):
    """Multiply-adds of a matrix product or a convolution: a number, times what stays of each of its factors."""

    times: int
    written: tuple[Int[np.ndarray, " size"], ...]  # outputs of the kernel of a convolution
    factors: tuple[Int[np.ndarray, " size"], ...]  # all else
    taps: int  # places of the kernel that an implant does not have: 1 where there can be none


class ConvKernel(NamedTuple):
    """A leaf that is the kernel of a convolution of several places, and in which an implant can stand."""

    path: str
    outputs: int  # axes
    inputs: int
    places: tuple[int, ...]


@dataclass(frozen=True)
class ChannelGroups:
    """The channels of a network, and the cost of what stays of them. Made by `channel_groups`.

    Attributes:
        groups: The groups, in the order in which the leaves have them.
        leaves: Every leaf of the variables.
        unions: Channels of each unit that is not one channel: it stays while one of them does. Units are numbered
            behind the channels; there are none but with `streams="union"`.
        products: What the multiply-adds of one call are made of.
        kernels: Leaves in which implants can stand.
        streams: Option of `channel_groups`.
        unknown: The same.
    """

    groups: tuple[ChannelGroup, ...]
    leaves: tuple[LeafChannels, ...]
    unions: tuple[tuple[int, ...], ...]
    products: tuple[Product, ...]
    kernels: tuple[ConvKernel, ...] = ()
    streams: Literal["joint", "union"] = "joint"
    unknown: Literal["error", "barrier"] = "error"

    @property
    def implantable(self) -> tuple[str, ...]:
        """Groups that a kernel writes in which implants can stand."""
        kernels = {(kernel.path, kernel.outputs, "out") for kernel in self.kernels}
        return tuple(group.name for group in self.groups if not kernels.isdisjoint(group.places))

    def __getitem__(self, name: str) -> ChannelGroup:
        """The group of a name.

        Args:
            name: Of a group.

        Returns:
            The group.

        Raises:
            ValueError: No such group.
        """
        for group in self.groups:
            if group.name == name:
                return group
        raise ValueError(f"No group '{name}'; there are {[group.name for group in self.groups]}.")

    @property
    def num_channels(self) -> int:
        """Channels of all groups together."""
        return sum(group.size for group in self.groups)

    def all_kept(self) -> dict[str, Bool[np.ndarray, " n"]]:
        """True for every channel of every group."""
        return {group.name: np.ones(group.size, bool) for group in self.groups}

    def kept_units(self, kept: Kept) -> Bool[np.ndarray, " units"]:
        """Which units stay.

        Args:
            kept: Which channels stay.

        Returns:
            Bool for each channel and, behind them, for each union.

        Raises:
            ValueError: An unknown group; another number of channels; a group of which nothing stays.
        """
        channels = np.ones(self.num_channels, bool)
        for name, mask in kept.items():
            group, mask = self[name], self._mask(name, mask, "kept", "stays")
            if not mask.any():
                raise ValueError(f"kept['{name}'] keeps nothing: a network without channels has no output. Keep one.")
            channels[group.start : group.start + group.size] = mask
        return np.concatenate([channels, [channels[list(union)].any() for union in self.unions]]).astype(bool)

    def parameters(self, kept: Kept, implanted: Kept | None = None) -> int:
        """Numbers that stay in all leaves, statistics included.

        Args:
            kept: Which channels stay.
            implanted: Which of them have implants for kernels.

        Returns:
            Their number.
        """
        units, implants = self.kept_units(kept), self.implanted_units(implanted)
        kernels = {kernel.path: kernel for kernel in self.kernels}
        total = 0
        for leaf in self.leaves:
            counts = [math.prod(_count(factor, units) for factor in axis) for axis in leaf.axes]
            total += math.prod(counts)
            if leaf.path in kernels:
                kernel = kernels[leaf.path]
                replaced = counts[kernel.outputs] - math.prod(
                    _count(factor, units & ~implants) for factor in leaf.axes[kernel.outputs]
                )
                places = math.prod(counts[i] for i in kernel.places)
                total -= replaced * counts[kernel.inputs] * (places - 1)
        return total

    def macs(self, kept: Kept, implanted: Kept | None = None) -> int:
        """Multiply-adds of one call on inputs of the size of the example: 40.6 million for a ResNet-20 and one image.

        Args:
            kept: Which channels stay.
            implanted: Which of them have implants for kernels.

        Returns:
            Their number, those in the padding of convolutions included.
        """
        units, implants = self.kept_units(kept), self.implanted_units(implanted)
        total = 0
        for part in self.products:
            whole = math.prod(_count(factor, units) for factor in part.written)
            replaced = whole - math.prod(_count(factor, units & ~implants) for factor in part.written)
            outputs = (whole - replaced) * part.taps + replaced
            total += part.times // part.taps * outputs * math.prod(_count(factor, units) for factor in part.factors)
        return total

    def implanted_units(self, implanted: Kept | None) -> Bool[np.ndarray, " units"]:
        """Which units have implants for kernels.

        Args:
            implanted: Which channels have.

        Returns:
            Bool for each channel and, behind them, False for each union.

        Raises:
            ValueError: An unknown group; another number of channels.
        """
        channels = np.zeros(self.num_channels + len(self.unions), bool)
        for name, mask in (implanted or {}).items():
            group, mask = self[name], self._mask(name, mask, "implanted", "has implants")
            channels[group.start : group.start + group.size] = mask
        return channels

    def _mask(self, name: str, mask: Bool[np.ndarray, " n"], argument: str, meaning: str) -> Bool[np.ndarray, " n"]:
        size, mask = self[name].size, np.asarray(mask)
        if mask.shape != (size,) or mask.dtype != bool:
            raise ValueError(
                f"{argument}['{name}'] is {mask.dtype}{list(mask.shape)}, expected bool[{size}]: True for every "
                f"channel that {meaning}."
            )
        return mask

    def sums(self, tree: PyTree, roles: Iterable[Role] = ("out", "in", "each")) -> ChannelScores:
        """Add up a tree over the weights of each channel.

        Args:
            tree: A tree whose leaves are leaves of the variables, by path and shape, all of them or some: a
                params-tree of scores for example. Other leaves are not counted.
            roles: Of the weights that count: `"out"` those by which a kernel writes the channel, `"in"` those by
                which one reads it, `"each"` all else (biases, normalisation).

        Returns:
            `[n]` for each group. A weight that belongs to a channel in two ways, as in a kernel from a residual
            stream to itself, counts twice. A weight of a union counts for none.

        Cost:
            One pass over the tree.
        """
        total = jnp.zeros(self.num_channels)
        for leaf, values in zip(*matched(self.leaves, tree), strict=True):
            sizes = [len(factor) for axis in leaf.axes for factor in axis]
            flat = jnp.reshape(values, sizes).astype(jnp.result_type(values.dtype, jnp.float32))
            factors = [(factor, leaf.roles[i]) for i, axis in enumerate(leaf.axes) for factor in axis]
            for place, (factor, role) in enumerate(factors):
                own = (factor >= 0) & (factor < self.num_channels)
                if role in roles and own.any():
                    each = jnp.sum(flat, axis=[i for i in range(flat.ndim) if i != place])
                    total = total.astype(each.dtype).at[factor[own]].add(each[own])
        return {group.name: total[group.start : group.start + group.size] for group in self.groups}

    def counts(self, tree: PyTree, roles: Iterable[Role] = ("out", "in", "each")) -> ChannelScores:
        """Number of weights of each channel, as `sums` counts them.

        Args:
            tree: As for `sums`; shapes are enough.
            roles: As for `sums`.

        Returns:
            `[n]` for each group.
        """
        return self.sums(jax.tree.map(lambda leaf: jnp.ones(leaf.shape), tree), roles)


def stays(factor: Int[np.ndarray, " size"], units: Bool[np.ndarray, " units"]) -> Bool[np.ndarray, " size"]:
    """Which indices of a factor stay.

    Args:
        factor: The unit at every index, or FIXED.
        units: Which units stay.

    Returns:
        Bool for each index.
    """
    return np.append(units, True)[factor]  # FIXED is the last


def stay_along(axis: Iterable[Int[np.ndarray, " size"]], units: Bool[np.ndarray, " units"]) -> Bool[np.ndarray, " n"]:
    """Which indices of an axis stay, or of several in a row: those of which every factor stays.

    Args:
        axis: Its factors, row by row.
        units: Which units stay.

    Returns:
        Bool for each index.
    """
    found = np.ones(1, bool)
    for factor in axis:
        found = np.logical_and.outer(found, stays(factor, units)).reshape(-1)
    return found


def _count(factor: Int[np.ndarray, " size"], units: Bool[np.ndarray, " units"]) -> int:
    return int(np.count_nonzero(stays(factor, units)))
