"""Small networks of every kind, and what the smaller ones of them must agree with."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import woodjax as wj
from woodjax import models
from woodjax.adapters.nnx import functional_variables
from woodjax.deployment.measurement import Variant
from woodjax.structured.find import Streams


class Kind(NamedTuple):
    """How to make a network, and inputs for it."""

    make: Callable[[nnx.Rngs], nnx.Module]
    shape: tuple[int, ...]  # of one input
    tokens: int = 0  # different ones, where the inputs are no images


FAST_TO_COMPILE = {"xla_backend_optimization_level": 0}
STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 1, 2))
ZOO = {
    "MLP": Kind(models.lenet_300_100, (28, 28, 1)),
    "VGG": Kind(models.vgg_slim, (16, 16, 3)),
    "ResNet, option A": Kind(lambda rngs: models.ResNet(1, rngs=rngs), (8, 8, 3)),
    "ResNet, option B": Kind(lambda rngs: models.ResNet(1, shortcut="B", rngs=rngs), (8, 8, 3)),
    "ResNet, bottleneck": Kind(
        lambda rngs: models.ResNet(1, widths=(8, 16), bottleneck=True, shortcut="B", rngs=rngs), (8, 8, 3)
    ),
    "PreResNet": Kind(lambda rngs: models.PreResNet(1, widths=(8, 16, 32), rngs=rngs), (8, 8, 3)),
    "Wide ResNet": Kind(lambda rngs: models.WideResNet(10, 2, rngs=rngs), (8, 8, 3)),
    "DenseNet": Kind(lambda rngs: models.DenseNet((2, 2), growth=6, rngs=rngs), (8, 8, 3)),
    "MobileNetV2": Kind(lambda rngs: models.MobileNetV2(STAGES, first=16, last=64, rngs=rngs), (8, 8, 3)),
    "ViT": Kind(lambda rngs: models.ViT(image_size=8, patch=4, width=16, depth=2, heads=4, rngs=rngs), (8, 8, 3)),
    "U-Net": Kind(models.unet_nano, (16, 16, 3)),
    "decoder with GQA": Kind(models.gqa_nano, (8,), tokens=10),
}
QUICK_ZOO = ("MLP", "ResNet, option A", "DenseNet", "ViT", "decoder with GQA")


def zoo_error(kind: Kind, streams: Streams, seed: int, *, batch: int = 4) -> tuple[float, int, int]:
    """Largest difference of outputs of the masked and the smaller network, over the largest output.

    A random plan keeps about 60 % of each group, a third of that as implants where kernels have places.

    Returns:
        The error, the number of groups and that of channels.
    """
    random = np.random.default_rng(seed)
    apply_fn, variables = drawn(kind, random)
    shape = (batch, *kind.shape)
    inputs = random.integers(kind.tokens, size=shape) if kind.tokens else random.normal(size=shape).astype(np.float32)
    groups = wj.channel_groups(apply_fn, variables, inputs[:1], streams=streams)
    kept = {group.name: random.random(group.size) < 0.6 for group in groups.groups}
    for mask in kept.values():
        mask[random.integers(mask.size)] = True
    implants = {name: kept[name] & (random.random(kept[name].size) < 0.3) for name in groups.implantable}
    plan = wj.make_plan(groups, kept, implants)
    network = wj.shrunk_network(apply_fn, plan)

    def both(variables: Any, inputs: Any) -> tuple[Any, Any]:
        small = plan.shrink(variables)
        return apply_fn(plan.expand(small), inputs), network(small, inputs)

    whole, small = jax.jit(both, compiler_options=FAST_TO_COMPILE)(variables, inputs)
    return float(jnp.max(jnp.abs(whole - small)) / jnp.max(jnp.abs(whole))), len(groups.groups), groups.num_channels


def drawn(kind: Kind, random: np.random.Generator) -> Variant:
    """A network with numbers of NumPy's: those of its own initialization take longer to compile than all else."""
    model = nnx.eval_shape(lambda: kind.make(nnx.Rngs(0)))
    model.eval()
    apply_fn, shapes = functional_variables(model)
    apply_fn = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), apply_fn)  # passed, not used
    return apply_fn, jax.tree_util.tree_map_with_path(lambda path, leaf: _numbers(path[-1].key, leaf, random), shapes)


def _numbers(name: str, leaf: Any, random: np.random.Generator) -> Any:
    """Weights as large as trained ones; scales, shifts and statistics that are not trivial."""
    if len(leaf.shape) < 2:
        low = -0.5 if name in ("bias", "mean") else 0.5
        return jnp.asarray(random.uniform(low, low + 1, leaf.shape), leaf.dtype)
    return jnp.asarray(random.normal(size=leaf.shape) / np.sqrt(np.prod(leaf.shape[:-1])), leaf.dtype)
