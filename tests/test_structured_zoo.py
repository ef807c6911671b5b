"""Structured pruning of whole networks: the masked network's output is the shrunk network's, for random plans."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.flatten_util import ravel_pytree
from structured_cases import assert_close, assert_counts, filled_in, masked, random_channels, sizes

import woodjax as wj
from woodjax import models
from woodjax.adapters.nnx import functional_variables
from woodjax.models.mobilenet import SeparableBlock


class SmallMobileNet(nnx.Module):
    """Two blocks of MobileNetV1 and a classifier."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 6, (3, 3), rngs=rngs)
        self.first, self.second = SeparableBlock(6, 8, 2, rngs=rngs), SeparableBlock(8, 9, 1, rngs=rngs)
        self.last = nnx.Linear(9, 10, rngs=rngs)

    def __call__(self, x):
        return self.last(self.second(self.first(nnx.relu(self.conv(x)))).mean((1, 2)))


class LinenMLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4)(nn.relu(nn.Dense(7)(nn.relu(nn.Dense(6)(x.reshape(len(x), -1))))))


class LinenResidual(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = nn.relu(nn.BatchNorm(use_running_average=True)(nn.Conv(6, (3, 3))(x)))
        h = h + nn.BatchNorm(use_running_average=True)(nn.Conv(6, (3, 3))(nn.relu(nn.Conv(5, (3, 3), strides=1)(h))))
        return nn.Dense(4)(nn.max_pool(nn.GroupNorm(2)(h), (2, 2), (2, 2)).mean((1, 2)))


class LinenAttention(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = nn.Dense(8)(x.reshape(len(x), -1, 6))
        h = h + nn.MultiHeadDotProductAttention(num_heads=2)(nn.LayerNorm()(h))
        return nn.Dense(4)(h + nn.Dense(8)(nn.gelu(nn.Dense(9)(nn.RMSNorm()(h)))))


class Layer(nn.Module):
    @nn.compact
    def __call__(self, h, _):
        return nn.tanh(nn.Dense(6)(h)), None


class LinenScan(nn.Module):
    @nn.compact
    def __call__(self, x):
        layers = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return nn.Dense(4)(layers()(nn.Dense(6)(x.reshape(len(x), -1)), None)[0])


def images(size, channels=3):
    return lambda n: jnp.asarray(np.random.default_rng(n).normal(size=(n, size, size, channels)), jnp.float32)


def words(n):
    return jnp.asarray(np.random.default_rng(n).integers(0, 10, (n, 6)))


def vgg(rngs):
    return models.VGG((4, "M", 6, 6, "M"), rngs=rngs)


def resnet(**options):
    return lambda rngs: models.ResNet(1, widths=(4, 6), rngs=rngs, **options)


def decoder(rngs):
    return models.Decoder(
        vocabulary=10, context=6, width=8, depth=1, heads=4, kv_heads=2, head_dim=4, hidden=9, rngs=rngs
    )


STAGES = ((1, 6, 1, 1), (2, 6, 2, 1), (2, 8, 1, 2))
ZOO = {
    "mlp": (lambda rngs: models.MLP((48, 9, 7, 5), rngs=rngs), images(4)),
    "vgg": (vgg, images(8)),
    "resnet A": (resnet(), images(6)),
    "resnet B": (resnet(shortcut="B"), images(6)),
    "bottleneck": (resnet(shortcut="B", bottleneck=True), images(6)),
    "preresnet": (lambda rngs: models.PreResNet(1, widths=(4, 6), rngs=rngs), images(6)),
    "wide resnet": (lambda rngs: models.WideResNet(10, 1, rngs=rngs), images(4)),
    "densenet": (lambda rngs: models.DenseNet((2, 1), growth=4, rngs=rngs), images(6)),
    "mobilenet": (SmallMobileNet, images(6)),
    "mobilenet 2": (lambda rngs: models.MobileNetV2(STAGES, first=5, last=9, rngs=rngs), images(6)),
    "vit": (lambda rngs: models.ViT(image_size=8, patch=4, width=8, depth=1, heads=2, rngs=rngs), images(8)),
    "unet": (lambda rngs: models.UNet((4, 6, 8), rngs=rngs), images(8)),
    "gqa": (decoder, words),
    "linen mlp": (LinenMLP(), images(4)),
    "linen residual": (LinenResidual(), images(4)),
    "linen attention": (LinenAttention(), images(6, 2)),
    "linen scan": (LinenScan(), images(4)),
}
WITH_STREAMS = ("resnet A", "resnet B", "bottleneck", "mobilenet 2", "vit", "gqa", "linen residual", "linen attention")


@cache
def network(name):
    """Function, jitted function, variables without zeros or ones, and inputs for a number of examples."""
    made, data = ZOO[name]
    if isinstance(made, nn.Module):
        apply_fn, shapes = made.apply, jax.eval_shape(made.init, jax.random.key(0), data(1))
    else:
        model = nnx.eval_shape(lambda: made(nnx.Rngs(0)))
        model.eval()
        apply_fn, shapes = functional_variables(model)
    return apply_fn, jax.jit(apply_fn), filled_in(shapes), data


@pytest.mark.parametrize(
    ("name", "streams"),
    [
        *((name, "joint") for name in ZOO),
        *(pytest.param(name, "union", marks=pytest.mark.newest) for name in WITH_STREAMS),
    ],
)
def test_masked_is_shrunk(name, streams):
    apply_fn, whole, variables, data = network(name)
    groups = wj.channel_groups(apply_fn, variables, data(1), streams=streams)
    for seed in (0, 1):
        kept, implanted = random_channels(groups, seed, implants=seed > 0)
        assert_counts(apply_fn, groups, kept, implanted, variables, data(1))
    plan = wj.make_plan(groups, kept, implanted)
    network_of = wj.shrunk_network(apply_fn, plan)
    found = jax.jit(lambda v, x: network_of(plan.shrink(v), x))(variables, data(3))
    assert_close(found, whole(masked(plan, variables), data(3)))


@pytest.mark.parametrize(("name", "streams"), [("resnet A", "union"), ("vit", "joint")])
def test_gradients_are_those_of_the_masked_network(name, streams):
    apply_fn, _, variables, data = network(name)
    groups = wj.channel_groups(apply_fn, variables, data(1), streams=streams)
    plan = wj.make_plan(groups, *random_channels(groups, 0, implants=True))
    small, shrunk = plan.shrink(variables), wj.shrunk_network(apply_fn, plan)
    directions = jnp.asarray(np.random.default_rng(0).normal(size=(2, 10)), jnp.float32)

    def gradient(function, v):
        return jax.jit(jax.grad(lambda v: (function(v, data(2)) * directions).sum()))(v)

    found, expected = gradient(shrunk, small), plan.shrink(gradient(apply_fn, masked(plan, variables)))
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert_close(ravel_pytree(found)[0], ravel_pytree(expected)[0], 1e-5)


@pytest.mark.newest
def test_groups_of_a_resnet20():
    model = models.resnet20(nnx.Rngs(0))
    model.eval()
    apply_fn, variables = functional_variables(model)
    groups = wj.channel_groups(apply_fn, variables, jnp.ones((1, 32, 32, 3)))
    blocks = {f"layer{i}_{k}/conv1/kernel": 8 * 2**i for i in (1, 2, 3) for k in (0, 1, 2)}
    streams = {"conv1/kernel": 16, "layer2_0/conv2/kernel": 16, "layer3_0/conv2/kernel": 32}
    assert sizes(groups) == blocks | streams
    assert groups.num_channels == 336 + 64
    assert groups.parameters({}) == sum(leaf.size for leaf in jax.tree.leaves(variables))
    assert groups.macs({}) == 40_551_040


def test_heads_are_channels():
    apply_fn, _, variables, data = network("vit")
    found = sizes(wj.channel_groups(apply_fn, variables, data(1)))
    assert found["blocks_0/qkv/kernel"] == 2
    assert found["blocks_0/qkv/kernel#2"] == 4
    apply_fn, _, variables, data = network("gqa")
    attention = "blocks_0/attention/"
    found = {k: v for k, v in sizes(wj.channel_groups(apply_fn, variables, data(1))).items() if attention in k}
    keys = {
        f"{attention}key/kernel": 2,
        f"{attention}key/kernel#2": 4,
    }  # pairs of heads, and what a head is compared by
    assert found == keys | {f"{attention}{part}/kernel": n for part, n in (("query", 2), ("value", 4), ("out", 8))}


@pytest.mark.parametrize("name", ZOO)
def test_inputs_and_outputs_stay(name):
    apply_fn, _, variables, data = network(name)
    groups = wj.channel_groups(apply_fn, variables, data(1))
    shapes = (data(1).shape[-1], jax.eval_shape(apply_fn, variables, data(1)).shape[-1])
    plan = wj.make_plan(groups, random_channels(groups, 0)[0])
    small = jax.eval_shape(plan.shrink, variables)
    output = jax.eval_shape(wj.shrunk_network(apply_fn, plan), small, data(2))
    assert (data(2).shape[-1], output.shape[-1]) == shapes
