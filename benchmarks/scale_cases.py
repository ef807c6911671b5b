"""Networks of any size and the layouts that the scale benchmark places them in."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import woodjax as wj

CLASSES = 16
SPARSITY = 0.7
WELL_POSED = wj.Relative(1.0)  # so that float32 says something: a small damping amplifies rounding


class Layout(NamedTuple):
    """A mesh, and where the kernels lie on it."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    kernels: tuple[PartitionSpec, ...]  # of the three
    explicit: bool = False

    @property
    def devices(self) -> int:
        """Of the mesh."""
        return self.shape[0] * (self.shape[1] if len(self.shape) > 1 else 1)

    @property
    def data_devices(self) -> int:
        """Devices that the examples are split over."""
        return self.shape[0]


P = PartitionSpec
LAYOUTS = {
    "8 × 1, replicated": Layout((8, 1), ("data", "block"), (P(), P(), P())),
    "8 × 1, FSDP": Layout((8,), ("data",), (P("data"), P("data"), P("data"))),
    "2 × 2, tensor parallel": Layout((2, 2), ("data", "block"), (P("block"), P("block"), P("block"))),
    "2 × 2, explicit axes": Layout((2, 2), ("data", "block"), (P("block"), P("block"), P("block")), explicit=True),
    "1 × 8, tensor parallel": Layout((1, 8), ("data", "block"), (P("block"), P("block"), P("block"))),
}


def loss_fn(params: Any, example: Any) -> jax.Array:
    """Cross-entropy of a network of three kernels."""
    x, label = example
    for number in range(2):
        x = jnp.tanh(x @ params[f"layer{number}"])
    return -jax.nn.log_softmax(x @ params["out"])[label]


def network(width: int, examples: int, seed: int = 0) -> tuple[Any, Any]:
    """Parameters with `2 width² + 16 width` weights, and random examples: the linear algebra does not mind."""
    keys = jax.random.split(jax.random.key(seed), 5)
    shapes = {"layer0": (width, width), "layer1": (width, width), "out": (width, CLASSES)}
    named = zip(keys[:3], shapes.items(), strict=True)
    params = {name: jax.random.normal(key, shape) / jnp.sqrt(width) for key, (name, shape) in named}
    batch = jax.random.normal(keys[3], (examples, width)), jax.random.randint(keys[4], (examples,), 0, CLASSES)
    return params, batch


def place(layout: Layout, params: Any, batch: Any) -> tuple[Any, Any]:
    """Parameters and examples on the mesh of a layout."""
    kind = AxisType.Explicit if layout.explicit else AxisType.Auto
    devices = jax.devices()[: layout.devices]
    mesh = jax.make_mesh(layout.shape, layout.axes, axis_types=(kind,) * len(layout.axes), devices=devices)
    specs = dict(zip(("layer0", "layer1", "out"), layout.kernels, strict=True))
    placed = {name: jax.device_put(w, NamedSharding(mesh, specs[name])) for name, w in params.items()}
    return placed, jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, P("data"))), batch)


CURVATURES: dict[str, Callable[..., wj.Curvature]] = {
    "whole network": wj.low_rank_fisher,
    "blocks, sums travel": partial(wj.block_fisher, block_size=8),
    "blocks, gradients travel": partial(wj.block_fisher, block_size=32),
}


def prune(params: Any, batch: Any, curvature: Callable[..., wj.Curvature]) -> dict[str, Any]:
    """From gradients to the pruned network, a stage at a time."""
    gradients = wj.per_example_gradients(loss_fn, params, batch)
    fisher = curvature(gradients, damping=WELL_POSED)
    scores = wj.obs_scores(params, fisher)
    masks = wj.make_masks(scores, SPARSITY)
    updates = wj.compensate(params, masks, fisher)
    return {"gradients": gradients, "scores": scores, "masks": masks, "updates": updates}
