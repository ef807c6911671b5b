"""Gradients whose activations are computed again: the same numbers from less memory."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import woodjax as wj

# Equality to rounding says more in double precision.
pytestmark = pytest.mark.usefixtures("x64")

KEY = jax.random.key(0)
LAYERS, WIDTH = 6, 16
SCALE = jnp.linspace(0.5, 1.5, WIDTH)


@jax.custom_vjp
def half_gradient(x):
    return x**2


half_gradient.defvjp(lambda x: (x**2, x), lambda x, g: (x * g,))


def unrolled(params, example):
    x, y = example
    for w in params["w"]:
        x = jax.nn.gelu(jax.nn.relu(x @ w) + x)
    return jnp.mean((x @ params["out"] - y) ** 2)


def scanned(params, example):
    x, y = example
    x = lax.scan(lambda c, w: (jax.nn.gelu(jnp.tanh(c @ w) + c), None), x, jnp.stack(params["w"]))[0]
    return jnp.mean((x @ params["out"] - y) ** 2)


def every_kind(params, example):
    """Calls, branches, loops with constants and results, rules of its own, checkpoints, constants, integers."""
    x, y = example
    w = params["w"]

    def layer(carry, w):
        state, count = carry
        state = jnp.tanh(state @ w) * SCALE + 0.1 * (x @ w)
        return (state, count + 1), jnp.sum(state)

    (x, count), sums = lax.scan(layer, (x, jnp.int32(0)), jnp.stack(w[:3]), reverse=True, unroll=2)
    inner = jax.checkpoint(lambda c, w: (jnp.sin(c @ w), c))
    x = lax.scan(lambda c, w: inner(c, w), x, jnp.stack(w[3:5]))[0]
    x = lax.cond(sums[0] > 0, lambda x: jnp.sin(x @ w[5]), lambda x: jnp.cos(x), x)
    x = jax.jit(lambda x: half_gradient(x) + jax.nn.relu(x - 0.1))(x)
    x = x * count + jnp.where(jnp.arange(WIDTH) % 2 == 0, x, jax.nn.logsumexp(x, axis=-1, keepdims=True))
    return jnp.mean((x @ params["out"] - y) ** 2) + 0.0 * len(w)


def problem(seed=0, n=6, places=5, layers=LAYERS, dtype=np.float64):
    rng = np.random.default_rng(seed)
    make = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)
    params = {"out": make(WIDTH), "w": [0.2 * make(WIDTH, WIDTH) for _ in range(layers)]}
    return params, (make(n, places, WIDTH), make(n, places))


def assert_same(found, expected, rtol=1e-13):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * np.abs(b).max())


@pytest.mark.parametrize("loss_fn", [unrolled, scanned, every_kind])
@pytest.mark.parametrize("seed", [0, 1])
def test_gradients_are_the_same(loss_fn, seed):
    params, batch = problem(seed)
    gradients = partial(wj.per_example_gradients, loss_fn, params, batch, check=False)
    expected = gradients()
    assert float(jnp.abs(expected["w"][0]).max()) > 0
    assert_same(gradients(remat=True), expected)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("options", [{"microbatch_size": 4}, {"examples_per_gradient": 2}])
def test_with_micro_batches_and_groups(options, jit):
    params, batch = problem()

    def rows(params, batch, remat):
        return wj.per_example_gradients(scanned, params, batch, remat=remat, check=False, **options)

    found = (jax.jit(rows, static_argnums=2) if jit else rows)(params, batch, True)
    assert_same(found, rows(params, batch, False))


def test_streams_answer_the_same():
    params, batch = problem()
    masks = jax.tree.map(lambda w: w > -0.1, params)
    options = {"microbatch_size": 2, "examples_per_gradient": 2, "signs": KEY, "masks": masks, "check": False}
    plain, again = (wj.stream_gradients(scanned, params, batch, remat=remat, **options) for remat in (False, True))
    assert_same(again.collect(), plain.collect())
    assert_same(again.combine(jnp.arange(3.0)), plain.combine(jnp.arange(3.0)))
    assert_same(again.products(params), plain.products(params))


def test_losses_that_carry_arrays():
    params, batch = problem()
    carried = jax.tree_util.Partial(lambda scale, p, e: scale * every_kind(p, e), jnp.float32(2.0))
    found = wj.per_example_gradients(carried, params, batch, remat=True)
    assert_same(found, jax.tree.map(lambda g: 2 * g, wj.per_example_gradients(every_kind, params, batch)))


@pytest.mark.parametrize(("dtype", "rtol"), [(jnp.bfloat16, 2e-2), (jnp.float32, 1e-5)])
def test_narrower_types(dtype, rtol):
    params, batch = problem(layers=2, dtype=dtype)
    gradients = partial(wj.per_example_gradients, unrolled, params, batch, check=False)
    assert_same(gradients(remat=True), gradients(), rtol)


def temporary_bytes(loss_fn, remat):
    params, batch = problem(n=4, places=128, layers=24, dtype=np.float32)
    rows = lambda p, b: wj.per_example_gradients(loss_fn, p, b, remat=remat, check=False)
    return jax.jit(rows).lower(params, batch).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(("loss_fn", "times"), [(scanned, 5), (unrolled, 1.7)])
def test_they_take_less_memory(loss_fn, times):
    assert temporary_bytes(loss_fn, True) < temporary_bytes(loss_fn, False) / times


def test_a_checkpoint_round_the_whole_loss_does_not():
    assert temporary_bytes(jax.checkpoint(scanned), False) >= temporary_bytes(scanned, False)
