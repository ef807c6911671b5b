"""The greedy way down against a loop with explicit inverses, and the cut through all blocks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import woodjax as wj
from woodjax import linalg

DAMPING = 0.1
BLOCKS = ((0, range(4)), (1, range(4, 8)), (2, range(8, 10)))  # ten weights in blocks of four, the last padded


def problem(seed, m=8):
    rng = np.random.default_rng(seed)
    gradients = {"b": np.ones((m, 2), np.float32), "w": rng.standard_normal((m, 2, 5)).astype(np.float32)}
    params = {"b": np.ones(2, np.float32), "w": rng.standard_normal((2, 5)).astype(np.float32)}
    return gradients, params


def greedy(hessian, weights, before=()):
    """OBC, algorithm 1, with the inverse of what is left computed anew at every step."""
    left, weights, order, losses = list(range(len(weights))), weights.astype(float).copy(), [], []
    while left:
        inverse = np.linalg.inv(hessian[np.ix_(left, left)])
        costs = weights[left] ** 2 / (2 * np.diag(inverse))
        first = [left.index(q) for q in before if q in left]
        i = first[0] if first else int(np.argmin(costs))
        weights[left] -= weights[left[i]] / inverse[i, i] * inverse[:, i]
        losses.append(costs[i])
        order.append(left.pop(i))
    return order, losses


@given(seed=st.integers(0, 10**6))
@settings(max_examples=15)
def test_order_and_losses_are_those_of_explicit_inverses(seed):
    gradients, params = problem(seed)
    rows, weights = gradients["w"].reshape(8, 10), params["w"].reshape(10)
    hessian = oracle.fisher(rows, DAMPING)
    inverse = np.linalg.inv(hessian).astype(np.float32)
    order, losses = linalg.greedy_trace(inverse, weights, np.ones(10, np.int32))
    expected_order, expected = greedy(hessian, weights)
    np.testing.assert_allclose(losses, expected, rtol=2e-3, atol=1e-5 * sum(expected))
    np.testing.assert_array_equal(order, expected_order)
    everything = oracle.quadratic(hessian, -weights.astype(float))
    np.testing.assert_allclose(np.sum(losses), everything, rtol=1e-3)


@pytest.mark.usefixtures("x64")
def test_a_trace_in_mixed_precision():
    inverse, weights = jax.ShapeDtypeStruct((3, 3), "float32"), jax.ShapeDtypeStruct((3,), "float64")
    order, losses = jax.eval_shape(linalg.greedy_trace, inverse, weights, jax.ShapeDtypeStruct((3,), "int32"))
    assert order.shape == (3,)
    assert losses.dtype == "float64"


@given(seed=st.integers(0, 10**6), sparsity=st.floats(0, 1))
@settings(max_examples=15)
def test_one_cut_through_all_blocks(seed, sparsity):
    gradients, params = problem(seed)
    fisher = wj.block_fisher(gradients, block_size=4, damping=DAMPING)
    masks, updates, info = wj.exact_obs(params, fisher, sparsity)
    kept, weights = np.asarray(masks["w"]).reshape(-1), params["w"].reshape(-1)
    blocks = [list(block) for _, block in BLOCKS]
    hessian = oracle.blockwise(oracle.fisher(gradients["w"].reshape(8, 10), DAMPING), blocks)
    assert (~kept).sum() == oracle.rounded(sparsity, 10)
    assert masks["b"].all()
    price = np.zeros(10)
    for number, block in enumerate(blocks):
        order, losses = greedy(hessian[np.ix_(block, block)], weights[block])
        gone = int(info.removed[number])
        assert set(np.flatnonzero(~kept[block])) == set(order[:gone])
        price[np.array(block)[order]] = np.maximum.accumulate(losses)
        assert (np.asarray(info.order[number])[len(block) :] == -1).all()
    if kept.any() and not kept.all():
        assert price[~kept].max() <= price[kept].min() * 1.01
    step = oracle.constrained_minimiser(hessian, weights.astype(float), ~kept)
    np.testing.assert_allclose(updates["w"].reshape(-1), step, atol=2e-3 * max(1, np.abs(step).max()))
    np.testing.assert_allclose(info.predicted_loss_change, oracle.quadratic(hessian, step), rtol=2e-3, atol=1e-6)
    np.testing.assert_array_equal(optax.apply_updates(params, updates)["w"].reshape(-1) != 0, kept)


@given(seed=st.integers(0, 10**6))
@settings(max_examples=8)
def test_what_was_pruned_before_goes_first_and_counts(seed):
    gradients, params = problem(seed)
    fisher = wj.block_fisher(gradients, block_size=4, damping=DAMPING)
    params["w"][0, 1] = 10.0  # the dearest weight of all, pruned before: it raises no price behind it
    previous = {"b": np.array([False, True]), "w": np.arange(10).reshape(2, 5) != 1}
    masks, _, info = wj.exact_obs(params, fisher, 0.4, previous=previous)
    hessian = oracle.fisher(gradients["w"].reshape(8, 10), DAMPING)[:4, :4]
    assert not masks["w"][0, 1]
    assert masks["b"].tolist() == [False, True]  # as in make_masks: it counts, and stays pruned
    assert (~masks["w"]).sum() + 1 == 4
    assert info.order[0].tolist() == greedy(hessian, params["w"].reshape(10)[:4], before=(1,))[0]


def test_equal_prices_are_cut_in_the_order_of_removal():
    """The second removal is the cheaper one: their prices are made equal, and the first must go first."""
    hessian = np.array([[1.0, 0.9, 0.0], [0.9, 1.0, 0.0], [0.0, 0.0, 50.0]])
    weights = np.array([1.0, -1.0, 1.0], np.float32)
    order, losses = greedy(hessian, weights)
    assert losses[1] < losses[0]
    reverse = np.eye(3)[order[::-1]]  # so that the index order is not the order of removal
    hessian, weights = reverse @ hessian @ reverse.T, (reverse @ weights).astype(np.float32)
    fisher = wj.block_fisher({"w": np.ones((1, 1, 3), np.float32)}, damping=1.0)
    fisher = dataclasses.replace(fisher, inverse=jnp.asarray(np.linalg.inv(hessian)[None], jnp.float32))
    masks, _, info = wj.exact_obs({"w": weights[None]}, fisher, 1 / 3)
    assert not masks["w"][0, int(info.order[0, 0])]
    assert masks["w"].sum() == 2


def test_only_one_of_two_twins_is_cheap():
    gradients = {"w": np.array([[[1.0, 1.0, 0.2]], [[1.0, 1.0, -0.2]]], np.float32)}
    params = {"w": np.array([[1.0, 1.01, 1.0]], np.float32)}
    fisher = wj.block_fisher(gradients, damping=1e-3)
    masks, updates, _ = wj.exact_obs(params, fisher, 2 / 3)
    assert masks["w"].tolist() == [[False, True, False]]
    np.testing.assert_allclose(optax.apply_updates(params, updates)["w"][0, 1], 2.01, rtol=1e-2)
    assert wj.make_masks(wj.obs_scores(params, fisher), 2 / 3)["w"].tolist() == [[False, False, True]]


def test_sparsity_may_be_traced_or_by_leaf():
    gradients, params = problem(0)
    fisher = wj.block_fisher(gradients, block_size=4, damping=DAMPING)
    masks, updates, info = wj.exact_obs(params, fisher, 0.5)
    traced = jax.jit(wj.exact_obs)(params, fisher, jnp.float32(0.5))
    np.testing.assert_array_equal(masks["w"], traced[0]["w"])
    np.testing.assert_allclose(updates["w"], traced[1]["w"], rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(masks["w"], wj.exact_obs(params, fisher, {"w": 0.5})[0]["w"])
    assert int(info.removed.sum()) == 5


def test_bad_arguments():
    gradients, params = problem(0)
    whole = wj.block_fisher(gradients, block_size=None)
    with pytest.raises(ValueError, match="mapping, but the block crosses leaves"):
        wj.exact_obs(params, whole, {"w": 0.5})
    with pytest.raises(ValueError, match="sparsity is 2"):
        wj.exact_obs(params, whole, 2)
    with pytest.raises(ValueError, match="previous: leaf 'w'"):
        wj.exact_obs(params, whole, 0.5, previous={"b": np.ones(2, bool), "w": np.ones((2, 5))})
    with pytest.raises(ValueError, match="Scores of leaf 'w' hold"):
        wj.exact_obs({"b": params["b"], "w": np.full((2, 5), np.nan, np.float32)}, whole, 0.5)
    large = wj.block_fisher({"w": np.ones((1, 3, 100), np.float32)}, block_size=None)
    with pytest.raises(ValueError, match="300 coordinates"):
        wj.exact_obs({"w": np.ones((3, 100), np.float32)}, large, 0.5)
