"""Names of leaves, and which are prunable by default."""

from collections.abc import Sequence
from typing import Any

import jax


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
