"""Kronecker and layer-input curvatures against dense matrices."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import woodjax as wj
from woodjax.losses import cross_entropy

NAMES = ("first", "last")
BUILDERS = {"kronecker": wj.kronecker_fisher, "inputs": wj.layer_input_hessian}


def mlp(p, x):
    return jnp.tanh(x @ p["first"] + p["bias"]) @ p["last"]


LOSS = cross_entropy(mlp)


def problem(seed=0, distinct=11, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    shapes = {"bias": (5,), "first": (6, 5), "last": (5, 3)}
    params = {name: jnp.asarray(rng.standard_normal(shape), dtype) for name, shape in shapes.items()}
    batch = jnp.asarray(rng.standard_normal((11, 6)), dtype), jnp.asarray(rng.integers(0, 3, 11))
    return params, jax.tree.map(lambda x: x[np.arange(11) % distinct], batch)


def stream_of(params, batch):
    return wj.stream_gradients(LOSS, params, batch, microbatch_size=4, check=False)


def factors(params, batch):
    """Inputs and output gradients of both layers, in float64 and by hand."""
    p, (x, labels) = {k: np.asarray(v, np.float64) for k, v in params.items()}, batch
    x = np.asarray(x, np.float64)
    hidden = np.tanh(x @ p["first"] + p["bias"])
    logits = hidden @ p["last"]
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    last = odds / odds.sum(axis=1, keepdims=True) - np.eye(3)[np.asarray(labels)]
    return {"first": (x, last @ p["last"].T * (1 - hidden**2)), "last": (hidden, last)}


def hessians(kind, params, batch, damping):
    """Dense `H [in · out, in · out]` of each kernel, flattened in row-major order."""
    found = {}
    for name, (a, delta) in factors(params, batch).items():
        A, S = a.T @ a / len(a), delta.T @ delta / len(a)
        if kind == "inputs":
            found[name] = np.kron(2 * A + damping * np.eye(len(A)), np.eye(len(S)))
        else:
            pi = np.sqrt(np.trace(A) / len(A) / (np.trace(S) / len(S)))
            root = np.sqrt(damping)
            found[name] = np.kron(A + pi * root * np.eye(len(A)), S + root / pi * np.eye(len(S)))
    return found


@pytest.mark.parametrize("kind", BUILDERS)
@settings(max_examples=8)
@given(seed=st.integers(0, 1000))
def test_answers_are_those_of_dense_matrices(kind, seed):
    params, batch = problem(seed)
    curvature = BUILDERS[kind](stream_of(params, batch), damping=0.01)
    rng = np.random.default_rng(seed)
    vector = jax.tree.map(lambda w: jnp.asarray(rng.standard_normal(w.shape), jnp.float32), params)
    masks = jax.tree.map(lambda w: jnp.asarray(rng.random(w.shape) < 0.5), params)
    answers = [curvature.inverse_diagonal(), curvature.solve(vector), curvature.matvec(vector)]
    answers += [curvature.compensate(params, masks), curvature.compensate(params, masks, vector)]
    for answer in answers:
        np.testing.assert_array_equal(answer["bias"], 0)
    for name, hessian in hessians(kind, params, batch, 0.01).items():
        v, w, g = (np.asarray(x[name], np.float64).ravel() for x in (vector, params, vector))
        pruned = ~np.asarray(masks[name]).ravel()
        expected = [np.diag(np.linalg.inv(hessian)), np.linalg.solve(hessian, v), hessian @ v]
        expected += [oracle.constrained_minimiser(hessian, w, pruned, first) for first in (None, g)]
        for found, dense in zip(answers, expected, strict=True):
            np.testing.assert_allclose(found[name].ravel(), dense, atol=3e-4 * np.abs(dense).max())


@pytest.mark.parametrize("kind", BUILDERS)
def test_protocol_relative_damping_and_removed_weights(kind):
    params, batch = problem(distinct=4)  # singular: fewer examples than inputs
    build = partial(BUILDERS[kind], damping=wj.Relative(0.1))
    curvature = build(stream_of(params, batch))
    assert isinstance(curvature, wj.Curvature)
    plain = hessians("inputs", params, batch, 0.0) if kind == "inputs" else None
    squares = [
        np.diag(plain[name])
        if plain
        else np.outer(*(np.mean(x**2, axis=0) for x in factors(params, batch)[name])).ravel()
        for name in NAMES
    ]
    np.testing.assert_allclose(curvature.damping, 0.1 * np.concatenate(squares).mean(), rtol=1e-4)
    assert curvature.raised == 0
    scores = wj.obs_scores(params, curvature)
    assert np.isposinf(scores["bias"]).all()
    masks = wj.make_masks(scores, 0.5)
    updates = wj.compensate(params, masks, curvature)
    for name in NAMES:
        np.testing.assert_array_equal((params[name] + updates[name] != 0), masks[name])
    joint, plain_removal = (
        float(wj.predicted_loss_change(u, curvature))
        for u in (updates, jax.tree.map(lambda w, k: jnp.where(k, 0, -w), params, masks))
    )
    assert 0 < joint < plain_removal


@pytest.mark.parametrize("kind", BUILDERS)
def test_in_jit_with_one_leaf_selected(kind):
    params, batch = problem()
    build = partial(BUILDERS[kind], damping=0.01, select=lambda path, leaf: path == "last")
    compiled = jax.jit(lambda p, b: build(stream_of(p, b)).solve(p))(params, batch)
    np.testing.assert_array_equal(compiled["first"], 0)
    hessian = hessians(kind, params, batch, 0.01)["last"]
    expected = np.linalg.solve(hessian, np.asarray(params["last"], np.float64).ravel())
    np.testing.assert_allclose(compiled["last"].ravel(), expected, atol=3e-4 * np.abs(expected).max())


@pytest.mark.parametrize("kind", BUILDERS)
def test_damping_too_small_for_float32_is_raised(kind):
    params, batch = problem(distinct=4)
    curvature = BUILDERS[kind](stream_of(params, batch), damping=1e-16)
    assert curvature.raised == (np.asarray(curvature.damping) > 1.5e-16).sum() >= 1
    assert (np.asarray(curvature.damping) > 0.99e-16).all()
    assert all(np.isfinite(curvature.solve(params)[name]).all() for name in NAMES)


def test_predicted_change_of_layer_inputs_is_the_change_of_outputs():
    params, batch = problem()
    curvature = wj.layer_input_hessian(stream_of(params, batch), damping=1e-6)
    step = {name: jnp.zeros_like(w) for name, w in params.items()} | {"last": 0.1 * params["last"] ** 2}
    hidden = factors(params, batch)["last"][0]
    expected = np.mean(np.sum((hidden @ np.asarray(step["last"], np.float64)) ** 2, axis=1))
    np.testing.assert_allclose(wj.predicted_loss_change(step, curvature), expected, rtol=1e-4)


@pytest.mark.parametrize("kind", BUILDERS)
def test_half_precision_and_dead_layers(kind):
    params, batch = problem(dtype=jnp.bfloat16)
    curvature = BUILDERS[kind](stream_of(params, batch), damping=0.01)
    assert curvature.solve(params)["first"].dtype == jnp.float32
    dead = jnp.zeros_like(batch[0]), batch[1]  # nothing comes in
    curvature = BUILDERS[kind](stream_of(params, dead), damping=0.01)
    assert (np.asarray(curvature.inverse_diagonal()["first"], np.float64) > 0).all()


@pytest.mark.parametrize("kind", BUILDERS)
def test_what_they_do_not_take(kind):
    params, batch = problem()
    build = BUILDERS[kind]
    with pytest.raises(ValueError, match="takes a stream"):
        build(wj.per_example_gradients(LOSS, params, batch))
    masked = wj.stream_gradients(LOSS, params, batch, masks=jax.tree.map(lambda w: w > 0, params))
    with pytest.raises(ValueError, match=r"cannot leave single weights out.*row_fisher"):
        build(masked)
    tied = lambda p, e: LOSS(p, e) + jnp.sum(p["first"] ** 2)
    with pytest.raises(ValueError, match=r"\['first'\] are not used once.*select="):
        build(wj.stream_gradients(tied, params, batch))
    build(wj.stream_gradients(tied, params, batch), select=lambda path, leaf: path == "last")
    with pytest.raises(ValueError, match="not offered"):
        build(stream_of(params, batch), damping="auto")
