"""Hidden kernels, read from the program: any framework, any name, any way that a kernel takes to its product."""

from functools import partial

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import woodjax as wj
from woodjax.adapters.nnx import functional
from woodjax.kinds import HiddenKernels
from woodjax.models import MLP, resnet20

X = jax.ShapeDtypeStruct((2, 4), jnp.float32)
IDS = jax.ShapeDtypeStruct((2, 5), jnp.int32)


def w(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def hidden(apply_fn, params, inputs=X):
    return set(wj.hidden_kernels(apply_fn, params, inputs).paths)


PAIR = {"a": w(4, 4), "b": w(4, 3)}


def test_perceptron_in_three_frameworks():
    apply_fn, params = functional(MLP((4, 5, 6, 3), rngs=nnx.Rngs(0)))
    assert hidden(apply_fn, params) == {"fc1/kernel", "fc2/kernel"}
    arrays, static = eqx.partition(eqx.nn.MLP(4, 3, 6, 2, key=jax.random.key(0)), eqx.is_inexact_array)
    found = hidden(lambda p, x: jax.vmap(eqx.combine(p, static))(x), arrays)
    assert found == {"layers/0/weight", "layers/1/weight"}
    plain = lambda p, x: jnp.tanh(x @ p["b"] + p["bias"]) @ p["a"]
    assert hidden(plain, {"a": w(3, 2), "b": w(4, 3), "bias": w(1, 3)}) == {"b"}


def test_a_residual_network_keeps_its_head_only():
    model = nnx.eval_shape(lambda: resnet20(nnx.Rngs(0), shortcut="B"))
    model.eval()
    apply_fn, params = functional(model)
    select = wj.hidden_kernels(apply_fn, params, w(1, 32, 32, 3))
    layout = wj.make_layout(params, select=select)
    assert layout.num_weights == 270_896 - 640
    assert [leaf.path for leaf in layout.leaves if leaf.selected != (len(leaf.shape) >= 2)] == ["linear/kernel"]


def test_a_stream_that_is_the_output():
    """The sum after the last block is the output: what ends in it is, the blocks before go through another kernel."""

    def blocks(p, x):
        x = x + jnp.tanh(x @ p["a"]) @ p["b"]
        return x + jnp.tanh(x @ p["c"]) @ p["d"]

    assert hidden(blocks, dict.fromkeys("abcd", w(4, 4))) == {"a", "b", "c"}
    skipping = lambda p, x: (jnp.tanh(x @ p["a"]) @ p["b"]) + x @ p["c"]
    assert hidden(skipping, {"a": w(4, 4), "b": w(4, 3), "c": w(4, 3)}) == {"a"}


def test_what_does_not_reach_the_output_does_not_count():
    def with_dead_head(p, x):
        h = x @ p["a"]
        _ = h @ p["dead"]
        return jnp.tanh(h) @ p["b"]

    assert hidden(with_dead_head, {**PAIR, "dead": w(4, 2)}) == {"a"}
    only_dead = lambda p, x: (x @ p["b"], (x @ p["a"]) @ p["dead"])[0]
    with pytest.raises(ValueError, match=r"output layers: \['b'\]"):
        hidden(only_dead, {**PAIR, "dead": w(4, 2)})


def test_an_output_beside_the_logits():
    def two(p, x):
        features = jnp.tanh(x @ p["a"])
        return {"logits": features @ p["b"], "features": features}

    assert hidden(two, PAIR) == {"a"}


def language_model(tied):
    def apply_fn(p, ids):
        x = p["table"][ids] + p["positions"]
        x = jnp.concatenate([jnp.broadcast_to(p["token"], (2, 1, 4)), x], axis=1)
        q, k, v = jnp.split(jnp.einsum("bnd,de->bne", x, p["qkv"]), 3, axis=-1)
        weights = jax.nn.softmax(jnp.einsum("bnd,bmd->bnm", q, k))
        x = x + jnp.einsum("bnm,bmd->bnd", weights, v) @ p["out"]
        x = x * jnp.einsum("bnd,d->bnd", jnp.ones_like(x), p["scale"])
        return x @ (p["table"].T if tied else p["head"])

    params = {"table": w(7, 4), "positions": w(5, 4), "token": w(1, 4), "qkv": w(4, 12), "out": w(4, 4)}
    return apply_fn, params | {"scale": w(4)} | ({} if tied else {"head": w(4, 7)})


@pytest.mark.parametrize("tied", [False, True])
def test_language_model(tied):
    """Tables, tokens, positions and scales are not multiplied; a table that is the classifier too is the classifier."""
    assert hidden(*language_model(tied), IDS) == {"qkv", "out"}


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        x = x + nn.MultiHeadDotProductAttention(num_heads=2)(nn.LayerNorm()(x))
        return x + nn.Dense(8)(nn.gelu(nn.Dense(16)(nn.LayerNorm()(x)))), None


class Transformer(nn.Module):
    @nn.compact
    def __call__(self, ids):
        table = nn.Embed(11, 8)
        x = table(ids) + self.param("positions", nn.initializers.normal(), (1, 5, 8))
        blocks = nn.scan(nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return table.attend(nn.LayerNorm()(blocks()(x, None)[0]))


def test_a_linen_transformer_of_stacked_layers():
    """Stacked biases have two and three axes, and the table is tied: none of them is a hidden kernel."""
    module, ids = Transformer(), jnp.zeros((2, 5), int)
    params = jax.eval_shape(lambda: module.init(jax.random.key(0), ids))["params"]
    found = hidden(lambda p, x: module.apply({"params": p}, x), params, ids)
    assert {path.split("/", 1)[1] for path in found} == {
        *(f"MultiHeadDotProductAttention_0/{name}/kernel" for name in ("query", "key", "value", "out")),
        "Dense_0/kernel",
        "Dense_1/kernel",
    }


def test_a_tied_table_that_is_multiplied_at_both_ends_is_an_output_layer():
    apply_fn = lambda p, ids: jax.nn.gelu(jax.nn.one_hot(ids, 7) @ p["table"] @ p["mid"]) @ p["table"].T
    assert hidden(apply_fn, {"table": w(7, 4), "mid": w(4, 4)}, IDS) == {"mid"}


WAYS = {
    "reshape": lambda k: k.reshape(8, 2).reshape(4, 4),
    "transpose": lambda k: k.T,
    "cast": lambda k: k.astype(jnp.bfloat16),
    "mask": lambda k: jnp.where(jnp.eye(4) > 0, k, 0),
    "normalised": lambda k: k / jnp.linalg.norm(k, axis=0, keepdims=True),
    "slice": lambda k: k[:, :4],
    "jit": jax.jit(lambda k: 2 * k),
    "concatenated": lambda k: jnp.concatenate([k[:2], k[2:]]),
    "per example": lambda k: jnp.broadcast_to(k, (2, 4, 4)),
    "stop": lax.stop_gradient,
    "joined": lambda k: jnp.concatenate([k[:3], k[:1]]),
    "set": lambda k: k.at[0].set(k[1]),
    "flip": lambda k: k[::-1],
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_kernel_is_followed_through_what_keeps_it(way):
    def apply_fn(p, x):
        kernel = way(p["a"])
        x = x.astype(kernel.dtype)
        y = jnp.einsum("bi,bij->bj", x, kernel) if kernel.ndim == 3 else x @ kernel
        return y.astype(jnp.float32) @ p["b"]

    assert hidden(apply_fn, PAIR) == {"a"}


def test_a_scale_of_a_kernel_is_no_kernel():
    scaled = lambda p, x: (x @ (p["a"] * p["g"])) @ p["b"]
    assert hidden(scaled, {**PAIR, "g": w(1, 4)}) == {"a"}
    spread = lambda p, x: (x @ (p["a"] * p["g"][:, 0])) @ p["b"]
    assert hidden(spread, {**PAIR, "g": w(4, 1)}) == {"a"}
    low_rank = lambda p, x: (x @ (p["a"] + p["u"] @ p["v"])) @ p["b"]
    assert hidden(low_rank, {**PAIR, "u": w(4, 2), "v": w(2, 4)}) == {"a", "u", "v"}


def test_attention_pooling():
    """The broadcast token of the pooling is not a kernel, the kernel that it goes through is."""

    def apply_fn(p, x):
        q = jnp.broadcast_to(p["probe"], (2, 1, 4)) @ p["query"]
        weights = jax.nn.softmax(jnp.einsum("bqd,bnd->bqn", q, x @ p["key"]))
        return (weights @ (x @ p["value"]))[:, 0] @ p["head"]

    params = {name: w(4, 4) for name in ("query", "key", "value")} | {"probe": w(1, 1, 4), "head": w(4, 2)}
    assert hidden(apply_fn, params, w(2, 6, 4)) == {"query", "key", "value"}


def test_wrapped_programs():
    def dense(x, k):
        return jax.nn.silu(jax.nn.relu(x) @ k)

    for wrap in (jax.jit, jax.checkpoint, jax.custom_jvp, jax.custom_vjp):
        layer = wrap(dense)
        if wrap is jax.custom_jvp:
            layer.defjvp(lambda primals, tangents: (dense(*primals), dense(*tangents)))
        if wrap is jax.custom_vjp:
            layer.defvjp(lambda x, k: (dense(x, k), None), lambda _, g: (g, g))
        # The same function at the same shapes twice: one inner program, two products.
        assert hidden(lambda p, x, layer=layer: layer(layer(x, p["a"]), p["b"]), {"a": w(4, 4), "b": w(4, 4)}) == {"a"}


def test_loops():
    stack = {"layers": w(3, 4, 4), "biases": w(3, 4), "b": w(4, 3)}
    body = lambda x, layer: (jnp.tanh(x @ layer["layers"] + layer["biases"]), None)
    scanned = lambda p, x: lax.scan(body, x, {name: p[name] for name in ("layers", "biases")})[0]
    assert hidden(lambda p, x: scanned(p, x) @ p["b"], stack) == {"layers"}
    assert hidden(scanned, stack) == {"layers"}  # the last layer is the output, the others are not
    recurrent = lambda p, x: lax.scan(lambda h, u: (jnp.tanh(h @ p["a"] + u), h @ p["b"]), jnp.zeros((2, 4)), x)[1]
    assert hidden(recurrent, PAIR, w(6, 2, 4)) == {"a"}
    looped = lambda p, x: lax.while_loop(lambda y: y.sum() < 1, lambda y: y @ p["a"], x) @ p["b"]
    assert hidden(looped, PAIR) == {"a"}
    branched = lambda p, x: lax.cond(x.sum() > 0, lambda y: y @ p["a"], lambda y: y @ p["c"], x) @ p["b"]
    assert hidden(branched, {**PAIR, "c": w(4, 4)}) == {"a", "c"}
    last = lambda p, x: lax.cond(x.sum() > 0, lambda y: y @ p["b"], lambda y: y @ p["c"], x @ p["a"])
    assert hidden(last, {**PAIR, "c": w(4, 3)}) == {"a"}


def test_what_prints_is_passed_over():
    def apply_fn(p, x):
        jax.debug.print("{}", x.sum())
        return jnp.tanh(x @ p["a"]) @ p["b"]

    assert hidden(apply_fn, PAIR) == {"a"}


def test_experts():
    grouped = lambda p, x: lax.ragged_dot(x, p["experts"], jnp.array([1, 1])) @ p["b"]
    assert hidden(grouped, {"experts": w(2, 4, 4), "b": w(4, 3)}) == {"experts"}


def test_a_loss_selects_what_the_network_does():
    apply_fn = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]
    example = w(4), jax.ShapeDtypeStruct((), jnp.int32)
    assert hidden(wj.cross_entropy(apply_fn), PAIR, example) == {"a"}


def test_the_selection_is_a_static_argument():
    apply_fn = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]
    params = {"a": jnp.arange(16.0).reshape(4, 4), "b": jnp.zeros((4, 3))}
    select = wj.hidden_kernels(apply_fn, params, X)
    assert select == wj.hidden_kernels(apply_fn, params, X) == HiddenKernels(frozenset(["a"]))
    assert hash(select) == hash(HiddenKernels(frozenset(["a"])))
    traces = []

    @partial(jax.jit, static_argnums=1)
    def masks(params, select):
        traces.append(1)
        return wj.make_masks(wj.magnitude_scores(params, select=select), 0.25)

    for _ in range(2):
        found = masks(params, wj.hidden_kernels(apply_fn, params, X))
    assert len(traces) == 1
    assert found["b"].all()
    np.testing.assert_array_equal(~found["a"], np.arange(16).reshape(4, 4) < 4)
    inside = jax.jit(lambda p, x: wj.hidden_kernels(apply_fn, p, x)("a", None) * x)
    assert inside(params, jnp.ones((2, 4))).all()


def test_errors():
    with pytest.raises(ValueError, match=r"does not depend on any of the leaves \['a', 'b'\]"):
        hidden(lambda p, x: x, PAIR)
    with pytest.raises(ValueError, match=r"No hidden kernel among \['a', 'b'\]; output layers: \['b'\]"):
        hidden(lambda p, x: x @ p["b"], PAIR)
    with pytest.raises(ValueError, match=r"No hidden kernel .* output layers: \[\]"):
        hidden(lambda p, x: x + p["v"], {"v": w(4)})
    solve = lambda p, x: lax.custom_linear_solve(lambda v: p["a"] @ v, x[0], lambda mv, b: b, symmetric=True)
    with pytest.raises(ValueError, match="A product inside a custom_linear_solve"):
        hidden(solve, PAIR)
