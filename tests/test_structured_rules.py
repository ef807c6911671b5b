"""Channels through primitives that move, pad, cut, join and sum axes: one small program for each, and for each trap."""

import inspect

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import pytest
from jax import lax
from structured_cases import Case, check


def hidden(v, x):
    return jnp.tanh(x @ v["first"])


def conv(x, kernel, padding="SAME", **options):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=numbers, **options)


def dense(between, *, last=6, groups=None, first=6, **shapes):
    """`between` is what happens between two matrix products; a group of its own, unless it keeps all channels."""
    shapes = {"first": (5, first), "last": (last, 3), **shapes}
    found = {"first": first} if groups is None else groups
    return Case(lambda v, x: between(jnp.tanh(x @ v["first"]), v) @ v["last"], shapes, (5,), found)


def image(between, *, last=6, groups=None, **shapes):
    shapes = {"first": (3, 3, 2, 6), "last": (3, 3, last, 3), **shapes}
    found = {"first": 6} if groups is None else groups
    return Case(lambda v, x: conv(between(conv(x, v["first"]), v), v["last"]), shapes, (6, 6, 2), found)


def none(case, unknown="error"):
    """Nothing but the other hidden layer can go."""

    def apply_fn(v, x):
        return case.apply_fn(v, x), jnp.tanh(x @ v["other"]) @ v["end"]

    shapes = case.shapes | {"other": (case.inputs[-1], 4), "end": (4, 2)}
    return Case(apply_fn, shapes, case.inputs, {"other": 4})


CASES = {
    "dense": dense(lambda h, v: h),
    "tanh, gelu, silu, relu6": dense(
        lambda h, v: jax.nn.gelu(h) + jax.nn.gelu(h, approximate=False) + jax.nn.silu(h) * jax.nn.relu6(h + 0.1 * h)
    ),
    "sigmoid": dense(lambda h, v: jax.nn.sigmoid(h)),
    "bias": dense(lambda h, v: h + v["bias"], bias=(6,)),
    "transposes": dense(lambda h, v: jnp.transpose(jnp.transpose(h))),
    "reversed": dense(lambda h, v: h[:, ::-1]),
    "a constant of the program": dense(lambda h, v: h * 3.0 + jnp.full((6,), 0.5) * h),
    "another of all channels": none(dense(lambda h, v: h * jnp.arange(6.0))),
    "slices with strides": dense(lambda h, v: jnp.concatenate([lax.slice_in_dim(h, i, 6, 2, 1) for i in (0, 1)], 1)),
    "a slice": dense(lambda h, v: h[:, 1:5], last=4, groups={"first": 2, "first#2": 4}),
    "one channel": dense(lambda h, v: h * h[:, 2:3], groups={"first": 5}),
    "parts": dense(lambda h, v: jnp.multiply(*jnp.split(h, 2, 1)), last=3, groups={"first": 3}),
    "parts of several sizes": dense(
        lambda h, v: jnp.concatenate(jnp.split(h, [1, 3], 1)[::-1], 1), groups={"first": 5}
    ),
    "zeros around": dense(lambda h, v: jnp.pad(h, ((0, 0), (2, 1))), last=9),
    "zeros around, and a gate": dense(lambda h, v: jax.nn.sigmoid(jnp.pad(h, ((0, 0), (2, 1)))), last=9),
    "ones around": none(dense(lambda h, v: jnp.pad(h, ((0, 0), (2, 1)), constant_values=1.0), last=9)),
    "zeros between": none(dense(lambda h, v: lax.pad(h, 0.0, ((0, 0, 0), (0, 0, 1))), last=11)),
    "cropped": none(dense(lambda h, v: lax.pad(h, 0.0, ((0, 0, 0), (-1, 0, 0))), last=5)),
    "zeros joined": dense(lambda h, v: jnp.concatenate([jnp.zeros((len(h), 2)), h], 1), last=8),
    "zeros and a maximum": none(dense(lambda h, v: h - jnp.max(jnp.pad(-h * h, ((0, 0), (2, 1))), 1, keepdims=True))),
    "zeros and a running sum": none(dense(lambda h, v: jnp.cumsum(jnp.pad(h, ((0, 0), (2, 1))), 1), last=9)),
    "zeros and a crop": none(
        dense(lambda h, v: lax.pad(jnp.pad(h, ((0, 0), (2, 1))), 0.0, ((0, 0, 0), (-3, 1, 0))), last=7)
    ),
    "zeros and groups": none(
        dense(lambda h, v: jnp.tanh(jnp.pad(h, ((0, 0), (1, 1))).reshape(-1, 2, 4)).reshape(-1, 8), last=8)
    ),
    "zeros and pieces": none(
        dense(lambda h, v: jnp.pad(h, ((0, 0), (2, 1))).reshape(-1, 3, 3)[:, ::-1].mean(2), last=3)
    ),
    "flattened": Case(
        lambda v, x: jnp.tanh(conv(x, v["first"])).reshape(len(x), -1) @ v["last"],
        {"first": (3, 3, 2, 6), "last": (96, 3)},
        (4, 4, 2),
        {"first": 6},
    ),
    "flattened, channels first": Case(
        lambda v, x: jnp.tanh(lax.conv(x, v["first"], (1, 1), "SAME")).reshape(len(x), -1) @ v["last"],
        {"first": (6, 2, 3, 3), "last": (96, 3)},
        (2, 4, 4),
        {"first": 6},
    ),
    "flattened maps joined": Case(
        lambda v, x: (
            jnp.concatenate([conv(x, v["first"]).reshape(len(x), -1), conv(x, v["second"]).reshape(len(x), -1)], 1)
            @ v["last"]
        ),
        {"first": (3, 3, 2, 6), "second": (1, 1, 2, 6), "last": (192, 3)},
        (4, 4, 2),
        {"first": 6},
    ),
    "to heads and back": dense(
        lambda h, v: jnp.tanh(h.reshape(-1, 2, 3)).reshape(-1, 6), groups={"first": 2, "first#2": 3}
    ),
    "to heads, transposed": dense(
        lambda h, v: h.reshape(-1, 2, 3).transpose(0, 2, 1).reshape(-1, 6), groups={"first": 2, "first#2": 3}
    ),
    "to pieces that do not fit": none(
        dense(lambda h, v: h.reshape(-1, 2, 3).reshape(-1, 6) + h.reshape(-1, 3, 2).reshape(-1, 6))
    ),
    "stacked": dense(lambda h, v: jnp.stack([h, jax.nn.sigmoid(h)], 1).sum(1)),
    "unstacked": dense(
        lambda h, v: jnp.multiply(*jnp.unstack(h.reshape(-1, 2, 3), axis=1)), last=3, groups={"first": 3}
    ),
    "tiled": dense(lambda h, v: jnp.tile(h, (1, 2)), last=12),
    "repeated": dense(lambda h, v: jnp.repeat(h, 2, 1), last=12),
    "rolled": dense(lambda h, v: jnp.roll(h, 2, 1)),
    "of several kernels": dense(
        lambda h, v: h @ (v["second"] + v["down"] @ v["up"]),
        second=(6, 7),
        down=(6, 2),
        last=7,
        up=(2, 7),
        groups={"down": 6, "second": 7},
    ),
    "each with each": dense(lambda h, v: (h[:, :, None] * h[:, None]).reshape(len(h), -1), last=36),
    "largest of a pair": dense(lambda h, v: h.reshape(-1, 3, 2).max(2), last=3, groups={"first": 3}),
    "maximum": none(dense(lambda h, v: h - h.max(1, keepdims=True))),
    "softmax": none(dense(lambda h, v: jax.nn.softmax(h, 1))),
    "softmax without a maximum": none(dense(lambda h, v: jnp.exp(h) / jnp.exp(h).sum(1, keepdims=True))),
    "sum": dense(lambda h, v: h * h.sum(1, keepdims=True)),
    "sum of a gate": none(dense(lambda h, v: h * jax.nn.sigmoid(h).sum(1, keepdims=True))),
    "sum of a gate by a product": none(dense(lambda h, v: h * (jax.nn.sigmoid(h) @ jnp.ones((6, 1))))),
    "sum of a gate by a batched product": none(
        dense(lambda h, v: h * jnp.einsum("nc,c->nc", jax.nn.sigmoid(h), jnp.ones(6)).sum(1, keepdims=True))
    ),
    "zeros in a sum of a gate": none(
        dense(lambda h, v: h * jax.nn.sigmoid(jnp.pad(h, ((0, 0), (0, 2)))).sum(1, keepdims=True))
    ),
    "running sum": none(dense(lambda h, v: jnp.cumsum(h, 1))),
    "running sum of examples": dense(lambda h, v: jnp.cumsum(h, 0)),
    "sorted": none(dense(lambda h, v: jnp.sort(h, 1))),
    "sorted examples": dense(lambda h, v: jnp.sort(h, 0)),
    "largest": none(dense(lambda h, v: lax.top_k(h, 4)[0], last=4)),
    "where the largest are": Case(
        lambda v, x: (
            (jnp.tanh(conv(x, v["first"])).mean(1).argmax(1) + 1.0).sum(1, keepdims=True) * v["last"]
            + conv(x, v["other"]).mean((1, 2)) @ v["end"]
        ),
        {"first": (3, 3, 2, 6), "last": (1, 3), "other": (1, 1, 2, 4), "end": (4, 3)},
        (4, 4, 2),
        {"other": 4},
    ),
    "places of the largest": Case(
        lambda v, x: (
            lax.top_k(jnp.swapaxes(conv(x, v["first"]).mean(1), 1, 2), 2)[1].sum((1, 2))[:, None] * v["last"]
            + conv(x, v["other"]).mean((1, 2)) @ v["end"]
        ),
        {"first": (3, 3, 2, 6), "last": (1, 3), "other": (1, 1, 2, 4), "end": (4, 3)},
        (4, 4, 2),
        {"other": 4},
    ),
    "dynamic slice of places": Case(
        lambda v, x: (
            lax.dynamic_slice_in_dim(conv(x, v["first"]), jnp.int32(x.sum() > 0), 2, 1).mean((1, 2)) @ v["last"]
        ),
        {"first": (3, 3, 2, 6), "last": (6, 3)},
        (4, 4, 2),
        {"first": 6},
    ),
    "dynamic update of places": Case(
        lambda v, x: (
            lax.dynamic_update_slice_in_dim(conv(x, v["first"]), conv(x, v["first"])[:, :2] * 2, jnp.int32(1), 1).mean((
                1,
                2,
            ))
            @ v["last"]
        ),
        {"first": (3, 3, 2, 6), "last": (6, 3)},
        (4, 4, 2),
        {"first": 6},
    ),
    "dynamic slice of channels": none(dense(lambda h, v: lax.dynamic_slice_in_dim(h, 1, 4, 1), last=4)),
    "dynamic slice of zeros around": none(
        dense(lambda h, v: lax.dynamic_slice_in_dim(jnp.pad(h, ((0, 0), (2, 1))), 1, 4, 1), last=4)
    ),
    "means of neighbours": none(dense(lambda h, v: lax.reduce_window(h, 0.0, lax.add, (1, 3), (1, 1), "SAME"))),
    "response normalisation of zeros around": none(
        dense(
            lambda h, v: lax.reduce_window(jnp.pad(h, ((0, 0), (2, 1))), 0.0, lax.add, (1, 3), (1, 1), "SAME"), last=9
        )
    ),
    "pooled": image(lambda h, v: lax.reduce_window(h, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")),
    "pooled from one": Case(
        lambda v, x: (
            (lax.reduce_window(conv(x, v["first"]), 1.0, lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "VALID").sum((1, 2, 3)))[
                :, None
            ]
            * v["last"]
            + conv(x, v["other"]).mean((1, 2)) @ v["end"]
        ),
        {"first": (3, 3, 2, 6), "last": (1, 3), "other": (1, 1, 2, 4), "end": (4, 3)},
        (4, 4, 2),
        {"other": 4},
    ),
    "reduced by a function": Case(
        lambda v, x: (
            lax.reduce(conv(x, v["first"]), 0.0, lambda a, b: a + 2 * b, (1, 2)) @ v["last"]
            + conv(x, v["other"]).mean((1, 2)) @ v["end"]
        ),
        {"first": (3, 3, 2, 6), "last": (6, 3), "other": (1, 1, 2, 4), "end": (4, 3)},
        (4, 4, 2),
        {"other": 4},
        unknown="barrier",
    ),
}
if "axis" in inspect.signature(lax.top_k).parameters:
    CASES["largest of another axis"] = Case(
        lambda v, x: lax.top_k(conv(x, v["first"]), 2, axis=1)[0].mean((1, 2)) @ v["last"],
        {"first": (3, 3, 2, 6), "last": (6, 3)},
        (4, 4, 2),
        {"first": 6},
    )


@pytest.mark.parametrize("name", CASES)
def test_masked_is_shrunk(name):
    @hypothesis.settings(max_examples=2)
    @hypothesis.given(st.integers(0, 2**16))
    def hold(seed):
        check(CASES[name], "joint", [seed])

    hold()
