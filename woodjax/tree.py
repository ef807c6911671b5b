"""How a params-tree becomes blocks, and comes back.

A `Layout` is a static, hashable description made from shapes alone. It says which leaves are
prunable and cuts each of them, flattened in row-major order, into blocks of `block_size`
coordinates. All blocks stand in one array `[nb, b]`; the last block of a leaf is padded with
zeros that never come back. Blocks do not cross leaves, nor the layers of a leaf that
`nn.scan` or `nnx.vmap` stacked along `batch_axes`. `block_size=None` makes one block of the
whole network, without padding.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, PyTree, Shaped

from woodjax.typing import Select


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


def path_name(path: Sequence[Any]) -> str:
    """Write a JAX key path as names joined by `/`, without the `.value` of Flax variables.

    Args:
        path: Keys, as `jax.tree_util.tree_flatten_with_path` gives them.

    Returns:
        The name that errors, mappings and files use.

    Example:
        >>> import jax, woodjax
        >>> [(path, _)], _ = jax.tree_util.tree_flatten_with_path({"fc1": {"kernel": 0.0}})
        >>> woodjax.path_name(path)
        'fc1/kernel'
    """
    names = [jax.tree_util.keystr((key,), simple=True) for key in path]
    if len(names) > 1 and names[-1] == "value":
        names.pop()
    return "/".join(names)


def is_kernel(path: str, leaf: jax.ShapeDtypeStruct) -> bool:
    """Select leaves of two or more axes: kernels, not biases or normalisation parameters.

    Embeddings and class tokens have two axes as well; exclude them by a `select` of your own.

    Args:
        path: Name of the leaf; not looked at.
        leaf: Its shape, without batch axes.

    Returns:
        Whether the leaf is prunable.

    Example:
        >>> import jax, woodjax
        >>> woodjax.is_kernel("fc1/kernel", jax.ShapeDtypeStruct((3, 4), "float32"))
        True
    """
    del path
    return len(leaf.shape) >= 2


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
        """Spec of an array that is split over all devices along one axis: not split."""
        del axis
        return PartitionSpec()

    def run(self, function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
        """`function` on every device, of what it holds of the arguments: as it is."""
        del in_specs, out_specs
        return function

    def zeros(self, shape: tuple[int, ...], dtype: DTypeLike, axis: int) -> Shaped[Array, "..."]:
        """Zeros that are split over all devices along one axis: not split."""
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
        lead = arrays[0].shape[: arrays[0].ndim - len(self.leaves[0].shape)]
        blocks = []
        for spec, array in zip(self.leaves, arrays, strict=True):
            if array.shape != (*lead, *spec.shape):
                raise ValueError(
                    f"Leaf '{spec.path}' has shape {array.shape}, expected {(*lead, *spec.shape)}: "
                    "pass a tree with the shapes that the layout was made from."
                )
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
        """Shapes of arrays with what is known of where they lie: nothing."""
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


def wide_dtype(tree: PyTree) -> jnp.dtype:
    """The dtype in which the leaves of a tree are computed with: that of the widest, at least float32.

    Args:
        tree: Arrays, shapes of them, or an object with arrays such as a stream.

    Returns:
        A floating dtype.
    """
    floating = [x for x in map(jnp.result_type, jax.tree.leaves(tree)) if jnp.issubdtype(x, jnp.floating)]
    return jnp.result_type(jnp.float32, *floating)


def check_floating(params: PyTree) -> None:
    """Raise unless every leaf is a floating array, or the shape of one.

    Args:
        params: A params-tree.

    Raises:
        ValueError: Naming the first leaf that is not.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        dtype = getattr(leaf, "dtype", type(leaf).__name__)
        if not hasattr(leaf, "dtype") or not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(
                f"Leaf '{path_name(path)}' is {dtype}: only floating arrays have gradients. Split it off first, for "
                "example by nnx.split(model, nnx.Param, ...) or eqx.partition(model, eqx.is_inexact_array)."
            )


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


def check_like(tree: PyTree, like: PyTree, name: str) -> None:
    """Raise unless `tree` has the structure and the leaf shapes of `like`.

    Raises:
        ValueError: Naming the argument `name` and the first leaf that differs.
    """
    if jax.tree.structure(tree) != jax.tree.structure(like):
        raise ValueError(
            f"{name} has the structure {jax.tree.structure(tree)}, expected {jax.tree.structure(like)}: "
            "pass a tree shaped like the parameters."
        )
    found = jax.tree_util.tree_leaves_with_path(tree)
    for (path, leaf), other in zip(found, jax.tree.leaves(like), strict=True):
        if jnp.shape(leaf) != jnp.shape(other):
            raise ValueError(
                f"{name}: leaf '{path_name(path)}' has shape {jnp.shape(leaf)}, expected {jnp.shape(other)}."
            )


def check_bool(masks: PyTree, name: str) -> None:
    """Raise unless every leaf is bool.

    Args:
        masks: A params-tree of masks.
        name: What to call it in the message.

    Raises:
        ValueError: Naming the first leaf that is not.
    """
    for path, mask in jax.tree_util.tree_leaves_with_path(masks):
        if not jnp.issubdtype(jnp.result_type(mask), jnp.bool_):
            raise ValueError(
                f"{name}: leaf '{path_name(path)}' is {jnp.result_type(mask)}; masks are bool, True = survives. "
                "Make them by make_masks, or by a comparison."
            )


def apply_masks(tree: PyTree[Float[Array, "..."]], masks: PyTree[Bool[Array, "..."]]) -> PyTree:
    """Set pruned coordinates to zero: `where(mask, x, 0)`, also where `x` is not finite.

    Args:
        tree: A params-tree, or gradients with leading axes.
        masks: A params-tree of bool.

    Returns:
        A tree like `tree`.

    Raises:
        ValueError: The two trees differ in structure, a mask is not bool, or its shape is not that of the last
            axes of its leaf.

    Example:
        >>> import jax.numpy as jnp, woodjax as wj
        >>> wj.apply_masks({"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([True, False])})["w"].tolist()
        [1.0, 0.0]
    """
    if jax.tree.structure(tree) != jax.tree.structure(masks):
        raise ValueError("masks have another tree structure than the tree they are applied to.")
    check_bool(masks, "masks")
    for (path, x), mask in zip(jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(masks), strict=True):
        if jnp.shape(x)[jnp.ndim(x) - jnp.ndim(mask) :] != jnp.shape(mask) or jnp.ndim(x) < jnp.ndim(mask):
            raise ValueError(
                f"The mask of leaf '{path_name(path)}' has shape {jnp.shape(mask)}, the leaf {jnp.shape(x)}."
            )
    return jax.tree.map(lambda x, mask: jnp.where(mask, x, 0), tree, masks)
