"""Costs from the program of a network, and masks that meet a budget."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

import woodjax as wj
from woodjax.adapters.nnx import functional
from woodjax.losses import cross_entropy
from woodjax.models.resnet import resnet20
from woodjax.ranking import LARGEST_COST, Cost, fewest_that_cost


def costs_by_sort(scores, costs, power):
    """Order in which single weights go, and what each costs: flat, leaf after leaf."""
    flat = np.concatenate([np.ravel(s) for s in scores.values()]).astype(np.float64)
    each = np.concatenate([np.full(np.size(scores[name]), float(costs[name])) for name in scores])
    return np.argsort(flat / each**power, kind="stable"), each


@settings(max_examples=20)
@given(
    seed=st.integers(0, 1000),
    budget=st.floats(0.015625, 1, width=32),  # one rounding error of a double below the whole is the whole
    power=st.sampled_from([0.0, 0.3, 1.0]),
    levels=st.sampled_from([3, 1000]),
)
def test_the_budget_is_met_within_one_weight(seed, budget, power, levels):
    rng = np.random.default_rng(seed)
    shapes, costs = {"a": (4, 9), "b": (50,), "c": (3, 3)}, {"a": 1024, "b": 64, "c": 1}
    scores = {k: np.float32(2.0) ** rng.integers(-levels % 20, 20, s).astype(np.float32) for k, s in shapes.items()}
    masks = wj.budget_masks(scores, costs, budget, power=power)
    kept = np.concatenate([np.ravel(masks[name]) for name in scores])
    order, each = costs_by_sort(scores, costs, power)
    allowed = budget * each.sum()
    left = each.sum() - np.concatenate([[0], np.cumsum(each[order])])
    gone = order[: np.flatnonzero(left <= allowed)[0]]
    assert each[kept].sum() <= allowed
    if power in (0.0, 1.0):  # the order of the oracle has no rounding of powers
        np.testing.assert_array_equal(np.flatnonzero(~kept), np.sort(gone))
    if len(gone):
        assert each[kept].sum() + each[~kept].max() > allowed


def test_the_same_under_jit_and_nested():
    rng = np.random.default_rng(0)
    scores = {"a": rng.random((6, 5)).astype(np.float32), "b": rng.random(40).astype(np.float32)}
    costs = {"a": np.int64(7), "b": jnp.float32(2.5)}
    first = wj.budget_masks(scores, costs, 0.5)
    jitted = jax.jit(lambda s: wj.budget_masks(s, costs, 0.5))(scores)
    other = jax.tree.map(jnp.negative, scores)
    second = wj.budget_masks(jax.tree.map(lambda s: s + 2, other), costs, 0.3, previous=first)
    for name in scores:
        np.testing.assert_array_equal(jitted[name], first[name])
        assert not (np.asarray(second[name]) & ~np.asarray(first[name])).any()
    left = 7 * int(second["a"].sum()) + 2.5 * int(second["b"].sum())
    assert 0.3 * 310 - 7 < left <= 0.3 * 310


def test_a_budget_of_parameters_is_a_count():
    scores = {"a": np.arange(30, dtype=np.float32), "b": np.arange(10, dtype=np.float32) + 0.5}
    masks = wj.budget_masks(scores, {"a": 1, "b": 1}, 0.25)
    flat = np.concatenate([masks["a"], masks["b"]])
    np.testing.assert_array_equal(~flat, oracle.lowest(np.concatenate([scores["a"], scores["b"]]), 30))


def test_what_is_protected_pays():
    scores = {"a": np.full(10, np.inf, np.float32), "b": np.arange(10, dtype=np.float32), "c": np.zeros(3, np.float32)}
    costs = {"a": 3, "b": 1, "c": 0}
    masks = wj.budget_masks(scores, costs, 0.85)  # of 40: 34, thirty of them protected
    assert [int(masks[name].sum()) for name in scores] == [10, 4, 3]
    with pytest.raises(ValueError, match=r"cost 0\.750000 of the dense network"):
        wj.budget_masks(scores, costs, 0.7)
    under_jit = jax.jit(lambda s: wj.budget_masks(s, costs, 0.7))(scores)
    assert [int(under_jit[name].sum()) for name in scores] == [10, 0, 3]
    high = scores | {"a": scores["b"] + 100}
    assert [int(mask.sum()) for mask in wj.budget_masks(high, costs, 0.5).values()] == [6, 0, 3]
    assert [int(mask.sum()) for mask in wj.budget_masks(high, costs, 0.5, floor=0.41).values()] == [5, 5, 3]


def test_sums_beyond_32_bits_are_exact():
    """Three leaves whose cost passes 2³² by far; one unit more or less decides."""
    rng = np.random.default_rng(0)
    values = [rng.permutation(60).astype(np.float32)[:20] for _ in range(3)]
    costs = (2**33 + 1, 3 * 2**31 - 5, 12345)
    each = np.repeat(np.array(costs, object), 20)
    assert each.sum() < LARGEST_COST
    order = np.argsort(np.concatenate(values), kind="stable")
    held = np.cumsum(each[order])
    search = jax.jit(partial(fewest_that_cost, costs=costs))
    for count in (1, 7, 23, 40, 59):
        for amount, expected in (
            (held[count - 1], count),
            (held[count - 1] + 1, count + 1),
            (held[count - 1] - 1, count),
        ):
            marked = np.concatenate(search(values, Cost.of(int(amount))))
            np.testing.assert_array_equal(np.flatnonzero(marked), np.sort(order[:expected]))


def test_groups_meet_a_budget_too():
    """Filters of 2 and of 5 weights, as `group_scores` shapes their scores."""
    rng = np.random.default_rng(0)
    params = {"a": np.ones((2, 6)), "b": np.ones((5, 4))}
    scores = {"a": rng.random(6).astype(np.float32), "b": rng.random(4).astype(np.float32)}
    kept = wj.budget_masks(scores, {"a": 2, "b": 5}, 0.5)
    masks = wj.expand_group_masks(kept, params, wj.Filters())
    held = sum(int(np.sum(mask)) for mask in masks.values())
    assert 11 < held <= 16
    np.testing.assert_array_equal(masks["b"], np.broadcast_to(kept["b"], (5, 4)))


@pytest.mark.parametrize(
    ("costs", "options", "message"),
    [
        ({"w": 1}, {"budget": 0.0}, r"budget is 0\.0"),
        ({"w": 1}, {"budget": 1.5}, r"in \(0, 1\]"),
        ({"w": 1}, {"power": -1.0}, r"power is -1\.0"),
        ({"w": -1}, {}, "leaf 'w' is -1"),
        ({"w": float("nan")}, {}, "leaf 'w' is nan"),
        ({"w": np.ones(4)}, {}, "leaf 'w' is no plain number"),
        ({"v": 1}, {}, "another tree structure"),
        ({"w": 0}, {}, "all zero"),
        ({"w": 1}, {"floor": 0.9}, r"cost 1\.000000 of the dense"),
    ],
)
def test_bad_requests(costs, options, message):
    with pytest.raises(ValueError, match=message):
        wj.budget_masks({"w": jnp.arange(4.0)}, costs, **({"budget": 0.5} | options))


@pytest.mark.parametrize(("shortcut", "total"), [("A", 40_551_040), ("B", 40_813_184)])
def test_resnet20_costs_what_is_published(shortcut, total):
    """40.8 M with 1×1 convolutions in the shortcuts; option A has none."""
    graph, state = nnx.split(nnx.eval_shape(lambda: resnet20(nnx.Rngs(0), shortcut)))
    model = nnx.merge(graph, jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), state))  # no random numbers compiled
    model.eval()
    apply_fn, params = functional(model)
    example = jax.ShapeDtypeStruct((32, 32, 3), jnp.float32), jax.ShapeDtypeStruct((), jnp.int32)
    macs = wj.weight_macs(cross_entropy(apply_fn), params, example)
    assert macs["conv1"]["kernel"] == 1024
    assert macs["linear"] == {"bias": 0, "kernel": 1}
    assert macs["bn1"] == {"bias": 0, "scale": 0}
    assert sum(cost * w.size for cost, w in zip(jax.tree.leaves(macs), jax.tree.leaves(params), strict=True)) == total


def count(function, params, *inputs):
    return wj.weight_macs(function, params, inputs[0] if len(inputs) == 1 else inputs)


def test_a_kernel_is_followed_through_what_keeps_it():
    w, x = jnp.ones((2, 3, 4)), jnp.ones((5, 6))
    dense = lambda w: jnp.where(w > 0, w, 0).astype(jnp.bfloat16).reshape(6, 4)
    assert count(lambda w, x: x.astype(jnp.bfloat16) @ dense(w), w, x) == 5
    assert count(lambda w, x: x @ (w / jnp.linalg.norm(w)).reshape(6, 4), w, x) == 5
    assert count(lambda w, x: jax.checkpoint(lambda v: jax.nn.relu(x @ v.reshape(6, 4)))(w), w, x) == 5
    assert count(lambda w, x: jax.vmap(lambda row: row @ w.reshape(6, 4))(x), w, x) == 5


def test_a_bias_is_no_kernel():
    params = {"b": jnp.ones(4), "v": jnp.ones((4, 2)), "w": jnp.ones((6, 4))}
    macs = count(lambda p, x: (x @ p["w"] + p["b"]) @ p["v"], params, jnp.ones((1, 6)))
    assert macs == {"b": 0, "v": 1, "w": 1}


def test_twice_used_costs_twice_and_a_loop_as_often_as_it_runs():
    w, x = jnp.ones((4, 4)), jnp.ones(4)
    assert count(lambda w, x: (x @ w) @ w, w, x) == 2
    assert count(lambda w, x: lax.scan(lambda y, _: (y @ w, None), x, length=7)[0], w, x) == 7
    layers = jnp.ones((3, 4, 4))
    assert count(lambda w, x: lax.scan(lambda y, v: (y @ v, None), x, w)[0], layers, x) == 1
    with pytest.raises(ValueError, match=r"go into a while with matrix products"):
        count(lambda w, x: lax.while_loop(lambda y: y[0] < 1, lambda y: y @ w, x), w, x)
    with pytest.raises(ValueError, match=r"go into a cond"):
        count(lambda w, x: lax.cond(x[0] > 0, lambda y: y @ w, lambda y: y, x), w, x)
    assert count(lambda w, x: lax.cond(x[0] > 0, lambda y: y, lambda y: -y, x) @ w, w, x) == 1


@pytest.mark.parametrize(("groups", "stride"), [(1, 1), (4, 1), (1, 2)])
def test_convolutions(groups, stride):
    kernel = jnp.ones((3, 3, 4 // groups, 8))
    conv = lambda w, x: lax.conv_general_dilated(
        x, w, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
    )
    assert count(conv, kernel, jnp.ones((1, 6, 6, 4))) == (6 // stride) ** 2
    assert count(conv, kernel, jnp.ones((2, 6, 6, 4))) == 2 * (6 // stride) ** 2


def test_kernels_that_are_cast_in_a_scan_count_and_parts_of_leaves_raise():
    params = {"k": jnp.ones((5, 4, 4)), "scale": jnp.ones(4)}

    def scanned(p, x):
        return jax.lax.scan(
            lambda h, k: ((h.astype(jnp.bfloat16) @ k.astype(jnp.bfloat16)).astype(h.dtype), None), x, p["k"]
        )[0]

    assert wj.weight_macs(scanned, params, jnp.ones((3, 4)))["k"] == 3
    scaled = wj.weight_macs(lambda p, x: x @ (p["k"].reshape(20, 4) * p["scale"]), params, jnp.ones((2, 20)))
    assert scaled == {"k": 2, "scale": 0}
    with pytest.raises(ValueError, match="a part of a leaf"):
        wj.weight_macs(lambda p, x: x @ p["k"][0], params, jnp.ones((3, 4)))
    with pytest.raises(ValueError, match="a part of a leaf"):
        wj.weight_macs(lambda p, x: x @ jnp.split(p["k"][0], 2, axis=1)[0], params, jnp.ones((3, 4)))
