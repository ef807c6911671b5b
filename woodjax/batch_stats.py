"""Batch statistics of a network whose weights have changed: averages over data, no weight update."""

from collections.abc import Callable, Iterable
from functools import partial

import jax
import jax.numpy as jnp

from woodjax.door import checked
from woodjax.tree import check_like
from woodjax.typing import Batch, Params, PyTree

StatsFn = Callable[[Params, PyTree, Batch], PyTree]

PROBE = 1e6  # large beside statistics: the momentum is read off to float error


@checked
def reestimate_batch_stats(
    update_fn: StatsFn, params: Params | None, batch_stats: PyTree, batches: Iterable[Batch]
) -> PyTree:
    """Running statistics as the plain average over batches, whatever momentum the layers have.

    A layer in train mode returns `momentum · running + (1 − momentum) · batch`. From `running = 0` that is
    `(1 − momentum) · batch`; the momentum itself shows in the difference that a large `running` makes.

    After pruning, running statistics are those of another network: estimate them anew before eval-mode accuracy,
    and before eval-mode gradients, is looked at. Before training they are those of no data at all: the same function is
    `warm_up_batch_stats` then, one pass over the train split before pruning at initialization.

    Args:
        update_fn: `update_fn(params, batch_stats, inputs) -> batch_stats`: a train-mode forward pass. Pass the same
            function again to reuse what was compiled.
        params: A params-tree.
        batch_stats: Any pytree; what is not floating stays as it is.
        batches: Inputs, all of the same size; large ones: a variance is the mean of those within batches, and
            leaves out how their means differ.

    Returns:
        A pytree like `batch_stats`; as it was where it has no leaves, for a network without batch normalisation.

    Raises:
        ValueError: No batch; batches of different sizes; a leaf that does not move towards the batch (momentum 1, or
            eval mode).

    Cost:
        One forward pass a batch, and one more.

    References:
        Wu & Johnson, Rethinking "Batch" in BatchNorm, 2021 (arXiv 2105.07576), section 3: why the running average is
        not the statistics of one network; What scalable second-order information knows for pruning at initialization,
        2026 (arXiv 2502.11450): the warm-up.

    Example:
        >>> import jax, jax.numpy as jnp, woodjax as wj
        >>> update = lambda params, stats, x: jax.tree.map(lambda r: 0.9 * r + 0.1 * x.mean(), stats)
        >>> batches = [jnp.array([1.0, 3.0]), jnp.array([5.0, 7.0])]
        >>> round(float(wj.reestimate_batch_stats(update, None, {"mean": jnp.zeros(())}, batches)["mean"]), 3)
        4.0
    """
    if not any(map(_moves, jax.tree.leaves(batch_stats))):
        return batch_stats
    total, momentum, count, shapes = None, None, 0, None
    for inputs in batches:
        shapes, first = jax.tree.map(jnp.shape, inputs), shapes
        if first is not None and shapes != first:
            raise ValueError(f"Batches of shapes {first} and {shapes}: pass batches of one size, leave out the rest.")
        if momentum is None:
            momentum = _momentum(params, batch_stats, inputs, update_fn=update_fn)
            check_like(momentum, batch_stats, "what update_fn returned")
            for path, m in jax.tree_util.tree_leaves_with_path(momentum):
                if not jnp.all(m < 1 - 1e-6):
                    raise ValueError(
                        f"Batch statistics '{jax.tree_util.keystr(path)}' do not move towards the batch: update_fn has "
                        "to run the network in train mode, with a momentum below 1."
                    )
        part = _towards(params, batch_stats, inputs, momentum, update_fn=update_fn)
        total = part if total is None else jax.tree.map(jnp.add, total, part)
        count += 1
    if total is None:
        raise ValueError("No batch: pass at least one batch of inputs.")
    return jax.tree.map(lambda old, new: (new / count).astype(old.dtype) if _moves(old) else old, batch_stats, total)


warm_up_batch_stats = reestimate_batch_stats
"""Before training, the same function under the name it has there: one pass over the train split in train mode.

For pruning at initialization: scores taken in eval mode then see the scale of each layer's inputs, and not the mean 0
and variance 1 that batch normalisation starts from. No weight is updated.
"""


def _moves(x: PyTree) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jnp.floating)


def _filled(batch_stats: PyTree, value: float) -> PyTree:
    return jax.tree.map(lambda x: jnp.full_like(x, value) if _moves(x) else x, batch_stats)


@partial(jax.jit, static_argnames="update_fn")
def _momentum(params: Params, batch_stats: PyTree, inputs: Batch, *, update_fn: StatsFn) -> PyTree:
    high, low = (update_fn(params, _filled(batch_stats, value), inputs) for value in (PROBE, 0.0))
    return jax.tree.map(lambda h, s: (h - s) / PROBE if _moves(h) else jnp.zeros(jnp.shape(h)), high, low)


@partial(jax.jit, static_argnames="update_fn")
def _towards(params: Params, batch_stats: PyTree, inputs: Batch, momentum: PyTree, *, update_fn: StatsFn) -> PyTree:
    low = update_fn(params, _filled(batch_stats, 0.0), inputs)
    return jax.tree.map(lambda s, m: s / (1 - m) if _moves(s) else s, low, momentum)
