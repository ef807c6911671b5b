"""Micro-batches of examples that are split over devices: each device takes from its own."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Int, Shaped

from woodjax.placement.mesh import Placement, batch_sharding
from woodjax.typing import PyTree


@dataclass(frozen=True)
class Microbatches:
    """Rows in micro-batches of one size. On one device the last may repeat rows of the one before. Static."""

    size: int  # rows
    at_once: int  # rows of a micro-batch
    split: int = 1  # devices that the rows are split over, in the order of the rows

    @classmethod
    def of(cls, size: int, at_once: int, placement: Placement | None) -> "Microbatches":
        """For rows that lie as a placement says.

        Args:
            size: Rows.
            at_once: Rows of a micro-batch, as asked; on several devices at most these, the same on each, and dividing
                theirs.
            placement: Where they lie; None on one device.

        Returns:
            How they are cut.

        Raises:
            ValueError: Rows that cannot be split evenly.
        """
        split = 1 if placement is None else placement.size(placement.batch)
        if size % split:
            raise ValueError(
                f"{size} rows cannot be split evenly over {split} devices: pass a multiple of {split} rows, leaving "
                "some examples out."
            )
        if split == 1:
            return cls(size, min(at_once, size))
        local, wanted = size // split, max(at_once // split, 1)
        return cls(size, split * max(k for k in range(1, min(wanted, local) + 1) if local % k == 0), split)

    @property
    def starts(self) -> range:
        """The first row of every micro-batch, among those of one device times their number."""
        return range(0, self.size, self.at_once)

    def take(self, rows: PyTree, start: Int[Array, ""] | int) -> tuple[PyTree, Int[Array, " k"], Bool[Array, " k"]]:
        """One micro-batch.

        Args:
            rows: Leaves `[size, ...]`.
            start: One of `starts`.

        Returns:
            Leaves `[at_once, ...]`, the numbers of its rows, and which of them were not seen before.
        """
        first = self._first(start)
        starts = jnp.arange(self.split) * (self.size // self.split) + first
        numbers = (starts[:, None] + jnp.arange(self.at_once // self.split)).reshape(-1)
        fresh = jnp.tile(first + jnp.arange(self.at_once // self.split) >= start // self.split, self.split)
        return jax.tree.map(lambda x: self._slice(x, first), rows), numbers, fresh

    def put(self, result: Shaped[Array, "size *rest"], part: Shaped[Array, "k *rest"], start: Any) -> Array:
        """Write what was computed for a micro-batch where its rows are.

        Args:
            result: Of all rows.
            part: Of a micro-batch.
            start: One of `starts`.

        Returns:
            The new result.
        """
        if self.split == 1:
            return lax.dynamic_update_slice_in_dim(result, part, self._first(start), 0)
        view, some = self._by_device(result), self._by_device(part)
        return lax.dynamic_update_slice_in_dim(view, some, self._first(start), 1).reshape(result.shape)

    def start_of(self, numbers: Int[Array, " k"]) -> Int[Array, ""]:
        """The start of the micro-batch whose rows have these numbers."""
        return numbers[0] * self.split

    def in_order(self, rows: Shaped[Array, "size *rest"]) -> Shaped[Array, "size *rest"]:
        """Rows that were appended a micro-batch after another, in the order of the examples."""
        if self.split == 1:
            return rows
        by_batch = rows.reshape(len(self.starts), self.split, -1, *rows.shape[1:])
        return jnp.swapaxes(by_batch, 0, 1).reshape(rows.shape)

    def _first(self, start: Int[Array, ""] | int) -> Array:
        return jnp.minimum(start // self.split, (self.size - self.at_once) // self.split)

    def _slice(self, x: Array, first: Array) -> Array:
        if self.split == 1:
            return lax.dynamic_slice_in_dim(x, first, self.at_once)
        some = lax.dynamic_slice_in_dim(self._by_device(x), first, self.at_once // self.split, axis=1)
        return some.reshape(self.at_once, *x.shape[1:])

    def _by_device(self, x: Array) -> Array:
        return x.reshape(self.split, -1, *x.shape[1:])


def as_gradients(gradients: PyTree, placement: Placement | None) -> PyTree:
    """Gradients where the parameters are and the rows, inside `jit`.

    Args:
        gradients: Leaves `[k, *leaf.shape]`, or with further axes before the leaf's own.
        placement: Of parameters and batch; None leaves them.

    Returns:
        The same, placed.
    """
    if placement is None:
        return gradients
    leaves, treedef = jax.tree.flatten(gradients)
    placed = []
    for leaf, place in zip(leaves, placement.leaves, strict=True):
        further = (None,) * (leaf.ndim - 1 - len(place.dims))
        rows, *dims = [*place.gradient_spec, *(None,) * (1 + len(place.dims) - len(place.gradient_spec))]
        sharding = NamedSharding(placement.mesh, PartitionSpec(rows, *further, *dims))
        placed.append(lax.with_sharding_constraint(leaf, sharding))
    return jax.tree.unflatten(treedef, placed)


def as_params(tree: PyTree, placement: Placement | None) -> PyTree:
    """A params-tree where the parameters are, inside `jit`.

    Args:
        tree: A params-tree.
        placement: Of the parameters; None leaves it.

    Returns:
        The same, placed.
    """
    if placement is None:
        return tree
    leaves, treedef = jax.tree.flatten(tree)
    pairs = zip(leaves, placement.leaves, strict=True)
    placed = [lax.with_sharding_constraint(x, NamedSharding(placement.mesh, place.spec)) for x, place in pairs]
    return jax.tree.unflatten(treedef, placed)


def all_true(params: PyTree, placement: Placement | None) -> PyTree:
    """Masks that keep everything, where the parameters are.

    Args:
        params: A params-tree.
        placement: Of the parameters; None on one device.

    Returns:
        A params-tree of bool.
    """
    if placement is None:
        return jax.tree.map(lambda w: jnp.ones(jnp.shape(w), bool), params)
    return _all_true(params, placement)


@partial(jax.jit, static_argnums=1)
def _all_true(params: PyTree, placement: Placement) -> PyTree:
    return as_params(jax.tree.map(lambda w: jnp.ones(w.shape, bool), params), placement)


def place_rows(rows: PyTree, placement: Placement | None) -> PyTree:
    """Something that each example has, such as a key, where the examples are.

    Args:
        rows: Leaves `[n, ...]`.
        placement: Of the batch; None leaves them.

    Returns:
        The same, placed.
    """
    return rows if placement is None else jax.device_put(rows, batch_sharding(placement))


def placed_like(tree: PyTree, like: PyTree) -> PyTree:
    """Arrays on a mesh with the very shardings of others, so that what was compiled for those takes them.

    A compiled program names fewer axes than it was given: none of one device, and none at the end of a spec.

    Args:
        tree: Arrays.
        like: Of the same structure.

    Returns:
        The same; as they are where the others are on no mesh, and inside `jit`.
    """

    def place(x: Any, other: Any) -> Any:
        traced = isinstance(x, jax.core.Tracer) or isinstance(other, jax.core.Tracer)
        sharding = None if traced else getattr(other, "sharding", None)
        return jax.device_put(x, sharding) if isinstance(sharding, NamedSharding) else x

    return jax.tree.map(place, tree, like)


def take_examples(batch: PyTree, indices: Int[Array, " k"], placement: Placement | None) -> PyTree:
    """Some examples of a batch, split over devices as the batch is. Examples travel, parameters do not.

    Args:
        batch: Leaves `[n, ...]`.
        indices: Of the examples, as many as the devices divide.
        placement: Of the batch; None on one device.

    Returns:
        Leaves `[k, ...]`.
    """
    if placement is None:
        return jax.tree.map(lambda x: jnp.asarray(x)[indices], batch)
    return _take(batch, indices, placement)


@partial(jax.jit, static_argnums=2)
def _take(batch: PyTree, indices: Array, placement: Placement) -> PyTree:
    sharding = batch_sharding(placement)
    return jax.tree.map(lambda x: lax.with_sharding_constraint(x[indices], sharding), batch)
