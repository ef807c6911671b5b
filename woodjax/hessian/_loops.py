"""Micro-batches, and loops over them."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from woodjax.loss_rows import batch_size
from woodjax.typing import Batch, Params

State = TypeVar("State")


def at_once(batch: Batch, microbatch_size: int | None) -> int:
    """Examples in a micro-batch.

    Args:
        batch: Examples `[n, ...]`.
        microbatch_size: What was asked for; None for all.

    Returns:
        A number from 1 to `n`.

    Raises:
        ValueError: `microbatch_size < 1`; as `batch_size`.
    """
    n = batch_size(batch)
    if microbatch_size is not None and microbatch_size < 1:
        raise ValueError(f"microbatch_size is {microbatch_size}: pass at least 1, or None.")
    return n if microbatch_size is None else min(microbatch_size, n)


def micro_batch(
    batch: Batch, start: Int[Array, ""] | int, size: int
) -> tuple[Batch, Int[Array, " size"], Bool[Array, " size"]]:
    """Examples from `start` on; the last micro-batch starts earlier, to end with the batch.

    Args:
        batch: Examples `[n, ...]`.
        start: First example wanted.
        size: Examples in a micro-batch.

    Returns:
        The examples, their numbers in the batch, and which of them are at or after `start`.
    """
    first = jnp.minimum(start, batch_size(batch) - size)
    chunk = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, first, size), batch)
    numbers = first + jnp.arange(size)
    return chunk, numbers, numbers >= start


def zeros(params: Params) -> Params:
    """Zeros like the parameters.

    Args:
        params: A params-tree.

    Returns:
        A params-tree, at least float32.
    """
    return jax.tree.map(lambda w: jnp.zeros(jnp.shape(w), jnp.promote_types(jnp.result_type(w), jnp.float32)), params)


def loop(
    step: Callable[[State, Any], State],
    state: State,
    count: int,
    arrays: Any,
    done: Callable[[State], Bool[Array, ""]] | None = None,
) -> State:
    """Take steps on the host where that can be: XLA's CPU backend runs gradients of convolutions slowly in a loop.

    Args:
        step: `step(state, number) -> state`.
        state: Where to begin.
        count: Number of steps.
        arrays: What the steps read; with the state it says whether this is traced.
        done: Whether to stop before `count`; None for never. On the host each question waits for the device.

    Returns:
        The last state.
    """
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((arrays, state))):
        if done is None:
            return lax.fori_loop(0, count, lambda i, s: step(s, i), state)
        return lax.while_loop(
            lambda carry: (carry[0] < count) & ~done(carry[1]),
            lambda carry: (carry[0] + 1, step(carry[1], carry[0])),
            (jnp.int32(0), state),
        )[1]
    for i in range(count):
        state = step(state, i)
        if done is not None and done(state):
            break
    return state
