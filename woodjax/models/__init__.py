"""Small Flax NNX networks with published checkpoints, and an importer for torch-layout files."""

from collections.abc import Callable

from flax import nnx

from woodjax.models.mlp import MLP, digits_mlp, lenet_300_100, mlpnet
from woodjax.models.resnet import ResNet, resnet20
from woodjax.models.torch_layout import load_torch_layout

NETWORKS: dict[str, Callable[[nnx.Rngs], nnx.Module]] = {
    "digits-mlp": digits_mlp,
    "lenet-300-100": lenet_300_100,
    "mlpnet": mlpnet,
    "resnet20": resnet20,
    "resnet20-b": lambda rngs: resnet20(rngs, shortcut="B"),
}
"""Constructors by the name that the command line takes."""

__all__ = ["MLP", "NETWORKS", "ResNet", "digits_mlp", "lenet_300_100", "load_torch_layout", "mlpnet", "resnet20"]
