"""Flax NNX networks that pruning is studied on, and an importer for torch-layout files."""

from collections.abc import Callable

from flax import nnx

from woodjax.models.densenet import DenseNet, densenet40
from woodjax.models.grouped_query import Decoder, gqa_nano
from woodjax.models.initialization import torch_init
from woodjax.models.mlp import MLP, digits_mlp, lenet_300_100, mlpnet
from woodjax.models.mobilenet import MobileNet, mobilenet_v1
from woodjax.models.mobilenet_v2 import MobileNetV2, mobilenet_v2
from woodjax.models.preresnet import PreResNet, preresnet29
from woodjax.models.resnet import ResNet, resnet18, resnet20, resnet32, resnet50
from woodjax.models.torch_layout import load_torch_layout
from woodjax.models.unet import UNet, unet_nano
from woodjax.models.vgg import VGG, vgg11_bn, vgg16_bn, vgg_slim
from woodjax.models.vit import ViT, vit_nano, vit_tiny
from woodjax.models.wide_resnet import WideResNet, wrn16_8, wrn28_10

NETWORKS: dict[str, Callable[..., nnx.Module]] = {
    "densenet40": densenet40,
    "digits-mlp": digits_mlp,
    "lenet-300-100": lenet_300_100,
    "mlpnet": mlpnet,
    "mobilenet-v1": mobilenet_v1,
    "mobilenet-v2": mobilenet_v2,
    "preresnet29": preresnet29,
    "resnet18": resnet18,
    "resnet20": resnet20,
    "resnet20-b": lambda rngs, **options: resnet20(rngs, shortcut="B", **options),
    "resnet32": resnet32,
    "resnet50": resnet50,
    "vgg-slim": vgg_slim,
    "vgg11-bn": vgg11_bn,
    "vgg16-bn": vgg16_bn,
    "vit-nano": vit_nano,
    "vit-tiny": vit_tiny,
    "wrn16-8": wrn16_8,
    "wrn28-10": wrn28_10,
}
"""Constructors `make(rngs)` by the name that the command line takes. Networks for colour images take `classes=10` as
well, and those that are for ImageNet too `stem="cifar"` or `"imagenet"`."""

__all__ = [
    "MLP",
    "NETWORKS",
    "VGG",
    "Decoder",
    "DenseNet",
    "MobileNet",
    "MobileNetV2",
    "PreResNet",
    "ResNet",
    "UNet",
    "ViT",
    "WideResNet",
    "densenet40",
    "digits_mlp",
    "gqa_nano",
    "lenet_300_100",
    "load_torch_layout",
    "mlpnet",
    "mobilenet_v1",
    "mobilenet_v2",
    "preresnet29",
    "resnet18",
    "resnet20",
    "resnet32",
    "resnet50",
    "torch_init",
    "unet_nano",
    "vgg11_bn",
    "vgg16_bn",
    "vgg_slim",
    "vit_nano",
    "vit_tiny",
    "wrn16_8",
    "wrn28_10",
]
