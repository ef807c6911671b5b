"""Scores of channels together: which to remove next, after those that went before."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from woodjax import linalg
from woodjax.door import checked
from woodjax.gradients import all_class_gradients
from woodjax.structured.channels import ChannelGroups, ChannelScores
from woodjax.structured.gates import gate_channels, one_example
from woodjax.typing import ApplyFn, Batch, Params


@checked
def joint_gate_scores(
    groups: ChannelGroups, apply_fn: ApplyFn, params: Params, inputs: Batch, *, microbatch_size: int = 16
) -> ChannelScores:
    """Order in which channels go, each time the one that adds least to the loss of all that are gone.

    The loss of a set is `½ ‖Σ_c r_c‖²/m` with `r_c` the rows of the Gauss–Newton matrix at the gate of channel `c`:
    `gate_scores` and what channels cost together, of one layer and of several. Nothing moves to make up for them.
    Scores are places in one ranking of all channels: prune the lowest of all groups, and do not normalise them.

    Args:
        groups: From `channel_groups`.
        apply_fn: `apply_fn(params, inputs) -> logits [n, C]`, eval mode.
        params: The parameters, or all variables.
        inputs: Inputs without labels, `[n, ...]`.
        microbatch_size: Inputs computed at once.

    Returns:
        `[n]` for each group: 0 for the channel that goes first.

    Raises:
        ValueError: As `gate_channels` and `all_class_gradients`.

    Cost:
        `n` forward and `n·C` backward passes, `2nC · channels²` flops; memory `nC · channels`, and
        `microbatch_size · C · d` for the gradients.

    References:
        Yu et al., Combinatorial Brain Surgeon, 2022 (arXiv 2203.04466), for single weights and one block.

    Example:
        >>> import jax.numpy as jnp, woodjax as wj
        >>> params = {"a": jnp.ones((1, 3)), "b": jnp.array([[1.0, 0.0], [1.1, 0.0], [-1.5, 0.0]])}
        >>> apply_fn = lambda p, x: x @ p["a"] @ p["b"]
        >>> groups = wj.channel_groups(apply_fn, params, jnp.ones((1, 1)))
        >>> wj.joint_gate_scores(groups, apply_fn, params, jnp.ones((1, 1)))["a"].tolist()  # third offsets first
        [0.0, 2.0, 1.0]
    """
    gated, gates = gate_channels(groups, apply_fn, params, one_example(inputs))
    rows = all_class_gradients(gated, gates, inputs, microbatch_size=microbatch_size)
    places = _greedy(jnp.concatenate([rows[group.name] for group in groups.groups], axis=1))
    return {group.name: places[group.start : group.start + group.size] for group in groups.groups}


@jax.jit
def _greedy(rows: Float[Array, "m channels"]) -> Float[Array, " channels"]:
    alone = 0.5 * jnp.sum(rows**2, axis=0)

    def remove(step: Int[Array, ""], state: tuple[Array, Array]) -> tuple[Array, Array]:
        places, gone = state
        added = alone + linalg.contract("mc,m->c", rows, gone)
        following = jnp.argmin(jnp.where(jnp.isposinf(places), added, jnp.inf))
        return places.at[following].set(step.astype(places.dtype)), gone + rows[:, following]

    start = jnp.full(rows.shape[1], jnp.inf, alone.dtype), jnp.zeros(rows.shape[0], rows.dtype)
    places, _ = lax.fori_loop(0, rows.shape[1], remove, start)
    return jnp.where(jnp.isfinite(alone).all(), places, jnp.nan)
