"""Row blocks from inputs and output gradients, against the gradients that they stand for."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import woodjax as wj
from woodjax.adapters import linen as linen_adapter
from woodjax.loss_rows import LossRow
from woodjax.losses import cross_entropy
from woodjax.taps import TapRow, dense_leaves


def mlp(p, x):
    """`tied` is used twice and `scale` is no kernel of a vector: neither can be tapped."""
    x = jax.nn.relu(x @ p["first"] + p["bias"])
    x = jnp.tanh(x @ p["tied"]) @ p["tied"]
    return jax.jit(lambda x, w: x @ w)(x * p["scale"][0], p["last"])


def network():
    rng = np.random.default_rng(0)
    shapes = {"bias": (4,), "first": (3, 4), "last": (4, 2), "scale": (2, 4), "tied": (4, 4)}
    params = {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}
    batch = jnp.asarray(rng.standard_normal((11, 3)), jnp.float32), jnp.asarray(rng.integers(0, 2, 11))
    return cross_entropy(mlp), params, batch


def shapes_of(batch):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batch)


def test_dense_leaves_are_found_in_the_program():
    loss_fn, params, batch = network()
    names = sorted(params)
    assert [names[i] for i in dense_leaves(loss_fn, params, shapes_of(batch))] == ["first", "last"]
    penalised = lambda p, e: loss_fn(p, e) + jnp.sum(p["first"] ** 2)
    assert [names[i] for i in dense_leaves(penalised, params, shapes_of(batch))] == ["last"]


def test_a_tap_is_the_two_factors_of_the_gradient():
    loss_fn, params, batch = network()
    example = jax.tree.map(lambda x: x[0], batch)
    expected = jax.grad(loss_fn)(params, example)
    gradients, taps = TapRow(LossRow(loss_fn, False), (1, 2))(params, example)
    for leaf, name in ((1, "first"), (2, "last")):
        outer = jnp.outer(taps[leaf].inputs, taps[leaf].output_gradient)
        np.testing.assert_allclose(outer, expected[name], rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(gradients[name], expected[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("group", [1, 11])
@pytest.mark.parametrize("masked", [False, True])
def test_row_blocks_are_those_of_the_gradients(group, masked):
    loss_fn, params, batch = network()
    rng = np.random.default_rng(1)
    masks = jax.tree.map(lambda w: jnp.asarray(rng.random(w.shape) < 0.7), params) if masked else None
    options = {"examples_per_gradient": group, "check": False}
    rows = wj.per_example_gradients(loss_fn, params, batch, **options)
    rows = rows if masks is None else wj.apply_masks(rows, masks)
    stream = wj.stream_gradients(loss_fn, params, batch, masks=masks, microbatch_size=4, **options)
    found = wj.row_fisher(stream, damping=0.01).inverse_diagonal()
    np.testing.assert_array_equal(found["bias"], 0)
    for name in ("first", "last", "scale", "tied"):
        for unit in range(params[name].shape[1]):
            expected = np.diag(np.linalg.inv(oracle.fisher(rows[name][..., unit], 0.01)))
            np.testing.assert_allclose(found[name][:, unit], expected, rtol=2e-3)


def test_convolutions_have_rows_too():
    import flax.linen as nn

    module = nn.Sequential([nn.Conv(4, (2, 2)), nn.relu, lambda x: x.mean((1, 2)), nn.Dense(3)])
    inputs = jax.random.normal(jax.random.key(0), (6, 5, 5, 2))
    apply_fn, params = linen_adapter.functional(module, module.init(jax.random.key(1), inputs))
    loss_fn, batch = cross_entropy(apply_fn), (inputs, jnp.arange(6) % 3)
    rows = wj.per_example_gradients(loss_fn, params, batch)
    found = wj.row_fisher(wj.stream_gradients(loss_fn, params, batch), damping=0.1).inverse_diagonal()
    for kernel, unit in (("layers_0", 1), ("layers_3", 2)):
        gradient = np.asarray(rows[kernel]["kernel"])[..., unit].reshape(6, -1)
        expected = np.diag(np.linalg.inv(oracle.fisher(gradient, 0.1)))
        np.testing.assert_allclose(found[kernel]["kernel"][..., unit].reshape(-1), expected, rtol=1e-4)


def test_relative_damping_counts_live_weights():
    loss_fn, params, batch = network()
    rows = wj.per_example_gradients(loss_fn, params, batch)
    squares = np.concatenate([np.mean(rows[k] ** 2, axis=0).ravel() for k in ("first", "last", "scale", "tied")])
    fisher = wj.row_fisher(wj.stream_gradients(loss_fn, params, batch), damping=wj.Relative(0.1))
    np.testing.assert_allclose(fisher.damping, 0.1 * squares[squares > 0].mean(), rtol=1e-4)


def test_what_it_does_not_take():
    loss_fn, params, batch = network()
    with pytest.raises(ValueError, match="takes a stream"):
        wj.row_fisher(wj.per_example_gradients(loss_fn, params, batch))
    with pytest.raises(ValueError, match="not offered"):
        wj.row_fisher(wj.stream_gradients(loss_fn, params, batch), damping="auto")
