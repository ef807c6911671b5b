"""Layouts of a small network on a mesh, and a loss whose gradients are the examples themselves."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

P = PartitionSpec
SHAPES = {"a": {"b": (16,), "w": (8, 16)}, "c": {"w": (16, 4)}, "s": (2, 4, 8)}
ROWS = 24


class MeshCase(NamedTuple):
    """How the leaves of `SHAPES` and the examples lie."""

    mesh: dict[str, int]
    a: P = P()
    b: P = P()
    c: P = P()
    s: P = P()
    batch: P = P("data")

    def devices(self, kind=AxisType.Auto):
        sizes = tuple(self.mesh.values())
        return jax.make_mesh(
            sizes, tuple(self.mesh), axis_types=(kind,) * len(sizes), devices=jax.devices()[: int(np.prod(sizes))]
        )

    @property
    def specs(self):
        return {"a": {"b": self.b, "w": self.a}, "c": {"w": self.c}, "s": self.s}

    def params(self, tree, kind=AxisType.Auto):
        mesh = self.devices(kind)
        return jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), tree, self.specs)

    def examples(self, batch, kind=AxisType.Auto):
        sharding = NamedSharding(self.devices(kind), self.batch)
        return jax.tree.map(lambda x: jax.device_put(x, sharding), batch)


TWO, EIGHT = {"data": 2, "block": 2}, {"data": 2, "block": 4}
CASES = {
    "data": MeshCase({"data": 8}),
    "first": MeshCase(TWO, a=P("block"), c=P("block", None), s=P(None, "block")),
    "last": MeshCase(TWO, a=P(None, "block"), b=P("block"), c=P(None, ("data", "block")), s=P(None, None, "block")),
    "fsdp": MeshCase({"data": 4}, a=P("data"), b=P("data"), c=P("data"), s=P(None, "data")),
    "mixed": MeshCase(EIGHT, a=P("data", "block"), b=P("block"), c=P(("block", "data"))),
    "rows": MeshCase(EIGHT, a=P("block"), s=P(None, "data"), batch=P(("data", "block"))),
    "layers": MeshCase(TWO, a=P(None, "block"), c=P(None, ("data", "block")), s=P(None, "block")),
    "alone": MeshCase(TWO, a=P("block"), c=P(None, "block"), batch=P()),
}


def linear_loss(params, example):
    """Its gradient at an example is the example."""
    return sum(jnp.vdot(w, x) for w, x in zip(jax.tree.leaves(params), jax.tree.leaves(example), strict=True))


def normal(seed, lead=(), dtype=np.float32):
    """A tree of the network's shapes."""
    rng = np.random.default_rng(seed)

    def draw(shape):
        return rng.normal(size=(*lead, *shape)).astype(dtype)

    return jax.tree.map(draw, SHAPES, is_leaf=lambda x: isinstance(x, tuple))


def flat(tree):
    """All kernels as one vector, in float64."""
    return np.concatenate([np.asarray(x, np.float64).reshape(-1) for x in (tree["a"]["w"], tree["c"]["w"], tree["s"])])


def rows_of(tree):
    """Gradients of all kernels, one row for each example."""
    leaves = (tree["a"]["w"], tree["c"]["w"], tree["s"])
    return np.concatenate([np.asarray(x, np.float64).reshape(len(x), -1) for x in leaves], axis=1)


def shard_blocks(params: Any, size: int, layers: int = 0):
    """Blocks cut inside shards: places in `flat`, from what the devices hold."""
    start, blocks = 0, set()
    for leaf in (params["a"]["w"], params["c"]["w"], params["s"]):
        places = start + np.arange(leaf.size).reshape(leaf.shape)
        start += leaf.size
        for shard in leaf.addressable_shards:
            own = places[shard.index]
            for row in own.reshape(int(np.prod(own.shape[:layers])), -1):
                blocks |= {tuple(row[at : at + size].tolist()) for at in range(0, row.size, size)}
    return [list(block) for block in sorted(blocks)]


def distance(found, expected):
    """Largest difference, against the largest entry."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    pairs = [(np.asarray(x, np.float64), np.asarray(y, np.float64)) for x, y in pairs]
    return max(np.abs(x - y).max() for x, y in pairs) / max(np.abs(y).max() for _, y in pairs)


def same_place(tree, like):
    """Do the leaves lie where the others do, on the same mesh?"""
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(like), strict=True)
    return all(x.sharding.mesh == y.sharding.mesh and x.sharding.is_equivalent_to(y.sharding, y.ndim) for x, y in pairs)
