"""A stream answers as the gradients would that it stands for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import woodjax as wj


def loss_fn(params, example):
    x, y = example
    return (jnp.tanh(x @ params["w1"] + params["b"]) @ params["w2"] - y) ** 2


# Rows, micro-batch, examples of a row. One row; a rest in the last micro-batch, of rows and of examples; none; more
# room than rows, and less than a row takes. Each compiles programs of its own.
SIZES = [(1, 12, 1), (7, 3, 1), (6, 3, 2), (5, 4, 2), (3, 1, 2)]


def problem(n, seed=0):
    rng = np.random.default_rng(seed)
    params = {"b": rng.standard_normal(4), "w1": rng.standard_normal((3, 4)), "w2": rng.standard_normal(4)}
    batch = rng.standard_normal((n, 3)), rng.standard_normal(n)
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (params, batch))


def matrix(gradients):
    return np.concatenate([np.asarray(g, np.float64).reshape(len(g), -1) for g in jax.tree.leaves(gradients)], axis=1)


def vector(tree):
    return np.concatenate([np.asarray(x, np.float64).reshape(-1) for x in jax.tree.leaves(tree)])


@pytest.mark.parametrize("masked", [False, True])
@settings(max_examples=10)
@given(sizes=st.sampled_from(SIZES), seed=st.integers(0, 100))
def test_products_and_combinations(masked, sizes, seed):
    n, microbatch, group = sizes
    params, batch = problem(n * group, seed)
    rng = np.random.default_rng(seed)
    masks = jax.tree.map(lambda w: rng.random(w.shape) < 0.5, params) if masked else None
    options = {"examples_per_gradient": group, "check": False}
    stream = wj.stream_gradients(loss_fn, params, batch, masks=masks, microbatch_size=microbatch, **options)
    rows = wj.per_example_gradients(loss_fn, params, batch, **options)
    dense = matrix(rows if masks is None else wj.apply_masks(rows, masks))
    assert stream.num_rows == n == len(dense)
    direction, coefficients = problem(1, seed + 1)[0], rng.standard_normal(n).astype(np.float32)
    np.testing.assert_allclose(matrix(stream.collect()), dense, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(stream.products(direction), dense @ vector(direction), rtol=1e-3, atol=1e-3)
    combined = stream.combine(jnp.asarray(coefficients))
    np.testing.assert_allclose(vector(combined), dense.T @ coefficients, rtol=1e-3, atol=1e-3)


def test_a_stream_under_jit_is_traced_once():
    params, batch = problem(6)
    traces = []

    @jax.jit
    def products(params, batch):
        traces.append(1)
        return wj.stream_gradients(loss_fn, params, batch, microbatch_size=4).products(params)

    expected = wj.stream_gradients(loss_fn, params, batch, microbatch_size=4).products(params)
    for _ in range(2):
        np.testing.assert_allclose(products(params, batch), expected, rtol=1e-5)
    assert len(traces) == 1


def test_what_is_passed_in_is_not_taken_over():
    params, batch = problem(6)
    stream = wj.stream_gradients(loss_fn, params, batch, microbatch_size=4)
    before = jax.tree.map(np.array, (params, batch))
    wj.block_fisher(stream, block_size=3, damping=0.1)
    wj.low_rank_fisher(stream, damping=0.1).solve(params)
    wj.streamed_fisher(stream, window_size=3, damping=0.1).solve(params)
    stream.combine(jnp.ones(6))
    jax.tree.map(np.testing.assert_array_equal, before, (params, batch))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"microbatch_size": 0}, "microbatch_size is 0"),
        ({"examples_per_gradient": 4}, "pass a divisor of 6"),
        ({"params": {"w": jnp.ones(3, int)}}, "Leaf 'w' is int32"),
        ({"batch": (jnp.ones((6, 3)), jnp.ones(5))}, "leading sizes"),
        ({"loss_fn": lambda p, e: jax.random.normal(jax.random.key(0))}, "random"),
    ],
)
def test_bad_streams(change, message):
    params, batch = problem(6)
    arguments = {"loss_fn": loss_fn, "params": params, "batch": batch} | change
    with pytest.raises(ValueError, match=message):
        wj.stream_gradients(**arguments)


def test_bad_questions():
    params, batch = problem(6)
    stream = wj.stream_gradients(loss_fn, params, batch)
    with pytest.raises(ValueError, match="expected one for each of 6 rows"):
        stream.combine(jnp.ones(5))
    with pytest.raises(ValueError, match="vector: leaf 'b' has shape"):
        stream.products(params | {"b": jnp.ones(3)})
    masks = jax.tree.map(lambda w: jnp.ones(w.shape, bool), params)
    with pytest.raises(ValueError, match="masks: leaf 'b' has shape"):
        wj.stream_gradients(loss_fn, params, batch, masks=masks | {"b": jnp.ones(1, bool)})
    with pytest.raises(ValueError, match="masks are bool"):
        wj.stream_gradients(loss_fn, params, batch, masks=masks | {"b": jnp.ones(4, int)})


def test_bfloat16_parameters_are_multiplied_in_float32():
    params, batch = problem(40)
    narrow = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
    stream = wj.stream_gradients(loss_fn, narrow, batch)
    wide = jax.tree.map(lambda w: w.astype(jnp.float32), narrow)
    exact = wj.low_rank_fisher(wj.per_example_gradients(loss_fn, wide, batch), damping=1e-3)
    direction = stream.combine(jnp.ones(40) / 40)
    found = wj.streamed_fisher(stream, window_size=5, damping=1e-3).solve(direction)
    expected = exact.solve(direction)
    np.testing.assert_allclose(found["w1"], expected["w1"], rtol=0.2, atol=0.05 * np.abs(expected["w1"]).max())


@pytest.mark.usefixtures("x64")
def test_float64_mode():
    params, batch = problem(6)
    params, batch = jax.tree.map(lambda x: x.astype(jnp.float32), (params, batch))
    stream = wj.stream_gradients(loss_fn, params, batch, microbatch_size=4)
    for fisher in (
        wj.low_rank_fisher(stream, damping=0.1),
        wj.streamed_fisher(stream, window_size=5, damping=0.1),
        wj.block_fisher(stream, block_size=3, damping=0.1),
        wj.row_fisher(stream, damping=0.1),
    ):
        assert fisher.solve(params)["w1"].dtype == jnp.float32


def test_engines_that_need_rows_or_windows_say_so():
    params, batch = problem(6)
    stream = wj.stream_gradients(loss_fn, params, batch)
    with pytest.raises(ValueError, match=r"pass stream\.collect\(\)"):
        wj.block_fisher(stream, engine="dual")
    with pytest.raises(ValueError, match="window_size is 0"):
        wj.streamed_fisher(stream, window_size=0)
