"""On which axes of a mesh the leaves of a network and the examples of a batch lie."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from woodjax.placement.explicit import automatic_mesh
from woodjax.tree import path_name
from woodjax.typing import PyTree

Axes = tuple[str, ...]


class LeafPlace(NamedTuple):
    """Where a leaf lies."""

    dims: tuple[Axes, ...]  # mesh axes along each dimension of the leaf
    rows: Axes  # those along which the rows of its gradients are split

    @property
    def axes(self) -> Axes:
        """Mesh axes along which the leaf is split."""
        return tuple(axis for dim in self.dims for axis in dim)

    @property
    def spec(self) -> PartitionSpec:
        """Of the leaf."""
        return PartitionSpec(*(dim or None for dim in self.dims))

    @property
    def gradient_spec(self) -> PartitionSpec:
        """Of its gradients `[m, *leaf.shape]`."""
        return PartitionSpec(self.rows or None, *(dim or None for dim in self.dims))


@dataclass(frozen=True)
class Placement:
    """Where parameters and examples lie on a mesh. Made by `placement_of`."""

    mesh: Mesh  # with automatic axes
    leaves: tuple[LeafPlace, ...]
    batch: Axes  # mesh axes along which examples are split

    def size(self, axes: Axes) -> int:
        """Number of devices along some axes."""
        return math.prod(self.mesh.shape[axis] for axis in axes)

    def local_shape(self, leaf: int, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of what a device holds of a leaf."""
        return tuple(n // self.size(axes) for n, axes in zip(shape, self.leaves[leaf].dims, strict=True))


def placement_of(params: PyTree, batch: PyTree = None, *, rows: bool = False) -> Placement | None:
    """Read off where arrays lie.

    Args:
        params: A params-tree; or gradients, with `rows`.
        batch: Examples stacked along the first axis, or None.
        rows: `params` are gradients `[m, *leaf.shape]`.

    Returns:
        The placement; None where no leaf lies on a mesh of several devices, and inside `jit`, where it is not known.

    Raises:
        ValueError: Leaves on different meshes, naming one; examples that are split along different axes.
    """
    found = [
        (path_name(path), leaf.sharding)
        for path, leaf in jax.tree_util.tree_leaves_with_path((params, batch))
        if not isinstance(leaf, jax.core.Tracer) and isinstance(getattr(leaf, "sharding", None), NamedSharding)
    ]
    meshes = {automatic_mesh(sharding.mesh): name for name, sharding in found if sharding.mesh.size > 1}
    if not meshes:
        return None
    if len(meshes) > 1:
        some = ", ".join(f"'{name}' on {dict(mesh.shape)}" for mesh, name in list(meshes.items())[:2])
        raise ValueError(f"Leaves lie on different meshes: {some}. Place all of them on one.")
    (mesh,) = meshes
    # What comes out of a compiled program does not name the axes of one device that it is split along.
    examples = {_split(_dims(leaf)[0], mesh) for leaf in jax.tree.leaves(batch) if leaf.ndim}
    if len(examples) > 1:
        raise ValueError(
            f"Examples are split along {sorted(examples)}: place every leaf of the batch by the same axes, as "
            "PartitionSpec('data')."
        )
    split = next(iter(examples), ())
    if rows:
        kinds = [_dims(leaf) for leaf in jax.tree.leaves(params)]
        return Placement(mesh, tuple(LeafPlace(dims[1:], _split(dims[0], mesh)) for dims in kinds), split)
    leaves = [_dims(leaf) for leaf in jax.tree.leaves(params)]
    return Placement(mesh, tuple(_leaf_place(dims, split) for dims in leaves), split)


def batch_sharding(placement: Placement) -> NamedSharding:
    """How examples are split, for arrays of any number of dimensions.

    Args:
        placement: Where the batch lies.

    Returns:
        A sharding along the first axis.
    """
    return NamedSharding(placement.mesh, PartitionSpec(placement.batch or None))


def _leaf_place(dims: tuple[Axes, ...], split: Axes) -> LeafPlace:
    # Of a leaf that is split along an axis of the examples, a device has the gradients of its shard at all of them.
    used = {axis for dim in dims for axis in dim}
    return LeafPlace(dims, tuple(axis for axis in split if axis not in used))


def _split(axes: Axes, mesh: Mesh) -> Axes:
    return tuple(axis for axis in axes if mesh.shape[axis] > 1)


def _dims(leaf: Any) -> tuple[Axes, ...]:
    sharding, ndim = getattr(leaf, "sharding", None), len(leaf.shape)
    if not isinstance(sharding, NamedSharding):
        return ((),) * ndim
    entries = [*sharding.spec, *(None,) * (ndim - len(sharding.spec))]
    return tuple(() if axes is None else (axes,) if isinstance(axes, str) else tuple(axes) for axes in entries)
