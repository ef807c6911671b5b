"""A network as a function of gates, one for each channel."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from woodjax.door import checked
from woodjax.loss_rows import batch_size
from woodjax.structured.axes import Axis, Value
from woodjax.structured.channels import ChannelGroups, ChannelScores, LeafChannels
from woodjax.structured.matching import match
from woodjax.structured.reading import Traced, read_program
from woodjax.structured.reads import check_reads, factor_sizes, reading_places
from woodjax.structured.rules import parts_of
from woodjax.structured.walk import Walk
from woodjax.typing import ApplyFn, Batch, Params


@checked
def gate_channels(
    groups: ChannelGroups, apply_fn: ApplyFn, params: Params, inputs: Batch | None = None
) -> tuple[ApplyFn, ChannelScores]:
    """A network as a function of gates: one number for each channel, by which whatever reads it is multiplied.

    All of curvature and gradients in this library works on it: a network of a thousand channels is a function of a
    thousand numbers. A gate of zero is the pruned network, as far as kernels alone see the channels: what sees them
    by the side of the kernels that read them, as the mean and variance of layer normalisation or a sum of squares,
    still does.

    Channels that no kernel reads, as those of queries and keys (fused with values or not), or that a kernel both
    writes and reads, as tied embeddings do, have the square root of the gate on every weight instead. That is the gate
    itself where one such weight follows another, `√g q · √g k = g (q · k)`, and zero is the pruned network; but a
    scale on the way counts half as much again in derivatives, and they are to be taken at gates above zero.

    Args:
        groups: From `channel_groups`.
        apply_fn: `apply_fn(params, inputs)`.
        params: The parameters, or all variables.
        inputs: What the network takes; shapes are enough. Tied weights and queries fused with values are only
            found with them: without, pass no network that has any.

    Returns:
        `gated(gates, inputs)` and gates of one, `[n]` for each group.

    Raises:
        ValueError: A group whose readers are not among `params`; leaves of another shape.

    Cost:
        A pass over the weights for each call; with `inputs`, a trace of the network once.

    References:
        Theis et al. 2018 (arXiv 1801.05787); Molchanov et al. 2019 (arXiv 1906.10771), section 3.2.

    Example:
        >>> import jax.numpy as jnp, woodjax as wj
        >>> params = {"a": jnp.ones((1, 2)), "b": jnp.array([[1.0], [10.0]])}
        >>> apply_fn = lambda p, x: x @ p["a"] @ p["b"]
        >>> groups = wj.channel_groups(apply_fn, params, jnp.ones((1, 1)))
        >>> gated, gates = wj.gate_channels(groups, apply_fn, params)
        >>> gated({"a": jnp.array([1.0, 0.0])}, jnp.ones((1, 1))).tolist()
        [[1.0]]
    """
    everywhere = {group.name for group in groups.groups if all(role != "in" for _, _, role in group.places)}
    if inputs is not None:
        everywhere |= _tied(groups, apply_fn, params, inputs)
    places = reading_places(groups, everywhere)
    check_reads(places, params)

    def gated(gates: ChannelScores, inputs: Batch) -> Array:
        parts = [gates[group.name] for group in groups.groups]
        parts = [jnp.sqrt(g) if group.name in everywhere else g for g, group in zip(parts, groups.groups, strict=True)]
        flat = jnp.concatenate(parts)
        leaves = [w if leaf is None else _scaled(leaf, w, flat) for leaf, _, w in match(places.leaves, params)]
        return apply_fn(jax.tree.unflatten(jax.tree.structure(params), leaves), inputs)

    return gated, {group.name: jnp.ones(group.size) for group in groups.groups}


def one_example(inputs: Batch) -> Batch:
    """The first example, to read a program with.

    Args:
        inputs: Stacked along the first axis.

    Returns:
        The same with a batch of one.

    Raises:
        ValueError: Inputs of different or zero length.
    """
    batch_size(inputs)
    return jax.tree.map(lambda x: x[:1], inputs)


def _scaled(leaf: LeafChannels, weights: Float[Array, "..."], gates: Float[Array, " channels"]) -> Float[Array, "..."]:
    sizes = factor_sizes(leaf)
    scaled = jnp.reshape(weights, sizes)
    for place, factor in enumerate(factor for axis in leaf.axes for factor in axis):
        own = (factor >= 0) & (factor < len(gates))
        if own.any():
            scale = jnp.where(own, gates[np.where(own, factor, 0)], 1).astype(scaled.dtype)
            scaled = scaled * scale.reshape([-1 if i == place else 1 for i in range(len(sizes))])
    return scaled.reshape(jnp.shape(weights))


def _tied(groups: ChannelGroups, apply_fn: ApplyFn, params: Params, inputs: Batch) -> set[str]:
    """Groups that a leaf both writes and reads along one axis, or that are summed over without any kernel."""
    traced = Traced.of(apply_fn, params, inputs)
    reading = read_program(traced, union=groups.streams == "union", barriers=groups.unknown == "barrier")
    names = [path if leaf is None else leaf.path for leaf, path, _ in match(groups.leaves, params)]
    uses: dict[tuple[str, int], set[str]] = defaultdict(set)
    numbers = [group.start for group in groups.groups]
    owners: dict[int, str] = {}  # of a root
    for (leaf, _, _), axes in zip(match(groups.leaves, params), reading.leaves, strict=True):
        for found, axis in zip(() if leaf is None else leaf.axes, axes, strict=False):
            for units, factor in zip(found, axis, strict=False):
                for unit, root in zip(units, reading.solver.roots(factor.units), strict=False):
                    if 0 <= unit < groups.num_channels:
                        owners[int(root)] = groups.groups[int(np.searchsorted(numbers, unit, "right")) - 1].name
    summed: set[str] = set()

    def note(axes: Sequence[Axis], role: str) -> None:
        for number, i in (place for axis in axes for factor in axis for place in factor.places):
            uses[names[number], i].add(role)

    def use(equation: Any, values: Sequence[Value], times: int) -> None:
        if equation.primitive.name == "gather":
            if values[1].example and not values[0].example:
                note(values[0].axes, "out")
        elif any(value.example for value in values):  # not a kernel made of two
            parts = parts_of(reading.solver, equation, values)
            note(parts.free, "out")
            note(parts.summed, "in")
            if all(value.example for value in values):
                roots = (reading.solver.roots(factor.units) for axis in parts.summed for factor in axis)
                summed.update(owners[root] for found in roots for root in map(int, found) if root in owners)

    walk = Walk(reading.solver, barriers=groups.unknown == "barrier", on_product=use)
    walk.program(traced.jaxpr, traced.consts, reading.items())
    return summed | {
        group.name for group in groups.groups if any(len(uses[path, axis]) > 1 for path, axis, _ in group.places)
    }
