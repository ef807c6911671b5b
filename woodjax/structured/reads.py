"""Where channels are read: by what a network notices that one of them is gone.

A channel is written by one kernel, scaled behind it, and read by the next. To take away any one of the three is to
take away the channel; all three together would count it three times in a model that is linear in the weights. So a
channel leaves by the weights that read it, and its other weights go with it without being counted.
"""

import math
from collections.abc import Container
from dataclasses import replace

import numpy as np
from jaxtyping import Bool, Int

from woodjax.structured.channels import FIXED, ChannelGroup, ChannelGroups, LeafChannels
from woodjax.structured.matching import matched
from woodjax.typing import Params


def reading_places(groups: ChannelGroups, everywhere: Container[str] = ()) -> ChannelGroups:
    """The same channels, but only in the places where they are read.

    Args:
        groups: From `channel_groups`.
        everywhere: Names of groups that keep all their places.

    Returns:
        The groups, with FIXED units elsewhere. Channels that no kernel reads, as those of queries and keys, keep
        the place of the first kernel that writes them.
    """
    owners = np.full(groups.num_channels + len(groups.unions) + 1, -1)  # FIXED is the last
    places = []
    for number, group in enumerate(groups.groups):
        owners[group.start : group.start + group.size] = number
        reads = {(path, axis) for path, axis, role in group.places if role == "in"}
        writes = [(path, axis) for path, axis, role in group.places if role == "out"]
        all_of_it = {(path, axis) for path, axis, _ in group.places}
        places.append(all_of_it if group.name in everywhere else reads or set(writes[:1]))

    def axis_of(leaf: LeafChannels, axis: int) -> tuple[Int[np.ndarray, " size"], ...]:
        here = np.array([(leaf.path, axis) in found for found in places] + [False])  # -1 is the last
        return tuple(np.where(here[owners[factor]], factor, FIXED) for factor in leaf.axes[axis])

    leaves = [leaf._replace(axes=tuple(axis_of(leaf, i) for i in range(len(leaf.axes)))) for leaf in groups.leaves]
    return replace(groups, leaves=tuple(leaves))


def check_reads(reads: ChannelGroups, params: Params) -> None:
    """Raise unless the weights that read each channel are among the parameters.

    Args:
        reads: From `reading_places`.
        params: A params-tree.

    Raises:
        ValueError: Naming the first group without; no groups at all.
    """
    if not reads.groups:
        raise ValueError(
            "The network has no channels that can be removed. Batch statistics that the network carries hold every "
            "channel behind them: pass channel_groups all variables, statistics among them."
        )
    found = np.zeros(reads.num_channels, bool)
    for leaf in matched(reads.leaves, params)[0]:
        for factor in (factor for axis in leaf.axes for factor in axis):
            found[factor[(factor >= 0) & (factor < reads.num_channels)]] = True
    for group in reads.groups:
        if not found[group.start : group.start + group.size].all():
            raise ValueError(
                f"The weights that read group '{group.name}' are not in params: pass the tree with all parameters "
                "that channel_groups was given."
            )


def factor_sizes(leaf: LeafChannels) -> list[int]:
    """Shape of a leaf with its axes cut into factors.

    Args:
        leaf: The leaf.

    Returns:
        The size of each factor.
    """
    return [len(factor) for axis in leaf.axes for factor in axis]


def members(leaf: LeafChannels, group: ChannelGroup) -> Int[np.ndarray, "n q"]:
    """The weights of each channel of a group in a leaf.

    Args:
        leaf: The leaf.
        group: The group.

    Returns:
        Indices into the flattened leaf, each weight of a channel once; `[n, 0]` where the leaf has none.
    """
    sizes = factor_sizes(leaf)
    flat = np.arange(math.prod(sizes), dtype=np.int32).reshape(sizes)
    found = []
    for place, factor in enumerate(factor for axis in leaf.axes for factor in axis):
        at = np.flatnonzero((factor >= group.start) & (factor < group.start + group.size))
        if at.size:
            ordered = at[np.argsort(factor[at], kind="stable")]
            found.append(np.moveaxis(flat, place, 0)[ordered].reshape(group.size, -1))
    if len(found) <= 1:
        return found[0] if found else np.zeros((group.size, 0), np.int32)
    return np.stack([np.unique(row) for row in np.concatenate(found, axis=1)])


def among(rows: Int[np.ndarray, "n q"], others: Int[np.ndarray, "n r"], size: int) -> Bool[np.ndarray, "n q"]:
    """Which entries of a row are in the same row of another array.

    Args:
        rows: Indices.
        others: Indices.
        size: Above all of them.

    Returns:
        Bool for each entry.
    """
    shifts = np.arange(len(rows), dtype=np.int64)[:, None] * size
    return np.isin(rows + shifts, others + shifts)


def where_removed(leaf: LeafChannels, removed: Bool[np.ndarray, " units"]) -> Bool[np.ndarray, "..."]:
    """Weights of channels that are removed.

    Args:
        leaf: The leaf.
        removed: Of every unit: is it removed?

    Returns:
        Bool of the shape of the leaf.
    """
    sizes = factor_sizes(leaf)
    mask = np.zeros(sizes, bool)
    for place, factor in enumerate(factor for axis in leaf.axes for factor in axis):
        here = np.append(removed, False)[factor]  # FIXED is the last
        mask |= here.reshape([-1 if i == place else 1 for i in range(len(sizes))])
    return mask.reshape(leaf.shape)
