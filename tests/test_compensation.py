"""Signs, exact zeros and optimality of the updates."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st

import woodjax as wj


def problem(seed, m=6, shape=(2, 4)):
    rng = np.random.default_rng(seed)
    gradients = rng.standard_normal((m, *shape)).astype(np.float32)
    weights = rng.standard_normal(shape).astype(np.float32)
    masks = rng.random(shape) < 0.5
    return {"w": gradients}, {"w": weights}, {"w": masks}


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize(("method", "reference"), [("joint", "constrained_minimiser"), ("sum", "sum_of_single_steps")])
@given(seed=st.integers(0, 1000))
def test_agrees_with_the_oracle_on_survivors(method, reference, first_order, seed):
    gradients, params, masks = problem(seed)
    curvature = wj.low_rank_fisher(gradients, damping=0.1)
    mean = gradients["w"].mean(0) if first_order else None
    updates = wj.compensate(params, masks, curvature, method=method, gradient=None if mean is None else {"w": mean})
    hessian = oracle.fisher(gradients["w"].reshape(6, -1), 0.1)
    kept = masks["w"].reshape(-1)
    flat = None if mean is None else mean.reshape(-1).astype(float)
    expected = getattr(oracle, reference)(hessian, params["w"].reshape(-1).astype(float), ~kept, flat)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(updates["w"].reshape(-1)[kept], expected[kept], atol=1e-3 * scale)
    np.testing.assert_array_equal(optax.apply_updates(params, updates)["w"].reshape(-1)[~kept], 0)


@pytest.mark.parametrize("build", [wj.block_fisher, wj.low_rank_fisher])
@given(seed=st.integers(0, 1000), q=st.integers(0, 7))
def test_sign_one_weight_goes_by_itself(build, seed, q):
    """The single-weight step is −(w_q/[H⁻¹]_qq) H⁻¹e_q: w + δ is zero at q before anything is set to zero."""
    gradients, params, _ = problem(seed)
    curvature = build(gradients, damping=0.1)
    unit = np.zeros(8, np.float32)
    unit[q] = 1
    column = np.asarray(curvature.solve({"w": unit.reshape(2, 4)})["w"]).reshape(-1)
    diagonal = np.asarray(curvature.inverse_diagonal()["w"]).reshape(-1)
    weights = params["w"].reshape(-1)
    step = -weights[q] / diagonal[q] * column
    assert abs(weights[q] + step[q]) < 1e-4 * max(1, abs(weights[q]))
    masks = {"w": (np.arange(8) != q).reshape(2, 4)}
    for method in ("joint", "sum"):
        updates = wj.compensate(params, masks, curvature, method=method)
        np.testing.assert_allclose(updates["w"].reshape(-1), step, atol=2e-4 * np.abs(step).max())


@given(seed=st.integers(0, 1000))
def test_the_quadratic_falls_from_plain_removal_to_joint(seed):
    gradients, params, masks = problem(seed)
    curvature = wj.low_rank_fisher(gradients, damping=0.1)
    plain = jax.tree.map(lambda w, mask: np.where(mask, 0, -w), params, masks)
    costs = {"plain": float(wj.predicted_loss_change(plain, curvature))}
    for method in ("sum", "joint"):
        updates = wj.compensate(params, masks, curvature, method=method)
        costs[method] = float(wj.predicted_loss_change(updates, curvature))
    assert costs["joint"] <= min(costs["plain"], costs["sum"]) * (1 + 1e-4) + 1e-6
    hessian = oracle.fisher(gradients["w"].reshape(6, -1), 0.1)
    pruned = ~masks["w"].reshape(-1)
    best = oracle.constrained_minimiser(hessian, params["w"].reshape(-1).astype(float), pruned)
    np.testing.assert_allclose(costs["joint"], oracle.quadratic(hessian, best), rtol=1e-3, atol=1e-6)


def test_correlated_twins_take_over_each_other():
    """Two inputs that always agree: whoever stays takes the sum."""
    gradients = {"w": np.ones((4, 1, 2), np.float32)}
    fisher = wj.low_rank_fisher(gradients, damping=1e-4)
    updates = wj.compensate({"w": np.array([[2.0, 3.0]])}, {"w": np.array([[True, False]])}, fisher)
    np.testing.assert_allclose(updates["w"], [[3.0, -3.0]], rtol=1e-3)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("method", ["joint", "sum"])
def test_pruned_weights_become_exactly_zero(dtype, method):
    gradients, params, masks = problem(1)
    params = {"w": jnp.asarray(params["w"], dtype)}
    fisher = wj.block_fisher(gradients, block_size=4, damping=0.1)
    pruned = optax.apply_updates(params, wj.compensate(params, masks, fisher, method=method))
    assert pruned["w"].dtype == dtype
    np.testing.assert_array_equal(pruned["w"] != 0, masks["w"])


def test_weights_pruned_before_take_no_part():
    """With their gradients masked, zeros behave as if they had never been in the network."""
    gradients, params, _ = problem(2)
    alive = np.array([[True, True, False, True], [False, True, True, True]])
    masks = {"w": alive & np.array([[True, False, True, True], [True, True, True, False]])}
    params = {"w": np.where(alive, params["w"], 0)}
    curvature = wj.low_rank_fisher(wj.apply_masks(jax.tree.map(jnp.asarray, gradients), {"w": alive}), damping=0.1)
    updates = np.asarray(wj.compensate(params, masks, curvature)["w"])[alive]
    small = oracle.fisher(gradients["w"][:, alive], 0.1)
    expected = oracle.constrained_minimiser(small, params["w"][alive].astype(float), ~masks["w"][alive])
    np.testing.assert_allclose(updates, expected, atol=1e-3 * np.abs(expected).max())


def test_no_division_by_zero_on_fixed_leaves():
    gradients = {"b": np.ones((3, 2), np.float32), "w": np.ones((3, 2, 2), np.float32)}
    params = {"b": np.ones(2, np.float32), "w": np.ones((2, 2), np.float32)}
    masks = {"b": np.ones(2, bool), "w": np.eye(2, dtype=bool)}
    updates = wj.compensate(params, masks, wj.diagonal_fisher(gradients), method="sum")
    np.testing.assert_array_equal(updates["b"], 0)


def test_bad_arguments():
    gradients, params, masks = problem(0)
    fisher = wj.diagonal_fisher(gradients)
    with pytest.raises(ValueError, match="method is 'add'"):
        wj.compensate(params, masks, fisher, method="add")
    with pytest.raises(ValueError, match=r"masks: leaf 'w' is float.*masks are bool"):
        wj.compensate(params, {"w": np.ones((2, 4))}, fisher)
    with pytest.raises(ValueError, match="masks: leaf 'w'"):
        wj.compensate(params, {"w": np.ones((2, 5), bool)}, fisher)
    with pytest.raises(ValueError, match="gradient: leaf 'w'"):
        wj.compensate(params, masks, fisher, gradient={"w": np.ones((2, 5))})
