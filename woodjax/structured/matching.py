"""Which leaf of a tree is which leaf of the variables: by the end of its path."""

import math
from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from woodjax.structured.implants import is_implanted
from woodjax.tree import path_name
from woodjax.typing import PyTree


class Described(Protocol):
    """A description of a leaf."""

    @property
    def path(self) -> str:
        """Names joined by `/`."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array."""
        ...


Description = TypeVar("Description", bound=Described)


def match(described: Sequence[Description], tree: PyTree) -> list[tuple[Description | None, str, Any]]:
    """Find what describes each leaf of a tree.

    A leaf is the described one whose path ends its own, or ends its own after the name of a collection is taken
    off, such as `params`. So parameters are found in variables, and moments in the state of an optimizer.

    Args:
        described: Descriptions with the paths and shapes of the variables.
        tree: Any tree.

    Returns:
        For each leaf its description, or None, its path and the leaf itself.

    Raises:
        ValueError: A leaf of that path with another shape, unless it has one element or none.
    """
    known: dict[str, Description | None] = {leaf.path: leaf for leaf in described}
    paths = set(known)
    for leaf in described:
        _, _, short = leaf.path.partition("/")
        if short and short not in paths:
            known[short] = None if short in known else leaf  # two collections with one name: neither
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_implanted):
        name = path_name(path)
        parts = name.split("/")
        ends = ("/".join(parts[i:]) for i in range(len(parts)))
        one = next((known[end] for end in ends if known.get(end) is not None), None)
        if one is not None and np.shape(leaf) != tuple(one.shape):
            if getattr(leaf, "size", 0) > 1:
                raise ValueError(
                    f"Leaf '{name}' has shape {np.shape(leaf)}, expected {tuple(one.shape)} of the variables' "
                    f"'{one.path}': pass the tree that belongs to them; a factored optimizer state must be made anew."
                )
            one = None
        found.append((one, name, leaf))
    return found


def matched(described: Sequence[Description], tree: PyTree) -> tuple[list[Description], list[Any]]:
    """The leaves of a tree that are described.

    Args:
        described: Descriptions with the paths and shapes of the variables.
        tree: Any tree.

    Returns:
        The descriptions and the leaves, in the order of the tree.

    Raises:
        ValueError: As `match`; a tree without any of the leaves.
    """
    pairs = [(one, leaf) for one, _, leaf in match(described, tree) if one is not None]
    if not pairs:
        raise ValueError(
            f"No leaf of the tree has a path of the variables, {[one.path for one in described]}: pass a tree with "
            "the same names."
        )
    descriptions, leaves = zip(*pairs, strict=True)
    return list(descriptions), list(leaves)


def match_some(described: Sequence[Description], tree: PyTree) -> list[tuple[Description | None, str, Any]]:
    """As `match`, of a tree that belongs to the variables.

    Args:
        described: Descriptions with the paths and shapes of the variables.
        tree: Any tree.

    Returns:
        As `match`.

    Raises:
        ValueError: As `match`; a tree with arrays of numbers or bools, of more than one element, of which none is
            described.
    """
    pairs = match(described, tree)
    others = [name for _, name, leaf in pairs if math.prod(np.shape(leaf)) > 1 and not _is_index(leaf)]
    if others and all(one is None for one, _, _ in pairs):
        raise ValueError(
            f"No leaf of the tree is of the network: its paths are {others[:4]}, those of the variables "
            f"{[one.path for one in described][:4]}. Pass a tree with the same names and shapes."
        )
    return pairs


def _is_index(leaf: Any) -> bool:
    """Counts and keys of random numbers, which an optimizer without moments may have alone."""
    dtype = getattr(leaf, "dtype", None)
    return dtype is None or not (jnp.issubdtype(dtype, jnp.inexact) or jnp.issubdtype(dtype, jnp.bool_))
