"""Searches on the quadratic: prices exact, the quadratic never rises, and what single scores miss is found."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import woodjax as wj
from woodjax import linalg

SHAPE, DAMPING = (2, 5), 0.05


def problem(seed, m=5):
    """Ten weights whose inputs differ in size, two of them twins, and a bias that is not prunable."""
    rng = np.random.default_rng(seed)
    gradients = rng.standard_normal((m, *SHAPE)) * rng.uniform(0.1, 2, SHAPE)
    gradients[:, 1, 0] = gradients[:, 0, 0]
    params = {"b": np.ones(3, np.float32), "w": rng.standard_normal(SHAPE).astype(np.float32)}
    return {"b": np.ones((m, 3), np.float32), "w": gradients.astype(np.float32)}, params


def hessian_of(gradients, blocks=((*range(10),),)):
    return oracle.blockwise(oracle.fisher(gradients["w"].reshape(-1, 10), DAMPING), [list(block) for block in blocks])


def cost(hessian, params, kept, gradient=None):
    weights = params["w"].reshape(-1).astype(float)
    step = oracle.constrained_minimiser(hessian, weights, ~np.asarray(kept).reshape(-1), gradient)
    return oracle.quadratic(hessian, step, gradient)


def search(params, masks, fisher, mean=0.0):
    """With a mean gradient, which may be zero: one compiled program for all tests of the whole network."""
    gradient = jax.tree.map(jnp.zeros_like, params)
    return wj.search_masks(params, masks, fisher, gradient=gradient | {"w": gradient["w"] + mean}, iterations=20)


def best_of_all(hessian, params, survivors, gradient=None):
    every = (np.isin(np.arange(10), kept) for kept in itertools.combinations(range(10), survivors))
    return min(cost(hessian, params, kept, gradient) for kept in every)


@given(seed=st.integers(0, 10**6), kept=st.lists(st.booleans(), min_size=10, max_size=10), first_order=st.booleans())
@settings(max_examples=15)
def test_prices_of_exchanges_are_exact(seed, kept, first_order):
    gradients, params = problem(seed)
    rows, weights, kept = gradients["w"].reshape(5, 10), params["w"].reshape(10), np.array(kept)
    mean = 0.1 * rows.mean(0)
    given_mean = mean if first_order else np.zeros_like(mean)
    hessian, double = hessian_of(gradients), given_mean.astype(float)
    support = linalg.solve_support(rows, DAMPING, weights, kept, given_mean)
    scales = linalg.exchange_scales(rows, support.whitener, kept)
    here = cost(hessian, params, kept, double)
    step = oracle.constrained_minimiser(hessian, weights.astype(float), ~kept, double)
    scale = 1e-4 * oracle.quadratic(hessian, weights.astype(float)) + 1e-5
    np.testing.assert_allclose(support.value, here, atol=scale)
    np.testing.assert_allclose(np.asarray(support.pull)[kept], (weights + step)[kept], atol=2e-3)
    prices = 0.5 * DAMPING * np.asarray(support.pull) ** 2 / np.asarray(scales)
    for q in range(10):
        other = kept ^ (np.arange(10) == q)
        exact = abs(cost(hessian, params, other, double) - here)
        np.testing.assert_allclose(prices[q], exact, rtol=5e-3, atol=scale)


@given(st.lists(st.booleans(), min_size=9, max_size=9))
@settings(max_examples=10)
def test_gram_matrix_of_survivors(kept):
    rows = np.random.default_rng(0).standard_normal((4, 9)).astype(np.float32)
    kept = np.array(kept)
    expected = rows[:, kept].astype(float) @ rows[:, kept].T
    np.testing.assert_allclose(linalg.survivor_gram(rows, kept), expected, rtol=1e-5, atol=1e-5)


@given(seed=st.integers(0, 10**6), first_order=st.booleans())
@settings(max_examples=15)
def test_finds_what_brute_force_finds_or_a_mask_that_no_swap_betters(seed, first_order):
    gradients, params = problem(seed)
    fisher = wj.low_rank_fisher(gradients, damping=DAMPING)
    mean = gradients["w"].mean(0) * (0.1 if first_order else 0)
    hessian, double = hessian_of(gradients), mean.reshape(-1).astype(float)
    masks = wj.make_masks(wj.obs_scores(params, fisher), 0.6)
    found, info = search(params, masks, fisher, mean)
    kept = np.asarray(found["w"]).reshape(-1)
    here, scale = cost(hessian, params, kept, double), cost(hessian, params, np.zeros(10, bool), double)
    assert kept.sum() == 4
    assert found["b"].all()
    np.testing.assert_allclose(info.quadratic[-1], here, atol=1e-4 * scale)
    assert here >= best_of_all(hessian, params, 4, double) - 1e-6
    swaps = [(i, j) for i in np.flatnonzero(kept) for j in np.flatnonzero(~kept)]
    others = [cost(hessian, params, kept ^ np.isin(np.arange(10), pair), double) for pair in swaps]
    assert here <= min(others) + 1e-4 * scale


def test_reaches_the_optimum_more_often_than_scores():
    hits = {"scores": 0, "thresholding": 0, "swaps": 0}
    for seed in range(15):
        gradients, params = problem(seed)
        fisher = wj.low_rank_fisher(gradients, damping=DAMPING)
        masks = wj.make_masks(wj.obs_scores(params, fisher), 0.6)
        info = search(params, masks, fisher)[1]
        limit = 1.0001 * best_of_all(hessian_of(gradients), params, 4)
        for name, value in zip(hits, (info.quadratic[0], info.quadratic[1], info.quadratic[-1]), strict=True):
            hits[name] += bool(value <= limit)
    assert hits["scores"] < hits["thresholding"] < hits["swaps"]
    assert hits["swaps"] >= 13


@pytest.mark.parametrize("stage", [1, -1])
def test_one_of_two_twins_survives(stage):
    """Each twin looks dispensable while the other is there: single scores prune both, both searches keep one."""
    gradients, params = problem(0)
    gradients["w"][:] = 0
    gradients["w"][0, 0] = [1.0, 1.0, 0.1, 0.0, 0.0]
    gradients["w"][1, 0] = [1.0, 1.0, -0.1, 0.0, 0.0]
    params["w"][:] = [[1.0, 1.0, 0.5, 0.0, 0.0], [0.0] * 5]
    fisher = wj.low_rank_fisher(gradients, damping=1e-4)
    masks = wj.make_masks(wj.obs_scores(params, fisher), 0.9)
    assert np.flatnonzero(masks["w"]).tolist() == [2]
    found, info = search(params, masks, fisher)
    assert info.quadratic[stage] < 0.1 * info.quadratic[0]
    assert np.flatnonzero(found["w"])[0] in {0, 1}
    assert (int(found["w"].sum()), int(info.moved)) == (1, 1)


@given(seed=st.integers(0, 10**6), sparsity=st.sampled_from([0.0, 0.3, 0.7, 1.0]))
@settings(max_examples=12)
def test_blocks_never_rise_and_what_was_pruned_stays_away(seed, sparsity):
    rng = np.random.default_rng(seed)
    gradients, params = problem(seed)
    fisher = wj.low_rank_fisher(gradients, block_size=4, damping=DAMPING)
    previous = {"b": np.ones(3, bool), "w": rng.random(SHAPE) < 0.8}
    scores = jax.tree.map(lambda w: jnp.asarray(rng.random(w.shape), jnp.float32), params)
    masks = wj.make_masks(scores, {"w": sparsity}, previous=previous)
    protected = {"b": np.zeros(3, bool), "w": np.asarray(masks["w"]) & (rng.random(SHAPE) < 0.3)}
    found, info = wj.search_masks(params, masks, fisher, previous=previous, protected=protected, iterations=20)
    assert found["w"].sum() == masks["w"].sum()
    assert not (found["w"] & ~previous["w"]).any()
    assert (found["w"] | ~protected["w"]).all()
    np.testing.assert_array_equal(found["b"], masks["b"])
    assert (np.diff(info.quadratic) <= 0).all()
    hessian = hessian_of(gradients, [range(4), range(4, 8), range(8, 10)])
    scale = cost(hessian, params, np.zeros(10, bool))
    for kept, value in ((masks, info.quadratic[0]), (found, info.quadratic[-1])):
        np.testing.assert_allclose(value, cost(hessian, params, kept["w"]), atol=1e-4 * scale)


def test_the_update_is_that_of_compensate_in_and_out_of_jit():
    gradients, params = problem(3)
    fisher = wj.low_rank_fisher(gradients, damping=DAMPING)
    masks = wj.make_masks(wj.obs_scores(params, fisher), 0.6)
    found, info = search(params, masks, fisher)
    again, inside = jax.jit(search)(params, masks, fisher)
    np.testing.assert_array_equal(found["w"], again["w"])
    np.testing.assert_allclose(info.quadratic, inside.quadratic, rtol=1e-5)
    assert info.swaps.sum() > 0
    assert int(info.moved) == (found["w"] & ~masks["w"]).sum()
    updates = wj.compensate(params, found, fisher)
    np.testing.assert_allclose(wj.predicted_loss_change(updates, fisher), info.quadratic[-1], rtol=1e-4)


def test_many_swaps_at_once_on_a_larger_problem():
    """Hundreds of weights: the separable prices move many at a time, the shortlist finishes."""
    rng = np.random.default_rng(0)
    params = {"w": rng.standard_normal((40, 30)).astype(np.float32)}
    gradients = {"w": (rng.standard_normal((24, 40, 30)) * rng.uniform(0.1, 1, (40, 30))).astype(np.float32)}
    fisher = wj.low_rank_fisher(gradients, damping=5.0)
    masks = wj.make_masks({"w": jnp.asarray(rng.random((40, 30)), jnp.float32)}, 0.8)
    found, info = wj.search_masks(params, masks, fisher, swaps=15)
    assert found["w"].sum() == masks["w"].sum()
    assert info.swaps.max() > 64
    assert info.quadratic[-1] < 0.7 * info.quadratic[0]
    assert (np.diff(info.quadratic) <= 0).all()


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64, jnp.bfloat16])
def test_types_agree_where_float64_is_switched_on(dtype):
    """Traced, not compiled."""
    gradients, params = jax.tree.map(np.array, problem(0))
    masks = jax.tree.map(lambda w: np.ones(w.shape, bool), params)
    params = jax.tree.map(lambda w: jnp.asarray(w, dtype), params)
    fisher = wj.low_rank_fisher(jax.tree.map(jnp.asarray, gradients), damping=DAMPING, block_size=4)
    _, info = jax.eval_shape(partial(wj.search_masks, iterations=1), params, masks, fisher)
    assert info.quadratic.dtype == jnp.promote_types(dtype, jnp.float32)


def test_what_is_not_finite_changes_nothing():
    gradients, params = problem(0)
    gradients["w"][0, 0, 0] = np.nan
    fisher = wj.low_rank_fisher(gradients, damping=DAMPING)
    masks = {"b": np.ones(3, bool), "w": np.arange(10).reshape(SHAPE) < 4}
    found, info = search(params, masks, fisher)
    np.testing.assert_array_equal(found["w"], masks["w"])
    assert np.isnan(info.quadratic).all()


def test_bad_arguments():
    gradients, params = problem(0)
    fisher = wj.low_rank_fisher(gradients, damping=DAMPING)
    masks = {"b": np.ones(3, bool), "w": np.ones(SHAPE, bool)}
    none = jax.tree.map(np.logical_not, masks)
    with pytest.raises(ValueError, match="BlockFisher"):
        wj.search_masks(params, masks, wj.block_fisher(gradients))
    with pytest.raises(ValueError, match="swaps -1"):
        wj.search_masks(params, masks, fisher, swaps=-1)
    with pytest.raises(ValueError, match="keep 13 weights that previous pruned"):
        wj.search_masks(params, masks, fisher, previous=none)
    with pytest.raises(ValueError, match="prune 13 weights that are protected"):
        wj.search_masks(params, none, fisher, protected=masks)
    with pytest.raises(ValueError, match="masks: leaf 'w'"):
        wj.search_masks(params, {"b": np.ones(3, bool), "w": np.ones((2, 4), bool)}, fisher)
    with pytest.raises(ValueError, match="gradient: leaf 'w'"):
        wj.search_masks(params, masks, fisher, gradient={"b": np.ones(3), "w": np.ones(3)})
