"""Meshes with explicit axes: what is public takes them and gives them back, and works with automatic ones between."""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding

from woodjax.typing import PyTree

F = TypeVar("F", bound=Callable[..., Any])


def on_any_axes(function: F) -> F:
    """Make a function take arrays on a mesh with explicit axes, and return its arrays there.

    Shards are cut, exchanged and ranked inside `shard_map`, between steps that XLA places: that takes automatic axes.
    No number moves: the same shards are called by another mesh of the same devices.

    Args:
        function: Takes and returns pytrees, outside `jit`.

    Returns:
        The function itself where no axis is explicit, and inside `jit`. Under `jax.set_mesh` of a mesh with explicit
        axes what is made on the way lies there: then none of the arguments need to.
    """

    @wraps(function)
    def run(*args: Any, **keywords: Any) -> Any:
        meshes = {mesh for mesh in map(_explicit_mesh, jax.tree.leaves((args, keywords))) if mesh is not None}
        if not meshes:
            meshes = {mesh for mesh in (_context_mesh(),) if mesh is not None}
        if not meshes:
            return function(*args, **keywords)
        if len(meshes) > 1:
            raise ValueError(f"Arrays lie on different meshes: {[dict(mesh.shape) for mesh in meshes]}. Use one.")
        (mesh,) = meshes
        automatic = automatic_mesh(mesh)
        given, named = _moved((args, keywords), mesh, automatic)
        with jax.set_mesh(automatic):
            result = function(*given, **named)
        return _moved(result, automatic, mesh)

    return cast(F, run)


def automatic_mesh(mesh: Mesh) -> Mesh:
    """The same devices with automatic axes.

    Args:
        mesh: Of any kind of axes.

    Returns:
        A mesh; the same one where its axes are automatic.
    """
    if all(kind == AxisType.Auto for kind in mesh.axis_types):
        return mesh
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def _explicit_mesh(leaf: Any) -> Mesh | None:
    if isinstance(leaf, jax.core.Tracer) or not isinstance(getattr(leaf, "sharding", None), NamedSharding):
        return None
    mesh = leaf.sharding.mesh
    return mesh if AxisType.Explicit in mesh.axis_types else None


def _context_mesh() -> Mesh | None:
    if AxisType.Explicit not in jax.sharding.get_abstract_mesh().axis_types:
        return None
    return _explicit_mesh(jnp.zeros(()))  # a tracer inside `jit`


def _moved(tree: PyTree, start: Mesh, end: Mesh) -> PyTree:
    def move(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or not isinstance(leaf.sharding, NamedSharding):
            return leaf
        return jax.device_put(leaf, NamedSharding(end, leaf.sharding.spec)) if leaf.sharding.mesh == start else leaf

    return jax.tree.map(move, tree)
