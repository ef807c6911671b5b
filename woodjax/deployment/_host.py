"""Leaves by name, as arrays of the host."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped

from woodjax.tree import path_name
from woodjax.typing import PyTree


def named_leaves(tree: PyTree) -> dict[str, Any]:
    """Leaves by path, in the order of the tree.

    Args:
        tree: Any pytree.

    Returns:
        A flat dict; the name of a tree that is one array is `""`.

    Raises:
        ValueError: Two leaves of one name.
    """
    named: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = path_name(path)
        if name in named:
            raise ValueError(f"Two leaves are named '{name}': rename a key of the tree.")
        named[name] = leaf
    return named


def nested(named: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts from names joined by `/`.

    Args:
        named: Leaves by name.

    Returns:
        A nested dict.

    Raises:
        ValueError: A name that is a leaf and a branch.
    """
    tree: dict[str, Any] = {}
    for name, leaf in named.items():
        *branches, last = name.split("/")
        for depth in range(1, len(branches) + 1):
            if "/".join(branches[:depth]) in named:
                raise ValueError(
                    f"'{'/'.join(branches[:depth])}' is a leaf, and '{name}' is below it: rename a key of the tree."
                )
        node = tree
        for branch in branches:
            node = node.setdefault(branch, {})
        node[last] = leaf
    return tree


def to_host(name: str, leaf: Any) -> Shaped[np.ndarray, "..."]:
    """An array of the host, C-contiguous and in the byte order of the machine.

    Args:
        name: What to call it in a message.
        leaf: An array or a number.

    Returns:
        The same values in the same dtype.

    Raises:
        ValueError: A traced array, or a typed random key.
    """
    if isinstance(leaf, jax.core.Tracer):
        raise ValueError(f"Leaf '{name}' is traced: call this outside jit, its result depends on the values.")
    if jnp.issubdtype(getattr(leaf, "dtype", np.float32), jax.dtypes.prng_key):
        raise ValueError(f"Leaf '{name}' is a typed random key: pass jax.random.key_data of it.")
    array = np.asarray(leaf, order="C")
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))
