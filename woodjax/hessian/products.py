"""Products of the Hessian with a vector."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array

from woodjax.door import checked
from woodjax.hessian._loops import at_once, loop, micro_batch, zeros
from woodjax.loss_rows import LossRow, batch_size
from woodjax.placement import on_any_axes
from woodjax.tree import check_floating, check_like
from woodjax.typing import Batch, LossFn, Params


@checked
@on_any_axes
def hvp(loss_fn: LossFn, params: Params, batch: Batch, vector: Params, *, microbatch_size: int | None = None) -> Params:
    """Hessian-vector product `Hv` of the mean loss: the forward derivative of its gradient.

    Args:
        loss_fn: `loss_fn(params, example) -> scalar` for one example, as in `per_example_gradients`.
        params: A params-tree of floating leaves.
        batch: Examples stacked along the first axis of every leaf, `[n, ...]`.
        vector: A params-tree `v`. Leaves that are not prunable count: put zeros there to leave them out.
        microbatch_size: Examples computed at once; None for all.

    Returns:
        A params-tree, at least float32.

    Raises:
        ValueError: Trees that differ; batch leaves of different or zero length; `microbatch_size < 1`.

    Cost:
        About two forward and two backward passes an example; memory as for one gradient, twice.

    References:
        Pearlmutter, Fast exact multiplication by the Hessian, Neural Computation 6, 1994.

    Example:
        >>> import jax.numpy as jnp, woodjax as wj
        >>> loss = lambda w, x: (x * w**2).sum()  # H = diag(2 · mean x)
        >>> wj.hvp(loss, jnp.ones(2), jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([1.0, -1.0])).tolist()
        [4.0, -6.0]
    """
    check_floating(params)
    check_like(vector, params, "vector")
    row, n, k = LossRow(loss_fn, False), batch_size(batch), at_once(batch, microbatch_size)
    arrays = jax.tree.map(jnp.asarray, (params, batch, vector))
    return loop(lambda s, i: _add_product(s, row, *arrays, i * k, size=k), zeros(params), -(-n // k), arrays)


@partial(jax.jit, static_argnames="size", donate_argnums=0)
def _add_product(
    total: Params, row: LossRow, params: Params, batch: Batch, vector: Params, start: int, *, size: int
) -> Params:
    chunk, _, fresh = micro_batch(batch, start, size)

    def part(p: Params) -> Array:
        losses = jax.vmap(row.loss, in_axes=(None, 0))(p, chunk)
        return jnp.sum(jnp.where(fresh, losses, 0)) / batch_size(batch)

    tangent = jax.tree.map(lambda v, w: v.astype(w.dtype), vector, params)
    return jax.tree.map(jnp.add, total, jax.jvp(jax.grad(part), (params,), (tangent,))[1])
