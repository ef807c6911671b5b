"""Rows: the examples whose loss, and gradient, count as one."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from woodjax.placement import Microbatches, placement_of
from woodjax.remat import rematerialised
from woodjax.tree import path_name
from woodjax.typing import Batch, LossFn, Params


def batch_size(batch: Batch) -> int:
    """Number of examples in a batch.

    Args:
        batch: Examples stacked along the first axis of every leaf.

    Returns:
        `n`.

    Raises:
        ValueError: No leaf, a leaf without a batch axis, or leaves of different or zero length.
    """
    sizes = {path_name(path): jnp.shape(x)[:1] for path, x in jax.tree_util.tree_leaves_with_path(batch)}
    if len(set(sizes.values())) != 1 or () in sizes.values() or (0,) in sizes.values():
        some = ", ".join(f"'{name}': {size}" for name, size in list(sizes.items())[:3])
        raise ValueError(
            f"Batch leaves have leading sizes {some}{', …' if len(sizes) > 3 else ''}: every leaf must have the same, "
            "non-zero number of examples along its first axis. A batch is one tree of stacked arrays, such as "
            "(inputs, labels), not a list of examples."
        )
    return next(iter(sizes.values()))[0]


def group_examples(batch: Batch, examples_per_gradient: int) -> Batch:
    """Examples in groups of which each makes one row.

    Args:
        batch: Examples `[n, ...]`.
        examples_per_gradient: Examples in a group, `s`.

    Returns:
        The batch itself for `s = 1`, else leaves `[n / s, s, ...]`.

    Raises:
        ValueError: As `batch_size`; `n` not a multiple of `s`.
    """
    size, s = batch_size(batch), examples_per_gradient
    if s < 1 or size % s:
        raise ValueError(
            f"{size} examples cannot be averaged in groups of examples_per_gradient={s}: pass a divisor of {size}."
        )
    if s == 1:
        return batch
    return jax.tree.map(lambda x: jnp.reshape(x, (size // s, s, *x.shape[1:])), batch)


@jax.tree_util.register_pytree_node_class
@dataclass(frozen=True)
class LossRow:
    """Gradient of one example, of the mean over a group, or of a sum over it with signs.

    A signed row is a pair, the group and its signs: `Σ εᵢ lossᵢ / √s` has a gradient whose expected outer product is
    that of the single examples, where the mean's is about `1/s` of it and the mean gradient's.

    Known to `jit` by the function. A loss that is a `jax.tree_util.Partial` is known by its function and the shapes
    of what is bound: other values, such as newer batch statistics, compile nothing anew.
    """

    loss_fn: LossFn
    grouped: bool
    signed: bool = False
    remat: bool = False  # activations are computed again in the backward pass

    def tree_flatten(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Bound arrays, and what is static."""
        kind = (self.grouped, self.signed, self.remat)
        bound = isinstance(self.loss_fn, jax.tree_util.Partial)
        return ((self.loss_fn,), (None, *kind)) if bound else ((), (self.loss_fn, *kind))

    @classmethod
    def tree_unflatten(cls, static: tuple[Any, ...], children: tuple[Any, ...]) -> "LossRow":
        """Put together again."""
        function, *kind = static
        return cls(children[0] if children else function, *kind)

    def loss(self, params: Params, row: Batch) -> Float[Array, ""]:
        """Loss of the row."""
        loss_fn = rematerialised(self.loss_fn) if self.remat else self.loss_fn
        if not self.grouped:
            return loss_fn(params, row)
        if self.signed:
            examples, signs = row
            losses = jax.vmap(loss_fn, in_axes=(None, 0))(params, examples)
            return jnp.dot(signs.astype(losses.dtype), losses) / math.sqrt(signs.size)
        return jnp.mean(jax.vmap(loss_fn, in_axes=(None, 0))(params, row))

    def __call__(self, params: Params, row: Batch) -> Params:
        """Gradient of the row."""
        return jax.grad(self.loss)(params, row)


def example_losses(
    params: Params, examples: Batch, loss_row: LossRow, *, microbatch_size: int | None
) -> Float[Array, " n"]:
    """Loss of every example.

    Args:
        params: A params-tree.
        examples: `[n, ...]`.
        loss_row: The loss.
        microbatch_size: Examples computed at once; None for all.

    Returns:
        `[n]`.

    Raises:
        ValueError: Examples that cannot be split evenly over the devices they lie on.

    Cost:
        `n` forward passes.
    """
    n = batch_size(examples)
    cut = Microbatches.of(n, microbatch_size or n, placement_of(params, examples))
    return _example_losses(params, examples, loss_row, cut=cut)


@partial(jax.jit, static_argnames="cut")
def _example_losses(params: Params, examples: Batch, loss_row: LossRow, *, cut: Microbatches) -> Float[Array, " n"]:
    def losses(some: Batch) -> Float[Array, " k"]:
        return jax.vmap(loss_row.loss, in_axes=(None, 0))(params, some)

    if cut.at_once == cut.size:
        return losses(examples)
    if cut.split == 1:
        return lax.map(lambda x: loss_row.loss(params, x), examples, batch_size=cut.at_once)
    empty = jnp.zeros(cut.size, jax.eval_shape(losses, examples).dtype)

    def step(number: Int[Array, ""], found: Array) -> Array:
        start = number * cut.at_once
        return cut.put(found, losses(cut.take(examples, start)[0]), start)

    return lax.fori_loop(0, len(cut.starts), step, empty)
