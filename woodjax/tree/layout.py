"""How a params-tree becomes blocks, and comes back.

A `Layout` is a static, hashable description made from shapes alone. It says which leaves are
prunable and cuts each of them, flattened in row-major order, into blocks of `block_size`
coordinates. All blocks stand in one array `[nb, b]`; the last block of a leaf is padded with
zeros that never come back. Blocks do not cross leaves, nor the layers of a leaf that
`nn.scan` or `nnx.vmap` stacked along `batch_axes`. `block_size=None` makes one block of the
whole network, without padding.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Shaped

from woodjax.door import checked
from woodjax.tree.checks import check_floating
from woodjax.tree.names import is_kernel, path_name
from woodjax.typing import PyTree, Select


class LeafSpec(NamedTuple):
    """What the layout knows of one leaf."""

    path: str  # names joined by "/"
    shape: tuple[int, ...]
    selected: bool  # is it prunable?
    rows: int  # layers stacked along the batch axes (1 if there are none)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def row_size(self) -> int:
        """Number of elements of one layer."""
        return self.size // self.rows


@dataclass(frozen=True)
class Layout:
    """Static map between a params-tree and blocks `[nb, b]`. Made by `make_layout`."""

    treedef: Any
    leaves: tuple[LeafSpec, ...]
    block_size: int  # b, not larger than the largest layer
    whole: bool  # one block over all leaves

    @property
    def selected(self) -> tuple[LeafSpec, ...]:
        """The prunable leaves."""
        return tuple(leaf for leaf in self.leaves if leaf.selected)

    @property
    def num_weights(self) -> int:
        """Number of prunable weights `d`."""
        return sum(leaf.size for leaf in self.selected)

    @property
    def num_blocks(self) -> int:
        """Number of blocks `nb`."""
        if self.whole:
            return 1
        return sum(leaf.rows * -(-leaf.row_size // self.block_size) for leaf in self.selected)

    @property
    def view(self) -> "Layout":
        """What a device sees of it: all, as all is on it."""
        return self

    @property
    def mesh_axes(self) -> tuple[str, ...]:
        """Mesh axes over which blocks and columns are split: none."""
        return ()

    @property
    def column_axes(self) -> tuple[str, ...]:
        """Mesh axes over which the columns of one block are split: none."""
        return ()

    def spread(self, axis: int) -> PartitionSpec:
        """Spec of an array that is split over all devices along one axis: not split.

        Args:
            axis: The axis.

        Returns:
            The spec.
        """
        del axis
        return PartitionSpec()

    def run(self, function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
        """`function` on every device, of what it holds of the arguments: as it is.

        Args:
            function: Of arrays or trees of them.
            in_specs: Where its arguments lie, as for `jax.shard_map`.
            out_specs: Where its results lie.

        Returns:
            The function of whole arrays.
        """
        del in_specs, out_specs
        return function

    def zeros(self, shape: tuple[int, ...], dtype: DTypeLike, axis: int) -> Shaped[Array, "..."]:
        """Zeros that are split over all devices along one axis: not split.

        Args:
            shape: Of the array.
            dtype: Of its numbers.
            axis: The axis.

        Returns:
            The array.
        """
        del axis
        return jnp.zeros(shape, dtype)

    def to_blocks(self, tree: PyTree) -> Shaped[Array, "*lead nb b"]:
        """Cut the selected leaves of a tree into blocks.

        Args:
            tree: Leaves `[*lead, *leaf.shape]`, the same `lead` for all.

        Returns:
            Blocks `[*lead, nb, b]`. Floats of fewer than 32 bits become float32.

        Raises:
            ValueError: Another tree structure, or a leaf of another shape.
        """
        arrays = [jnp.asarray(leaf) for leaf in self.flatten(tree)]
        lead = self.lead(tree)
        blocks = []
        for spec, array in zip(self.leaves, arrays, strict=True):
            if not spec.selected:
                continue
            if jnp.issubdtype(array.dtype, jnp.floating):
                array = array.astype(jnp.promote_types(array.dtype, jnp.float32))
            if self.whole:
                blocks.append(array.reshape(*lead, -1))
                continue
            rows = array.reshape(*lead, spec.rows, spec.row_size)
            padding = [(0, 0)] * (rows.ndim - 1) + [(0, -spec.row_size % self.block_size)]
            blocks.append(jnp.pad(rows, padding).reshape(*lead, -1, self.block_size))
        if self.whole:
            return jnp.concatenate(blocks, axis=-1)[..., None, :]
        return jnp.concatenate(blocks, axis=-2)

    def placed(self, shapes: PyTree, specs: PyTree) -> PyTree:
        """Shapes of arrays with what is known of where they lie: nothing.

        Args:
            shapes: A tree of `ShapeDtypeStruct`.
            specs: A tree like it, of specs.

        Returns:
            The tree of shapes.
        """
        del specs
        return shapes

    def tree_specs(self) -> PyTree:
        """Specs of a params-tree: not split."""
        return PartitionSpec()

    def gradient_specs(self) -> PyTree:
        """Specs of gradients: not split."""
        return PartitionSpec()

    def window(self, gradients: PyTree, start: Array, width: int) -> Float[Array, "m w"]:
        """Some columns of gradients, of the whole network as one block.

        Args:
            gradients: Leaves `[m, *leaf.shape]`.
            start: The first column.
            width: How many.

        Returns:
            The columns.
        """
        return jax.lax.dynamic_slice_in_dim(self.to_blocks(gradients)[:, 0], start, width, axis=1)

    def to_tree(self, blocks: Shaped[Array, "nb b"], fill: float | bool) -> PyTree:
        """Put blocks back into a tree; `fill` stands on leaves that are not selected.

        Args:
            blocks: One value for every coordinate, `[nb, b]`; padding is dropped.
            fill: Value of leaves that are not prunable.

        Returns:
            A params-tree with the dtype of `blocks`.
        """
        flat = blocks.reshape(-1)
        leaves, start = [], 0
        for spec in self.leaves:
            if not spec.selected:
                leaves.append(jnp.full(spec.shape, fill, blocks.dtype))
                continue
            padded = spec.row_size
            if not self.whole:
                padded += -spec.row_size % self.block_size
            rows = flat[start : start + spec.rows * padded].reshape(spec.rows, padded)
            leaves.append(rows[:, : spec.row_size].reshape(spec.shape))
            start += spec.rows * padded
        return jax.tree.unflatten(self.treedef, leaves)

    def positions(self, number: int, indices: Int[Array, "..."]) -> Int[Array, "..."]:
        """Where coordinates of a leaf stand among the blocks.

        Args:
            number: Of the leaf in `self.leaves`; a selected one.
            indices: Into the leaf, flattened in row-major order.

        Returns:
            Indices into the blocks, flattened.
        """
        padding = [0 if self.whole else -spec.row_size % self.block_size for spec in self.leaves]
        earlier = zip(self.leaves[:number], padding, strict=False)
        start = sum(spec.size + spec.rows * extra for spec, extra in earlier if spec.selected)
        return start + indices + indices // self.leaves[number].row_size * padding[number]

    def lead(self, tree: PyTree) -> tuple[int, ...]:
        """Sizes of the axes before a leaf's own.

        Args:
            tree: Leaves `[*lead, *leaf.shape]`, the same `lead` for all.

        Returns:
            `lead`.

        Raises:
            ValueError: Another tree structure, or a leaf of another shape.
        """
        shapes = [jnp.shape(leaf) for leaf in self.flatten(tree)]
        lead = shapes[0][: len(shapes[0]) - len(self.leaves[0].shape)]
        for spec, shape in zip(self.leaves, shapes, strict=True):
            if shape != (*lead, *spec.shape):
                raise ValueError(
                    f"Leaf '{spec.path}' has shape {shape}, expected {(*lead, *spec.shape)}: "
                    "pass a tree with the shapes that the layout was made from."
                )
        return lead

    def flatten(self, tree: PyTree) -> list[Any]:
        """Flatten a tree that must have the layout's structure.

        Args:
            tree: Any leaves.

        Returns:
            The leaves, in the order of `self.leaves`.

        Raises:
            ValueError: Another tree structure.
        """
        leaves, treedef = jax.tree.flatten(tree)
        if treedef != self.treedef:
            raise ValueError(
                f"Tree structure {treedef} differs from {self.treedef}, which the layout was made "
                "from: pass a tree with the structure of the parameters."
            )
        return leaves


@checked
def make_layout(
    params: PyTree,
    *,
    block_size: int | None = None,
    select: Select = is_kernel,
    batch_axes: int = 0,
) -> Layout:
    """Describe how the prunable leaves of `params` are cut into blocks.

    Args:
        params: Arrays or `jax.ShapeDtypeStruct`s; only shapes and dtypes are read.
        block_size: Coordinates in a block `b`, clipped to the largest layer; None makes the
            whole network one block.
        select: `select(path, leaf) -> bool`, asked about each leaf without its batch axes.
        batch_axes: Number of leading axes that stack layers (`nn.scan`, `nnx.vmap`); every
            selected leaf must have them.

    Returns:
        A static, hashable layout.

    Raises:
        ValueError: No leaf selected; an empty or non-floating leaf; `block_size < 1`;
            `batch_axes` out of range.

    Cost:
        None on the device: computed from shapes.

    Example:
        >>> import jax.numpy as jnp, woodjax as wj
        >>> layout = wj.make_layout({"w": jnp.ones((3, 2)), "b": jnp.ones(2)}, block_size=4)
        >>> layout.num_weights, layout.num_blocks
        (6, 2)
    """
    if block_size is not None and block_size < 1:
        raise ValueError(f"block_size is {block_size}: pass at least 1, or None for the whole network.")
    check_floating(params)
    paths, treedef = jax.tree_util.tree_flatten_with_path(params)
    specs = tuple(_leaf_spec(path_name(path), leaf, select, batch_axes) for path, leaf in paths)
    selected = [spec for spec in specs if spec.selected]
    if not selected:
        raise ValueError(
            f"No leaf is selected for pruning among {[spec.path for spec in specs]}: the default takes "
            "leaves with at least two axes, pass select= to choose others."
        )
    largest = max(spec.row_size for spec in selected)
    total = sum(spec.size for spec in selected)
    size = total if block_size is None else min(block_size, largest)
    return Layout(treedef, specs, size, block_size is None)


def _leaf_spec(path: str, leaf: Any, select: Select, batch_axes: int) -> LeafSpec:
    shape, dtype = tuple(leaf.shape), leaf.dtype
    if not batch_axes >= 0:
        raise ValueError(f"batch_axes is {batch_axes}: pass 0 or a positive number.")
    chosen = bool(select(path, jax.ShapeDtypeStruct(shape[batch_axes:], dtype)))
    if chosen and math.prod(shape) == 0:
        raise ValueError(f"Leaf '{path}' is empty, shape {shape}: leave it out by select=.")
    if chosen and len(shape) < batch_axes:
        raise ValueError(f"Leaf '{path}' has shape {shape} but batch_axes={batch_axes}: leave it out by select=.")
    return LeafSpec(path, shape, chosen, math.prod(shape[:batch_axes]) if chosen else 1)
