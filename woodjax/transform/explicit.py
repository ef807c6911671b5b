"""Pruning under a mesh with explicit axes: ranking and factoring reshape across shards, which only XLA can place."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
from jax.sharding import AxisType, NamedSharding

Result = TypeVar("Result")


def automatic(function: Callable[..., Result], like: Result) -> Callable[..., Result]:
    """A function that runs with automatic axes, and gives results placed as something that is there.

    Args:
        function: Every array that it uses comes as an argument.
        like: Arrays of the structure and placement of the result.

    Returns:
        The function itself where no axis of the mesh is explicit.
    """
    kinds = [jax.typeof(x).sharding for x in jax.tree.leaves(like)]
    meshes = [kind.mesh for kind in kinds if AxisType.Explicit in kind.mesh.axis_types]
    if not meshes:
        return function
    placed: Any = jax.tree.map(lambda x: NamedSharding(meshes[0], jax.typeof(x).sharding.spec), like)
    return cast(Callable[..., Result], jax.sharding.auto_axes(function, out_sharding=placed))
