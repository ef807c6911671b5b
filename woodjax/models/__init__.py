"""Small Flax NNX networks with published checkpoints, and an importer for torch-layout files."""

from collections.abc import Callable

from flax import nnx

from woodjax.models.initialization import torch_init
from woodjax.models.mlp import MLP, digits_mlp, lenet_300_100, mlpnet
from woodjax.models.resnet import ResNet, resnet20
from woodjax.models.torch_layout import load_torch_layout
from woodjax.models.vgg import VGG, vgg11_bn, vgg16_bn, vgg_slim

NETWORKS: dict[str, Callable[..., nnx.Module]] = {
    "digits-mlp": digits_mlp,
    "lenet-300-100": lenet_300_100,
    "mlpnet": mlpnet,
    "resnet20": resnet20,
    "resnet20-b": lambda rngs: resnet20(rngs, shortcut="B"),
    "vgg11-bn": vgg11_bn,
    "vgg16-bn": vgg16_bn,
    "vgg-slim": vgg_slim,
}
"""Constructors by the name that the command line takes."""

__all__ = [
    "MLP",
    "NETWORKS",
    "VGG",
    "ResNet",
    "digits_mlp",
    "lenet_300_100",
    "load_torch_layout",
    "mlpnet",
    "resnet20",
    "torch_init",
    "vgg11_bn",
    "vgg16_bn",
    "vgg_slim",
]
