"""Hessian products and diagonals against the dense Hessian."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.flatten_util import ravel_pytree

import woodjax as wj
from woodjax.losses import cross_entropy

KEY = jax.random.key(0)


def relu_network(p, x):
    return jax.nn.relu(x @ p["first"] + p["bias"]) @ p["last"]


def smooth_network(p, x):
    return jnp.tanh(x @ p["first"] + p["bias"]) @ p["last"]


LOSSES = {network: cross_entropy(network) for network in (relu_network, smooth_network)}


def problem(seed=0, n=11):
    rng = np.random.default_rng(seed)
    shapes = {"bias": (5,), "first": (4, 5), "last": (5, 3)}
    params = {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}
    return params, (jnp.asarray(rng.standard_normal((n, 4)), jnp.float32), jnp.asarray(rng.integers(0, 3, n)))


@partial(jax.jit, static_argnames="network")
def dense_hessian(params, batch, network):
    flat, back = ravel_pytree(params)
    mean = lambda w: jnp.mean(jax.vmap(LOSSES[network], in_axes=(None, 0))(back(w), batch))
    return jax.hessian(mean)(flat)


def wide(x):
    return x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x


def flat(tree):
    return np.asarray(ravel_pytree(tree)[0])


@pytest.mark.parametrize("microbatch_size", [None, 4])
@settings(max_examples=5)
@given(seed=st.integers(0, 1000))
def test_products_are_those_of_the_dense_hessian(microbatch_size, seed):
    params, batch = problem(seed)
    vector = jax.tree.map(lambda w: jnp.asarray(np.random.default_rng(seed).standard_normal(w.shape), w.dtype), params)
    found = wj.hvp(LOSSES[smooth_network], params, batch, vector, microbatch_size=microbatch_size)
    expected = np.asarray(dense_hessian(params, batch, smooth_network)) @ flat(vector)
    np.testing.assert_allclose(flat(found), expected, atol=2e-6 * np.abs(expected).max())


def test_products_in_jit_and_half_precision():
    params, batch = problem()
    product = partial(wj.hvp, LOSSES[relu_network], microbatch_size=4)
    compiled = jax.jit(product)(params, batch, params)
    np.testing.assert_allclose(flat(compiled), flat(product(params, batch, params)), rtol=1e-5, atol=1e-6)
    half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
    found = product(half, batch, half)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype("float32")}
    np.testing.assert_allclose(flat(found), flat(compiled), atol=0.05 * np.abs(flat(compiled)).max())


@pytest.mark.usefixtures("x64")
@settings(max_examples=10)
@given(seed=st.integers(0, 1000))
def test_gauss_newton_diagonal_of_relus_is_that_of_the_hessian(seed):
    params, batch = problem(seed)
    unit = lambda q: np.eye(40, dtype=np.float32)[q]
    _, back = ravel_pytree(params)
    exact = np.asarray(dense_hessian(*jax.tree.map(wide, (params, batch)), relu_network))
    one = wj.hvp(LOSSES[relu_network], params, batch, back(unit(seed % 40)))  # H eᵢ itself
    found = flat(wj.gauss_newton_diagonal(relu_network, params, batch[0], microbatch_size=4))
    np.testing.assert_allclose(flat(one)[seed % 40], found[seed % 40], rtol=1e-5, atol=1e-7 * found.max())
    np.testing.assert_allclose(found, np.diag(exact), rtol=1e-5, atol=1e-6 * found.max())


def test_gauss_newton_diagonal_is_that_of_the_exact_fisher():
    """Not of the Hessian where the network is smooth."""
    params, batch = problem()
    rows = wj.all_class_gradients(smooth_network, params, batch[0])
    expected = jax.tree.map(lambda g: jnp.mean(g**2, axis=0), rows)
    found = wj.gauss_newton_diagonal(smooth_network, params, batch[0], microbatch_size=5)
    np.testing.assert_allclose(flat(found), flat(expected), rtol=1e-5)
    compiled = jax.jit(partial(wj.gauss_newton_diagonal, smooth_network, microbatch_size=5))(params, batch[0])
    np.testing.assert_allclose(flat(compiled), flat(found), rtol=1e-5)
    gap = flat(found) - np.diag(dense_hessian(params, batch, smooth_network))
    assert np.abs(gap).max() > 1e-2 * flat(found).max()


def convolutions(p, x, smooth=False):
    """Convolution, batch normalisation in eval mode (or layer normalisation), ReLU (or GELU), max-pooling, twice."""
    for layer in (p["first"], p["second"]):
        x = jax.lax.conv_general_dilated(x, layer["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        if smooth:
            x = jax.nn.gelu(jax.nn.standardize(x) * layer["scale"] + layer["bias"])
        else:
            x = jax.nn.relu((x - 0.1) / jnp.sqrt(1.5) * layer["scale"] + layer["bias"])
        x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    return x.mean((1, 2)) @ p["last"]


@pytest.mark.parametrize("smooth", [False, True])
def test_gauss_newton_diagonal_of_a_convolutional_network(smooth):
    """That of the Hessian with ReLUs and batch normalisation in eval mode, and only positive without."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(0.5 * rng.standard_normal(shape), jnp.float32)
    layer = lambda inputs: {"kernel": normal(3, 3, inputs, 4), "scale": 1 + normal(4), "bias": normal(4)}
    params = {"first": layer(2), "last": normal(4, 3), "second": layer(4)}
    batch = (2 * normal(3, 8, 8, 2), jnp.array([0, 1, 2]))
    network = partial(convolutions, smooth=smooth)
    found, back = ravel_pytree(wj.gauss_newton_diagonal(network, params, batch[0], microbatch_size=3))
    loss_fn, chosen = cross_entropy(network), rng.choice(found.size, 24, replace=False)
    units = [back(jnp.zeros(found.size).at[q].set(1)) for q in chosen]
    exact = np.array([flat(wj.hvp(loss_fn, params, batch, unit))[q] for q, unit in zip(chosen, units, strict=True)])
    error = np.linalg.norm(found[chosen] - exact) / np.linalg.norm(exact)
    assert error > 0.01 if smooth else error < 1e-5
    assert found.min() >= 0
    if smooth:
        assert exact.min() < 0


@pytest.mark.parametrize("microbatch_size", [None, 4])
def test_hutchinson_agrees_within_its_standard_error(microbatch_size):
    params, batch = problem()
    options = {"probes": 400, "microbatch_size": microbatch_size, "check": False}
    estimate = partial(wj.hutchinson_diagonal, LOSSES[smooth_network], **options)
    found = jax.jit(estimate)(params, batch, KEY)
    exact = np.asarray(dense_hessian(params, batch, smooth_network))
    errors = (flat(found.diagonal) - np.diag(exact)) / flat(found.standard_error)
    assert 0.6 < np.sqrt(np.mean(errors**2)) < 1.4  # 40 entries
    if microbatch_size is None:  # the variance of one probe is known
        spread = np.sqrt((np.sum(exact**2, axis=1) - np.diag(exact) ** 2) / 400)
        np.testing.assert_allclose(flat(found.standard_error), spread, rtol=0.25)
    else:
        outside = estimate(params, batch, KEY)
        np.testing.assert_allclose(flat(outside.diagonal), flat(found.diagonal), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(flat(outside.standard_error), flat(found.standard_error), rtol=1e-3)


def test_hutchinson_by_hand():
    """A diagonal Hessian has no variance, whatever its signs."""
    loss = lambda w, x: jnp.sum(x * w**2)
    found = wj.hutchinson_diagonal(loss, jnp.ones(3), jnp.array([[1.0, -2.0, 0.0], [3.0, 0.0, 0.0]]), KEY, probes=3)
    np.testing.assert_allclose(found.diagonal, [4, -2, 0], rtol=1e-6)
    np.testing.assert_array_equal(found.standard_error, 0)


def test_a_diagonal_becomes_a_curvature():
    diagonal = {"b": jnp.array([1.0]), "w": jnp.array([[3.0, -2.0], [0.0, 1.0]])}
    clipped = wj.diagonal_curvature(diagonal, damping=0.5)
    np.testing.assert_allclose(clipped.diagonal()["w"], [[3.5, 0.5], [0.5, 1.5]])
    np.testing.assert_array_equal(clipped.inverse_diagonal()["b"], 0)
    absolute = wj.diagonal_curvature(diagonal, damping=wj.Relative(0.5), negative="absolute")
    np.testing.assert_allclose(absolute.diagonal()["w"], [[4, 3], [1, 2]])  # the mean of 3, 2 and 1 is 2
    broken = wj.diagonal_curvature({"w": jnp.array([[1.0, jnp.nan, jnp.inf]])}, damping=1.0)
    assert np.isnan(wj.obs_scores({"w": jnp.ones((1, 3))}, broken)["w"][0, 1:]).all()
    masks = {"b": jnp.ones(1, bool), "w": jnp.array([[True, False], [True, True]])}
    updates = wj.compensate(diagonal, masks, clipped)
    np.testing.assert_allclose(updates["w"], [[0, 2], [0, 0]])
    assert isinstance(clipped, wj.Curvature)


def test_bad_arguments():
    params, batch = problem()
    loss_fn = LOSSES[relu_network]
    with pytest.raises(ValueError, match="probes is 1"):
        wj.hutchinson_diagonal(loss_fn, params, batch, KEY, probes=1)
    with pytest.raises(ValueError, match="microbatch_size is 0"):
        wj.hvp(loss_fn, params, batch, params, microbatch_size=0)
    with pytest.raises(ValueError, match="microbatch_size is 0"):
        wj.gauss_newton_diagonal(relu_network, params, batch[0], microbatch_size=0)
    with pytest.raises(ValueError, match="vector: leaf 'bias' has shape"):
        wj.hvp(loss_fn, params, batch, params | {"bias": jnp.ones(6)})
    with pytest.raises(ValueError, match="expected logits"):
        wj.gauss_newton_diagonal(lambda p, x: relu_network(p, x)[0], params, batch[0])
    noisy = lambda p, e: loss_fn(p, e) * jax.random.normal(jax.random.key(0))
    with pytest.raises(ValueError, match="draws random numbers"):
        wj.hutchinson_diagonal(noisy, params, batch, KEY)
    with pytest.raises(ValueError, match="negative is 'keep'"):
        wj.diagonal_curvature(params, negative="keep")
    with pytest.raises(ValueError, match="not offered"):
        wj.diagonal_curvature(params, damping="auto")
