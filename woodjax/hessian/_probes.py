"""Random signs `z`, and what `z ⊙ Hz` is summed to."""

from functools import partial
from itertools import accumulate
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key

from woodjax.hessian._loops import micro_batch
from woodjax.loss_rows import LossRow, batch_size
from woodjax.typing import Batch, Params

Values = list[Array]


class Probing(NamedTuple):
    """What is estimated, and with which signs; static."""

    summed: tuple[tuple[int, ...] | None, ...]  # axes of each leaf to sum over; None: a leaf without probes
    per_example: bool
    probes_at_once: int
    size: int  # of a micro-batch

    def zeros(self, params: Params) -> Values:
        """Nothing estimated yet, `[probes_at_once, ...]` for each leaf with probes."""
        found = []
        for leaf, axes in zip(jax.tree.leaves(params), self.summed, strict=True):
            if axes is not None:
                kept = [length for axis, length in enumerate(leaf.shape) if axis not in axes]
                found.append(jnp.zeros((self.probes_at_once, *kept), jnp.promote_types(leaf.dtype, jnp.float32)))
        return found


@partial(jax.jit, static_argnames="probing", donate_argnums=0)
def add_probes(
    totals: Values,
    row: LossRow,
    params: Params,
    batch: Batch,
    key: Key[Array, ""],
    first: Int[Array, ""] | int,
    start: Int[Array, ""] | int,
    *,
    probing: Probing,
) -> Values:
    """Add to several probes what the micro-batch from `start` on has in them.

    Args:
        totals: As `Probing.zeros`.
        row: The loss.
        params: A params-tree.
        batch: Examples `[n, ...]`.
        key: PRNG key of all probes.
        first: Number of the first probe.
        start: First example.
        probing: What to estimate.

    Returns:
        `totals`, with the sums of `z ⊙ Hz` added.
    """
    chunk, numbers, fresh = micro_batch(batch, start, probing.size)
    leaves, treedef = jax.tree.flatten(params)
    asked = [number for number, axes in enumerate(probing.summed) if axes is not None]
    points = [leaves[number] for number in asked]
    scale = batch_size(batch)

    def put_back(values: Values) -> Params:
        found = dict(zip(asked, values, strict=True))
        return jax.tree.unflatten(treedef, [found.get(number, leaf) for number, leaf in enumerate(leaves)])

    def mean_part(values: Values) -> Array:
        losses = jax.vmap(row.loss, in_axes=(None, 0))(put_back(values), chunk)
        return jnp.sum(jnp.where(fresh, losses, 0)) / scale

    def of_batch(key: Key[Array, ""]) -> Values:
        z = _signs(jax.random.fold_in(key, start), leaves, asked)
        return _reduce(z, jax.jvp(jax.grad(mean_part), (points,), (z,))[1], totals, probing)

    def of_example(key: Key[Array, ""]) -> Values:
        def one(example: Batch, number: Array, counts: Array) -> Values:
            z = _signs(jax.random.fold_in(key, number), leaves, asked)
            gradient = jax.grad(lambda values: row.loss(put_back(values), example))
            parts = _reduce(z, jax.jvp(gradient, (points,), (z,))[1], totals, probing)
            return [jnp.where(counts, part, 0) / scale for part in parts]

        return [jnp.sum(part, axis=0) for part in jax.vmap(one)(chunk, numbers, fresh)]

    keys = jax.vmap(partial(jax.random.fold_in, key))(first + jnp.arange(probing.probes_at_once))
    found = jax.vmap(of_example if probing.per_example else of_batch)(keys)
    return [total + value for total, value in zip(totals, found, strict=True)]


def _signs(key: Key[Array, ""], leaves: list[Array], asked: list[int]) -> Values:
    # One draw for all leaves: XLA would compile the generator anew for each.
    signs = jax.random.rademacher(key, (sum(leaf.size for leaf in leaves),), jnp.int8)
    starts = list(accumulate((leaf.size for leaf in leaves), initial=0))
    return [signs[starts[i] : starts[i + 1]].reshape(leaves[i].shape).astype(leaves[i].dtype) for i in asked]


def _reduce(z: Values, product: Values, totals: Values, probing: Probing) -> Values:
    axes = [a for a in probing.summed if a is not None]
    return [
        jnp.sum(s.astype(t.dtype) * h.astype(t.dtype), axis=a)
        for s, h, t, a in zip(z, product, totals, axes, strict=True)
    ]
