"""Scores are loss increases: checked against removing each weight in the dense quadratic."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st

import woodjax as wj


def problem(seed, m=6, shape=(2, 4)):
    rng = np.random.default_rng(seed)
    gradients = {
        "bias": np.ones((m, 3), np.float32),
        "w": rng.standard_normal((m, *shape)).astype(np.float32),
    }
    params = {"bias": np.ones(3, np.float32), "w": rng.standard_normal(shape).astype(np.float32)}
    return gradients, params


@given(seed=st.integers(0, 1000))
def test_obs_scores_are_the_costs_of_removal(seed):
    gradients, params = problem(seed)
    scores = wj.obs_scores(params, wj.low_rank_fisher(gradients, damping=0.1))
    hessian = oracle.fisher(gradients["w"].reshape(6, -1), 0.1)
    expected = oracle.removal_costs(hessian, params["w"].reshape(-1).astype(float))
    np.testing.assert_allclose(scores["w"].reshape(-1), expected, rtol=2e-3, atol=1e-6)
    assert np.isposinf(scores["bias"]).all()


@given(seed=st.integers(0, 1000))
def test_woodtaylor_scores_are_the_costs_of_removal_up_to_a_constant(seed):
    gradients, params = problem(seed)
    mean = jax.tree.map(lambda g: g.mean(0), gradients)
    curvature = wj.low_rank_fisher(gradients, damping=0.1)
    scores = wj.woodtaylor_scores(params, curvature, mean)["w"].reshape(-1)
    hessian, gradient = oracle.fisher(gradients["w"].reshape(6, -1), 0.1), mean["w"].reshape(-1).astype(float)
    expected = oracle.removal_costs(hessian, params["w"].reshape(-1).astype(float), gradient)
    newton = -0.5 * gradient @ np.linalg.solve(hessian, gradient)
    np.testing.assert_allclose(scores, expected - newton, rtol=5e-3, atol=1e-5)


def test_woodtaylor_without_a_gradient_is_woodfisher():
    gradients, params = problem(0)
    curvature = wj.block_fisher(gradients, block_size=4, damping=0.1)
    zero = jax.tree.map(np.zeros_like, params)
    ours, theirs = wj.woodtaylor_scores(params, curvature, zero), wj.obs_scores(params, curvature)
    np.testing.assert_array_equal(ours["w"], theirs["w"])


def test_obd_is_half_h_w_squared_and_obs_with_a_diagonal():
    gradients, params = problem(0)
    fisher = wj.diagonal_fisher(gradients, damping=0.1)
    expected = 0.5 * (0.1 + (gradients["w"] ** 2).mean(0)) * params["w"] ** 2
    for scores in (wj.obd_scores(params, fisher.diagonal()), wj.obs_scores(params, fisher)):
        np.testing.assert_allclose(scores["w"], expected, rtol=1e-5)
        assert np.isposinf(scores["bias"]).all()


def test_magnitude():
    scores = wj.magnitude_scores({"bias": jnp.ones(2), "w": jnp.array([[-2.0, 1.0]], jnp.bfloat16)})
    assert scores["w"].dtype == jnp.float32
    np.testing.assert_array_equal(scores["w"], [[2, 1]])
    assert np.isposinf(scores["bias"]).all()


def test_held_fixed_weights_that_are_zero_still_score_infinity():
    gradients, params = problem(0)
    params["bias"] = np.zeros(3, np.float32)
    assert np.isposinf(wj.obs_scores(params, wj.diagonal_fisher(gradients))["bias"]).all()


def test_overflow_is_broken_and_not_protected():
    scores = wj.magnitude_scores({"w": jnp.array([[jnp.inf, 1.0]])})
    assert np.isnan(scores["w"][0, 0])
    huge = {"w": jnp.full((1, 2), 1e30)}
    fisher = wj.diagonal_fisher({"w": jnp.ones((1, 1, 2))})
    assert np.isnan(wj.obs_scores(huge, fisher)["w"]).all()
    assert np.isnan(wj.obd_scores(huge, fisher.diagonal())["w"]).all()


def test_trees_that_differ_are_refused():
    gradients, params = problem(0)
    fisher = wj.diagonal_fisher(gradients)
    with pytest.raises(ValueError, match="curvature's tree"):
        wj.obs_scores({"w": params["w"]}, fisher)
    with pytest.raises(ValueError, match="diagonal: leaf 'w' has shape"):
        wj.obd_scores(params, {"bias": params["bias"], "w": np.ones((1, 1))})
    with pytest.raises(ValueError, match="gradient has the structure"):
        wj.woodtaylor_scores(params, fisher, {"w": params["w"]})
