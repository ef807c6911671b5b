"""What a params-tree must be, and masks on it."""

import jax
import jax.numpy as jnp

from woodjax.door import checked
from woodjax.tree.names import path_name
from woodjax.typing import Masks, PyTree


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


@checked
def apply_masks(tree: PyTree, masks: Masks) -> PyTree:
    """Set pruned coordinates to zero: `where(mask, x, 0)`, also where `x` is not finite.

    Args:
        tree: A params-tree, or gradients with leading axes.
        masks: A params-tree of bool.

    Returns:
        A tree like `tree`.

    Raises:
        ValueError: The two trees differ in structure, a mask is not bool, or its shape is not that of the last
            axes of its leaf.

    Cost:
        One pass over the tree.

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
