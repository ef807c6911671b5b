"""One curvature, every sparsity: nested masks, and predictions that are those of the joint step."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import woodjax as wj
from woodjax import linalg

LEVELS = [0.0, 0.1, 0.35, 0.5, 0.9, 1.0]
BUILDERS = {
    "whole": wj.low_rank_fisher,
    "blocks": lambda g, **options: wj.low_rank_fisher(g, block_size=7, **options),
    "dense": lambda g, **options: wj.block_fisher(g, block_size=7, **options),
    "diagonal": wj.diagonal_fisher,
}


def problem(m=12, seed=0):
    rng = np.random.default_rng(seed)
    params = {"b": jnp.ones(3), "w": jnp.asarray(rng.standard_normal((5, 8)), jnp.float32)}
    return params, jax.tree.map(lambda w: jnp.asarray(rng.standard_normal((m, *w.shape)), jnp.float32), params)


@pytest.mark.parametrize("name", BUILDERS)
def test_masks_are_nested_exact_and_predicted_as_the_joint_step_is(name):
    params, gradients = problem()
    fisher = BUILDERS[name](gradients, damping=0.1)
    path = wj.sparsity_path(params, fisher, LEVELS)
    scores = wj.obs_scores(params, fisher)
    for number, sparsity in enumerate(LEVELS):
        masks = path.masks(number)
        expected = wj.make_masks(scores, sparsity)
        np.testing.assert_array_equal(masks["w"], expected["w"])
        assert masks["b"].all()
        assert path.sparsity[number] == pytest.approx(round(40 * sparsity) / 40)
        step = wj.compensate(params, masks, fisher)
        predicted = wj.predicted_loss_change(step, fisher)
        np.testing.assert_allclose(path.predicted_loss_change[number], predicted, rtol=2e-3, atol=1e-6)
    np.testing.assert_array_equal(path.masks(-1)["w"], path.masks(len(LEVELS) - 1)["w"])
    assert np.all(np.diff(path.predicted_loss_change) > 0)


@settings(max_examples=15)
@given(seed=st.integers(0, 1000), m=st.sampled_from([1, 5, 30]), damping=st.sampled_from([1e-2, 1.0]))
def test_path_losses_are_the_constrained_minima(seed, m, damping):
    rng = np.random.default_rng(seed)
    gradients, weights = rng.standard_normal((m, 10)), rng.standard_normal(10)
    levels, hessian = rng.integers(0, 5, 10), oracle.fisher(gradients, damping)
    found = linalg.path_losses(
        jnp.asarray(gradients, jnp.float32),
        damping,
        jnp.asarray(weights, jnp.float32),
        jnp.asarray(levels),
        num_levels=4,
    )
    for number in range(4):
        step = oracle.constrained_minimiser(hessian, weights, levels <= number)
        np.testing.assert_allclose(found[number], oracle.quadratic(hessian, step), rtol=2e-3, atol=1e-6)


def test_windows_cover_every_level():
    rng = np.random.default_rng(0)
    b = 2 * linalg.COLUMN_WINDOW + 5
    gradients, weights = rng.standard_normal((3, b)), rng.standard_normal(b)
    levels = rng.integers(0, 4, b)
    found = linalg.path_losses(
        jnp.asarray(gradients, jnp.float32), 0.1, jnp.asarray(weights, jnp.float32), jnp.asarray(levels), num_levels=3
    )
    for number in range(3):
        gone = levels <= number
        residual, kept = gradients[:, gone] @ weights[gone], gradients[:, ~gone]
        along = residual @ np.linalg.solve(0.3 * np.eye(3) + kept @ kept.T, residual)
        np.testing.assert_allclose(found[number], 0.05 * (weights[gone] @ weights[gone] + along), rtol=1e-4)


def test_the_default_is_a_hundred_levels():
    params, gradients = problem()
    path = wj.sparsity_path(params, wj.low_rank_fisher(gradients, damping=0.1), scope="leaf")
    np.testing.assert_allclose(path.sparsity, np.round(np.arange(100) * 0.4) / 40, atol=1e-6)


@pytest.mark.parametrize(
    ("sparsities", "message"),
    [([], "increasing"), ([0.5, 0.5], "increasing"), ([0.9, 0.5], "increasing"), ([0.5, 1.5], r"sparsity is 1\.5")],
)
def test_bad_sparsities(sparsities, message):
    params, gradients = problem()
    with pytest.raises(ValueError, match=message):
        wj.sparsity_path(params, wj.low_rank_fisher(gradients), sparsities)
    with pytest.raises(ValueError, match="levels 0 to 1, not 2"):
        wj.sparsity_path(params, wj.low_rank_fisher(gradients), [0.1, 0.2]).masks(2)
