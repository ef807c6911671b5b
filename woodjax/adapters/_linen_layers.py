"""How wide Flax Linen layers are, read from the arrays that they are applied with."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

Fields = Mapping[str, Any]


def fit_layer(following: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], context: Any) -> Any:
    """Call a method of a module, its fields set to the shapes of its arrays for as long as that lasts.

    Args:
        following: The method.
        args: Of the call.
        kwargs: Of the call.
        context: With the module, as `flax.linen.intercept_methods` passes it.

    Returns:
        What the method returns.
    """
    layer = context.module
    widths = next((widths for kind, widths in WIDTHS if isinstance(layer, kind)), None)
    fields = widths(layer, args, kwargs) if widths and layer.variables.get("params") else {}
    before = {name: getattr(layer, name) for name in fields}
    try:
        _set(layer, fields)
        return following(*args, **kwargs)
    finally:
        _set(layer, before)


def _set(layer: nn.Module, fields: Fields) -> None:
    for name, value in fields.items():
        object.__setattr__(layer, name, value)  # modules refuse to be changed during a call


def _shape(layer: nn.Module, *path: str) -> tuple[int, ...]:
    found: Any = layer.variables["params"]
    for name in path:
        found = found[name]
    return jnp.shape(nn.unbox(found))


def _dense(layer: nn.Dense, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Fields:
    return {"features": _shape(layer, "kernel")[-1]}


def _dense_general(layer: nn.DenseGeneral, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Fields:
    shape = _shape(layer, "kernel")
    if isinstance(layer.features, int):
        return {"features": shape[-1]}
    return {"features": shape[len(shape) - len(layer.features) :]}


def _convolution(layer: nn.Conv, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Fields:
    inputs, outputs = _shape(layer, "kernel")[-2:]
    images = args[0] if args else kwargs["inputs"]
    return {"features": outputs, "feature_group_count": images.shape[-1] // inputs}


def _transposed_convolution(layer: nn.ConvTranspose, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Fields:
    return {"features": _shape(layer, "kernel")[-2 if layer.transpose_kernel else -1]}


def _embedding(layer: nn.Embed, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Fields:
    number, features = _shape(layer, "embedding")[-2:]
    return {"num_embeddings": number, "features": features}


def _attention(layer: nn.MultiHeadDotProductAttention, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Fields:
    heads, head_dim = _shape(layer, "query", "kernel")[-2:]
    return {
        "num_heads": heads,
        "qkv_features": heads * head_dim,
        "out_features": _shape(layer, "out", "kernel")[-1],
    }


WIDTHS: tuple[tuple[Any, Callable[[Any, tuple[Any, ...], dict[str, Any]], Fields]], ...] = (
    (nn.Dense, _dense),
    (nn.DenseGeneral, _dense_general),
    (nn.Conv, _convolution),
    (nn.ConvTranspose, _transposed_convolution),
    (nn.Embed, _embedding),
    (nn.MultiHeadDotProductAttention, _attention),
)
