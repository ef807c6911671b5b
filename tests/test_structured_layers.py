"""Channels through what layers are made of: convolutions of all kinds, normalisation, gates, attention, embeddings."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import pytest
from jax import lax
from structured_cases import Case, check

NUMBERS = ("NHWC", "HWIO", "NHWC")


def conv(x, kernel, padding="SAME", strides=(1, 1), **options):
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=NUMBERS, **options)


def mean_and(v, y):
    return y.mean((1, 2)) @ v["last"]


def between(layer, *, last=6, groups=None, union=None, **shapes):
    """A layer between a convolution and a classifier."""
    return Case(
        lambda v, x: mean_and(v, layer(conv(x, v["first"]), v)),
        {"first": (3, 3, 2, 6), "last": (last, 3), **shapes},
        (6, 6, 2),
        groups or {"first": 6},
        union,
    )


def tokens(layer, *, groups=None, union=None, last=6, **shapes):
    """A layer between an embedding of tokens `[n, t, 4]` and a classifier of each."""
    return Case(
        lambda v, x: layer(x @ v["first"], v) @ v["last"],
        {"first": (4, 6), "last": (last, 3), **shapes},
        (5, 4),
        {"first": 6} if groups is None else groups,
        union,
    )


def none(case):
    """Nothing but the other hidden layer can go."""

    def apply_fn(v, x):
        return case.apply_fn(v, x), jnp.tanh(x @ v["other"]) @ v["end"]

    return Case(apply_fn, case.shapes | {"other": (case.inputs[-1], 4), "end": (4, 2)}, case.inputs, {"other": 4})


def layer_norm(h, v, *, two_pass):
    mean = h.mean(-1, keepdims=True)
    variance = ((h - mean) ** 2).mean(-1, keepdims=True) if two_pass else (h * h).mean(-1, keepdims=True) - mean**2
    return (h - mean) * lax.rsqrt(variance + 1.0) * v["scale"] + v["bias"]


def rms_norm(h, v):
    return h * lax.rsqrt((h * h).mean(-1, keepdims=True) + 1e-3) * v["scale"]


def batch_norm(h, v):
    return (h - v["mean"]) * lax.rsqrt(v["var"] + 1e-3) * v["scale"] + v["bias"]


def group_norm(h, v):
    parts = h.reshape(*h.shape[:-1], 2, 3)
    mean = parts.mean((1, 2, 4), keepdims=True)
    variance = (parts * parts).mean((1, 2, 4), keepdims=True) - mean**2
    return ((parts - mean) * lax.rsqrt(variance + 1.0)).reshape(h.shape) * v["scale"] + v["bias"]


def squeeze_excite(h, v):
    gate = jax.nn.sigmoid(jax.nn.relu(h.mean((1, 2)) @ v["squeeze"]) @ v["excite"] + v["bias"])
    return h * gate[:, None, None]


def standardised(kernel):
    """Each output of a kernel by itself, as in weight standardisation."""
    mean = kernel.mean((0, 1, 2), keepdims=True)
    variance = (kernel * kernel).mean((0, 1, 2), keepdims=True) - mean**2
    return (kernel - mean) * lax.rsqrt(variance + 1e-2)


def attention(h, v, *, heads=2, dot=False):
    q, k, u = (jnp.einsum("ntc,chd->nthd", h, v[name]) for name in ("query", "key", "value"))
    if dot:
        return jnp.einsum("nthd,hdc->ntc", jax.nn.dot_product_attention(q, k, u), v["out"])
    weights = jax.nn.softmax(jnp.einsum("nthd,nshd->nhts", q, k) / 2.0)
    return jnp.einsum("nhts,nshd,hdc->ntc", weights, u, v["out"])


def fused(h, v):
    q, k, u = jnp.moveaxis((h @ v["qkv"]).reshape(*h.shape[:2], 3, 2, 4), 2, 0)
    weights = jax.nn.softmax(jnp.einsum("nthd,nshd->nhts", q, k) / 2.0)
    return jnp.einsum("nhts,nshd->nthd", weights, u).reshape(*h.shape[:2], 8) @ v["out"]


HEADS = {"query": (6, 2, 4), "key": (6, 2, 4), "value": (6, 2, 4), "out": (2, 4, 6)}
NORM = {"scale": (6,), "bias": (6,)}
BATCH = {**NORM, "mean": (6,), "var": (6,)}

CASES = {
    "strided": between(
        lambda h, v: conv(h, v["second"], strides=(2, 2)), second=(3, 3, 6, 5), last=5, groups={"first": 6, "second": 5}
    ),
    "valid, dilated": between(
        lambda h, v: conv(h, v["second"], "VALID", rhs_dilation=(2, 2)),
        second=(3, 3, 6, 5),
        last=5,
        groups={"first": 6, "second": 5},
    ),
    "even": between(
        lambda h, v: conv(h, v["second"], strides=(2, 1)), second=(2, 4, 6, 5), last=5, groups={"first": 6, "second": 5}
    ),
    "own padding": between(
        lambda h, v: conv(h, v["second"], ((2, 0), (0, 3))),
        second=(3, 2, 6, 5),
        last=5,
        groups={"first": 6, "second": 5},
    ),
    "transposed": between(
        lambda h, v: lax.conv_transpose(h, v["second"], (2, 2), "SAME"),
        second=(3, 3, 6, 5),
        last=5,
        groups={"first": 6, "second": 5},
    ),
    "depthwise": between(lambda h, v: conv(h, v["each"], feature_group_count=6), each=(3, 3, 1, 6), groups={"each": 6}),
    "depthwise with a multiplier": between(
        lambda h, v: conv(h, v["each"], feature_group_count=6),
        each=(3, 3, 1, 12),
        last=12,
        groups={"each": 6, "each#2": 2},
    ),
    "groups": between(
        lambda h, v: conv(h, v["each"], feature_group_count=2),
        each=(3, 3, 3, 8),
        last=8,
        groups={"each": 2, "each#2": 4, "first": 3},
    ),
    "depthwise of a gate": between(
        lambda h, v: (
            conv(jnp.ones_like(h), jax.nn.sigmoid(v["each"]), feature_group_count=6).sum(-1, keepdims=True) * h
        ),
        each=(3, 3, 1, 6),
    ),
    "batch normalisation": between(batch_norm, **BATCH),
    "group normalisation": between(group_norm, groups={"first": 2, "first#2": 3}, **NORM),
    "response normalisation of all": between(lambda h, v: h / (1 + (h * h).sum(-1, keepdims=True))),
    "squeeze and excitation": between(
        squeeze_excite,
        squeeze=(6, 3),
        excite=(3, 6),
        bias=(6,),
        groups={"bias": 6, "squeeze": 3} and {"excite": 6, "squeeze": 3},
    ),
    "a kernel used twice": between(lambda h, v: conv(jnp.tanh(conv(h, v["second"])), v["second"]), second=(3, 3, 6, 6)),
    "a kernel of both directions": between(
        lambda h, v: lax.conv_general_dilated(
            conv(h, v["second"]), v["second"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWOI", "NHWC")
        ),
        second=(3, 3, 6, 5),
        groups={"first": 6, "second": 5},
    ),
    "weight standardisation": between(
        lambda h, v: conv(h, standardised(v["second"])),
        second=(3, 3, 6, 5),
        last=5,
        groups={"first": 6, "second": 5},
    ),
    "kernels joined": between(
        lambda h, v: conv(h, jnp.concatenate([v["second"], v["third"]], 3)),
        second=(3, 3, 6, 3),
        third=(3, 3, 6, 2),
        last=5,
        groups={"first": 6, "second": 3, "third": 2},
    ),
    "residual": between(
        lambda h, v: h + conv(jax.nn.relu(conv(h, v["second"])), v["third"]),
        second=(3, 3, 6, 5),
        third=(3, 3, 5, 6),
        groups={"first": 6, "second": 5},
        union={"first": 6, "second": 5, "third": 6},
    ),
    "option A": between(
        lambda h, v: (
            conv(h, v["second"], strides=(2, 2))
            + jnp.concatenate([jnp.zeros((len(h), 3, 3, 1)), h[:, ::2, ::2], jnp.zeros((len(h), 3, 3, 1))], 3)
        ),
        second=(3, 3, 6, 8),
        last=8,
        groups={"first": 6, "second": 2},
        union={"first": 6, "second": 2, "second#2": 6},
    ),
    "option A by a pad": between(
        lambda h, v: conv(h, v["second"], strides=(2, 2)) + jnp.pad(h[:, ::2, ::2], ((0, 0),) * 3 + ((1, 1),)),
        second=(3, 3, 6, 8),
        last=8,
        groups={"first": 6, "second": 2},
        union={"first": 6, "second": 2, "second#2": 6},
    ),
    "shuffled": between(
        lambda h, v: jnp.swapaxes(h.reshape(*h.shape[:3], 2, 3), 3, 4).reshape(h.shape),
        groups={"first": 2, "first#2": 3},
    ),
    "space to depth": between(
        lambda h, v: h.reshape(len(h), 3, 2, 3, 2, 6).transpose(0, 1, 3, 2, 4, 5).reshape(len(h), 3, 3, 24),
        last=24,
    ),
    "two-pass layer normalisation": none(tokens(lambda h, v: layer_norm(h, v, two_pass=True), **NORM)),
    "layer normalisation": tokens(lambda h, v: layer_norm(h, v, two_pass=False), **NORM),
    "root mean square normalisation": tokens(rms_norm, scale=(6,)),
    "gated": tokens(
        lambda h, v: jax.nn.silu(h @ v["gate"]) * (h @ v["up"]),
        gate=(6, 7),
        up=(6, 7),
        last=7,
        groups={"first": 6, "gate": 7},
    ),
    "attention": tokens(attention, groups={"first": 6, "key": 2, "key#2": 4, "out": 6, "value": 4}, **HEADS),
    "dot-product attention": tokens(
        lambda h, v: attention(h, v, dot=True), groups={"first": 6, "key": 2, "key#2": 4, "out": 6, "value": 4}, **HEADS
    ),
    "fused attention": tokens(
        lambda h, v: h + fused(h, v),
        qkv=(6, 24),
        out=(8, 6),
        groups={"first": 6, "qkv": 2, "qkv#2": 4},
        union={"first": 6, "out": 6, "qkv": 2, "qkv#2": 4},
    ),
    "class token": tokens(
        lambda h, v: (jnp.concatenate([jnp.broadcast_to(v["token"], (len(h), 1, 6)), h], 1) + v["places"])[:, :1],
        token=(1, 1, 6),
        places=(6, 6),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_masked_is_shrunk(name):
    @hypothesis.settings(max_examples=2)
    @hypothesis.given(st.integers(0, 2**16))
    def hold(seed):
        check(CASES[name], "joint", [seed])
        if CASES[name].union is not None:
            check(CASES[name], "union", [seed])

    hold()
