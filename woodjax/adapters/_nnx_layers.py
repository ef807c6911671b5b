"""Which attributes of Flax NNX layers say how wide they are, and what they are for the arrays of a layer."""

from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx

Attributes = Mapping[str, Any]


def fit_layers(model: nnx.Module) -> None:
    """Set the widths of all standard layers of a model to the shapes of their arrays, in place.

    Args:
        model: A module whose variables are the ones that count.

    Raises:
        ValueError: A layer whose groups of channels the new number of channels does not divide into.
    """
    for path, layer in list(nnx.iter_graph(model)):
        for kind, widths in WIDTHS:
            if isinstance(layer, kind):
                found = widths(layer, "/".join(map(str, path)))
                for name in found.keys() & vars(layer).keys():  # older versions lack some
                    setattr(layer, name, found[name])
                break


def _linear(layer: nnx.Linear, name: str) -> Attributes:
    inputs, outputs = layer.kernel.shape[-2:]
    return {"in_features": inputs, "out_features": outputs}


def _linear_general(layer: nnx.LinearGeneral, name: str) -> Attributes:
    shape = layer.kernel.shape
    end = len(shape) - len(layer.out_features)
    return {"in_features": shape[end - len(layer.in_features) : end], "out_features": shape[end:]}


def _einsum(layer: nnx.Einsum, name: str) -> Attributes:
    return {"kernel_shape": layer.kernel.shape, "bias_shape": None if layer.bias is None else layer.bias.shape}


def _convolution(layer: nnx.Conv, name: str) -> Attributes:
    shape = layer.kernel.shape[-2 - len(layer.kernel_size) :]
    inputs, outputs = shape[-2:]
    groups = layer.feature_group_count
    whole = groups > 1 and inputs == layer.in_features // groups  # groups are gone, not some channels of each
    size = layer.out_features // groups if whole else groups
    if outputs % size:
        raise ValueError(
            f"Layer '{name}' has {groups} groups, {layer.in_features} channels in and {layer.out_features} out; its "
            f"new kernel has the shape {shape}: {outputs} is no multiple of {size}. Remove whole groups, or the same "
            "number of channels from each."
        )
    groups = outputs // size if whole else groups
    return {
        "kernel_shape": shape,
        "in_features": inputs * groups,
        "out_features": outputs,
        "feature_group_count": groups,
    }


def _transposed_convolution(layer: nnx.ConvTranspose, name: str) -> Attributes:
    shape = layer.kernel.shape[-2 - len(layer.kernel_size) :]
    inputs, outputs = shape[:-3:-1] if layer.transpose_kernel else shape[-2:]
    return {"kernel_shape": shape, "in_features": inputs, "out_features": outputs}


def _embedding(layer: nnx.Embed, name: str) -> Attributes:
    number, features = layer.embedding.shape[-2:]
    return {"num_embeddings": number, "features": features}


def _width(layer: Any) -> int | None:
    arrays = (getattr(layer, key, None) for key in ("scale", "bias", "mean"))
    return next((array.shape[-1] for array in arrays if array is not None), None)


def _normalisation(layer: Any, name: str) -> Attributes:
    width = _width(layer)
    return {} if width is None else {"num_features": width}


def _group_normalisation(layer: nnx.GroupNorm, name: str) -> Attributes:
    width = _width(layer)
    if width is None:
        return {}
    if layer.num_groups == 1:
        return {"group_size": width}
    if width % layer.group_size:
        raise ValueError(
            f"Layer '{name}' normalises groups of {layer.group_size} channels and now has {width}: keep or remove "
            "whole groups."
        )
    return {"num_groups": width // layer.group_size}


def _attention(layer: nnx.MultiHeadAttention, name: str) -> Attributes:
    inputs, heads, head_dim = layer.query.kernel.shape[-3:]
    others, kv_heads, _ = layer.key.kernel.shape[-3:]
    if heads % kv_heads:
        raise ValueError(
            f"Layer '{name}' now has {heads} heads of queries and {kv_heads} of keys: the second must divide the "
            "first. Remove heads of keys with the heads of queries that share them."
        )
    return {
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "qkv_features": heads * head_dim,
        "in_features": inputs,
        "in_kv_features": others,
        "out_features": layer.out.kernel.shape[-1],
    }


NORMALISATIONS = ("BatchNorm", "LayerNorm", "RMSNorm", "InstanceNorm")  # older versions lack the last
WIDTHS: tuple[tuple[Any, Callable[[Any, str], Attributes]], ...] = (
    (nnx.Linear, _linear),
    (nnx.LinearGeneral, _linear_general),
    (nnx.Einsum, _einsum),
    (nnx.Conv, _convolution),
    (nnx.ConvTranspose, _transposed_convolution),
    (nnx.Embed, _embedding),
    (nnx.GroupNorm, _group_normalisation),
    (tuple(getattr(nnx, name) for name in NORMALISATIONS if hasattr(nnx, name)), _normalisation),
    (nnx.MultiHeadAttention, _attention),
)
