"""Exact counts, ties, scopes, protected and broken scores."""

from fractions import Fraction
from functools import partial
from math import ceil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import woodjax as wj
from woodjax.sparsities import exact_sparsity

PRUNE_COUNT = jax.jit(wj.prune_count)
SPARSITY = st.floats(0, 1)
SCOPES = ["global", "leaf", "erdos_renyi"]
JITTED = {scope: jax.jit(partial(wj.make_masks, scope=scope)) for scope in SCOPES}


def flat(tree):
    return np.concatenate([np.asarray(leaf).reshape(-1) for leaf in jax.tree.leaves(tree)])


@st.composite
def score_trees(draw):
    shapes = draw(st.sampled_from([[(7,)], [(3, 4), (5,)], [(2, 3), (1, 1), (4, 4)]]))
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    levels = draw(st.sampled_from([2, 5, 1000]))  # few levels: many ties
    return {f"leaf{i}": (rng.integers(-levels, levels, shape) / 7).astype(np.float32) for i, shape in enumerate(shapes)}


@given(sparsity=SPARSITY, size=st.integers(0, 2**31 - 1))
def test_count_is_exact(sparsity, size):
    half = (Fraction(sparsity) * size) % 1 - Fraction(1, 2)
    assume(abs(half) > Fraction(size + 1, 2**33))  # within float error of a half either neighbour is right
    assert int(wj.prune_count(sparsity, size)) == oracle.rounded(sparsity, size)


@pytest.mark.parametrize(("size", "count"), [(1, 0), (3, 2), (5, 2), (7, 4), (4097, 2048), (8195, 4098)])
def test_halves_go_to_even(size, count):
    assert int(wj.prune_count(0.5, size)) == count


@given(scores=score_trees(), sparsity=SPARSITY)
def test_global_masks_prune_the_lowest(scores, sparsity):
    masks = wj.make_masks(scores, sparsity)
    values = flat(scores)
    np.testing.assert_array_equal(~flat(masks), oracle.lowest(values, int(wj.prune_count(sparsity, values.size))))


@given(scores=score_trees(), sparsity=SPARSITY)
def test_leaf_masks_prune_the_lowest_of_each(scores, sparsity):
    masks = wj.make_masks(scores, sparsity, scope="leaf")
    for name, values in scores.items():
        count = int(wj.prune_count(sparsity, values.size))
        np.testing.assert_array_equal(~flat(masks[name]), oracle.lowest(values.reshape(-1), count))


@pytest.mark.parametrize("scope", SCOPES)
@given(scores=score_trees(), sparsity=st.sampled_from([0.0, 0.125, 0.5, 0.75, 1.0]))
def test_the_same_under_jit_with_a_traced_sparsity(scope, scores, sparsity):
    eager = wj.make_masks(scores, sparsity, scope=scope)
    jitted = JITTED[scope](scores, sparsity)
    np.testing.assert_array_equal(flat(eager), flat(jitted))


@given(scores=score_trees(), low=SPARSITY, high=SPARSITY)
def test_masks_are_nested_and_pruned_stays_pruned(scores, low, high):
    low, high = sorted((low, high))
    first = wj.make_masks(scores, low)
    other = jax.tree.map(lambda s: -s, scores)  # scores that would bring everything back
    second = wj.make_masks(other, high, previous=first)
    assert not (~flat(first) & flat(second)).any()
    counts = [int(wj.prune_count(s, flat(scores).size)) for s in (low, high)]
    assert [(~flat(first)).sum(), (~flat(second)).sum()] == counts


@given(scores=score_trees(), low=SPARSITY, high=SPARSITY)
def test_leaves_of_one_pattern_are_ranked_together(scores, low, high):
    """`leaf0` has its own sparsity, all others share a threshold, whatever their order in the mapping."""
    masks = wj.make_masks(scores, {"*": high, "leaf0": low})
    first = scores.pop("leaf0")
    count = int(wj.prune_count(low, first.size))
    np.testing.assert_array_equal(~flat(masks.pop("leaf0")), oracle.lowest(first.reshape(-1), count))
    if scores:
        chex.assert_trees_all_equal(masks, wj.make_masks(scores, high))


@given(sparsity=SPARSITY, size=st.integers(0, 2**31 - 1))
def test_exact_sparsity_counts_as_the_number(sparsity, size):
    exact = jax.tree.map(jnp.asarray, exact_sparsity(sparsity))
    assert int(PRUNE_COUNT(exact, size)) == int(wj.prune_count(sparsity, size))
    np.testing.assert_allclose(exact.value, sparsity, rtol=1e-6, atol=1e-9)


def test_infinite_scores_are_never_pruned_and_not_counted():
    scores = {"w": jnp.array([1.0, jnp.inf, 3.0, jnp.inf, 2.0, 4.0])}
    masks = wj.make_masks(scores, 0.5)
    np.testing.assert_array_equal(masks["w"], [False, True, True, True, False, True])
    assert wj.make_masks(scores, 1.0)["w"].tolist() == [False, True, False, True, False, False]
    assert float(wj.mask_sparsity(masks, scores)) == 0.5


def test_negative_zero_is_zero():
    assert wj.make_masks({"w": jnp.array([0.0, -0.0, 1.0])}, 1 / 3)["w"].tolist() == [False, True, True]


def test_each_stacked_layer_is_a_leaf():
    scores = {"w": jnp.array([[1.0, 2.0], [30.0, 40.0]])}
    assert wj.make_masks(scores, 0.5, scope="leaf")["w"].tolist() == [[False, False], [True, True]]
    stacked = wj.make_masks(scores, 0.5, scope="leaf", batch_axes=1)
    assert stacked["w"].tolist() == [[False, True], [False, True]]


def test_empty_leaves_have_empty_masks():
    masks = wj.make_masks({"e": jnp.ones((0, 3)), "w": jnp.arange(4.0)[None]}, 0.5, scope="leaf", batch_axes=1)
    assert masks["e"].shape == (0, 3)
    assert masks["w"].tolist() == [[False, False, True, True]]


@pytest.mark.usefixtures("x64")
def test_float64_scores_are_told_apart():
    scores = {"w": jnp.array([1 + 1e-12, 1.0, 1 + 2e-12, -1.0])}
    assert wj.make_masks(scores, 0.75)["w"].tolist() == [False, False, True, False]
    assert wj.make_masks(scores, 0.5)["w"].tolist() == [True, False, True, False]


def test_explicit_map_last_match_holds():
    scores = {name: jnp.arange(4.0) for name in ("conv1", "conv2", "head")}
    masks = wj.make_masks(scores, {"conv*": 0.5, "conv1": 0.25}, scope="leaf")
    assert {name: int(mask.sum()) for name, mask in masks.items()} == {"conv1": 3, "conv2": 2, "head": 4}


@given(sparsity=st.floats(0, 1))
def test_erdos_renyi_meets_the_total_and_the_proportions(sparsity):
    rng = np.random.default_rng(0)
    shapes = {"a": (3, 3, 8, 16), "b": (16, 40), "c": (40, 10), "bias": (10,)}
    scores = {name: rng.random(shape).astype(np.float32) for name, shape in shapes.items()}
    scores["bias"] = np.full(10, np.inf, np.float32)
    masks = wj.make_masks(scores, sparsity, scope="erdos_renyi")
    kernels = [name for name in shapes if name != "bias"]
    kept = {name: int(np.sum(masks[name])) for name in kernels}
    total = sum(scores[name].size for name in kernels)
    assert total - sum(kept.values()) == int(wj.prune_count(sparsity, total))
    assert masks["bias"].all()
    # Evci et al.: kept_l = ε · Σ axes, unless the leaf is dense
    open_leaves = [name for name in kernels if kept[name] < scores[name].size]
    ratios = {name: kept[name] / sum(shapes[name]) for name in open_leaves}
    for name in open_leaves:
        slack = max(1.5 / sum(shapes[other]) for other in kernels)
        assert abs(ratios[name] - max(ratios.values())) <= slack + 1e-3


@pytest.mark.parametrize("bad", [jnp.nan, -jnp.inf])
def test_broken_scores(bad):
    scores = {"good": jnp.array([1.0, 2.0]), "bad": jnp.array([bad, 1.0])}
    assert int(wj.nonfinite_scores(scores)) == 1
    with pytest.raises(ValueError, match="leaf 'bad' hold 1 NaN or -inf of 2"):
        wj.make_masks(scores, 0.5)
    previous = {"good": jnp.ones(2, bool), "bad": jnp.array([False, True])}
    masks = jax.jit(lambda s: wj.make_masks(s, 0.5, previous=previous))(scores)
    assert masks["bad"].tolist() == [False, True]
    assert masks["good"].tolist() == [False, True]


@pytest.mark.parametrize(
    ("sparsity", "options", "message"),
    [
        (1.5, {}, r"sparsity is 1\.5"),
        (-0.1, {}, "between 0 and 1"),
        (float("nan"), {}, "sparsity is nan"),
        (jnp.array([0.5, 0.5]), {}, r"sparsity has shape \(2,\)"),
        ({"w": 0.5}, {"scope": "erdos_renyi"}, "pass scope='leaf'"),
        ({"v*": 0.5}, {"scope": "leaf"}, r"'v\*', which matches no leaf of \['w'\]"),
        ({"w": 2.0}, {"scope": "leaf"}, r"sparsity is 2\.0"),
        (0.5, {"scope": "layer"}, "scope is 'layer'"),
        (
            0.5,
            {"previous": {"w": jnp.ones(2, bool)}},
            r"previous: leaf 'w' has shape \(2,\), expected \(3,\)",
        ),
    ],
)
def test_bad_requests(sparsity, options, message):
    with pytest.raises(ValueError, match=message):
        wj.make_masks({"w": jnp.arange(3.0)}, sparsity, **options)


def test_no_scores_are_refused():
    with pytest.raises(ValueError, match="no leaves"):
        wj.make_masks({}, 0.5)


def test_integer_scores_are_refused():
    with pytest.raises(ValueError, match="Scores of leaf 'w' are int32"):
        wj.make_masks({"w": jnp.arange(3)}, 0.5)


@pytest.mark.parametrize(("traced", "kept"), [(1.7, 0), (-0.2, 4), (jnp.nan, 4)])
def test_traced_sparsity_is_clipped(traced, kept):
    masks = jax.jit(lambda s: wj.make_masks({"w": jnp.arange(4.0)}, s))(traced)
    assert int(masks["w"].sum()) == kept


def test_no_recompilation_when_the_sparsity_changes():
    traces = []

    @jax.jit
    def masks(scores, sparsity):
        traces.append(1)
        return wj.make_masks(scores, sparsity)

    for sparsity in (0.1, 0.5, 0.9):
        masks({"w": jnp.arange(10.0)}, jnp.float32(sparsity))
    assert len(traces) == 1


def floored(values, floor, size):
    """The highest `ceil(floor · size)` of a leaf are out of reach."""
    protected = np.zeros(len(values), bool)
    protected[np.argsort(values, kind="stable")[len(values) - ceil(floor * size - 1e-3) :]] = True
    return np.where(protected, np.inf, values)


@given(scores=score_trees(), sparsity=st.floats(0, 0.8), floor=st.sampled_from([0.05, 0.1, 0.2]))
def test_a_floor_keeps_the_highest_of_every_leaf(scores, sparsity, floor):
    leaves = [np.ravel(leaf) for leaf in scores.values()]
    ranked = np.concatenate([floored(leaf, floor, leaf.size) for leaf in leaves])
    count = int(wj.prune_count(sparsity, ranked.size))
    if count > np.isfinite(ranked).sum():
        with pytest.raises(ValueError, match=rf"to prune where the sparsity asks for {count}"):
            wj.make_masks(scores, sparsity, floor=floor)
        return
    masks = wj.make_masks(scores, sparsity, floor=floor)
    np.testing.assert_array_equal(~flat(masks), oracle.lowest(ranked, count))


@pytest.mark.parametrize("scope", SCOPES)
def test_no_leaf_is_lost_under_a_floor(scope):
    rng = np.random.default_rng(0)
    scores = {"big": rng.random((40, 10)) + 1, "small": rng.random((5, 4)), "inf": np.full(3, np.inf)}
    scores = jax.tree.map(np.float32, scores)
    first = wj.make_masks(scores, 0.8, scope=scope, floor=0.15)
    assert int(first["small"].sum()) >= 3
    assert int(sum((~mask).sum() for mask in first.values())) == 336
    assert first["inf"].all()
    second = wj.make_masks(scores, 0.85, scope=scope, floor=0.15, previous=first)
    assert int(second["small"].sum()) >= 3
    assert int(sum((~mask).sum() for mask in second.values())) == 357
    assert not (flat(second) & ~flat(first)).any()
    with pytest.raises(ValueError, match="Lower the floor or the sparsity"):
        wj.make_masks(scores, 0.9, scope=scope, floor=0.15)
    traced = jax.jit(lambda s: wj.make_masks(scores, s, scope=scope, floor=0.15))(0.9)
    assert [int(traced[name].sum()) for name in ("big", "small")] == [60, 3]


def test_stacked_layers_have_a_floor_each():
    scores = {"w": jnp.arange(20.0).reshape(2, 10)}
    masks = wj.make_masks(scores, 0.5, batch_axes=1, floor=0.1)
    assert masks["w"].sum(axis=1).tolist() == [1, 9]


@pytest.mark.parametrize("floor", [0.1, 0.3, 0.7, 1.0])
def test_a_floor_is_rounded_up(floor):
    for size in (1, 10, 20, 33, 4097):
        masks = jax.jit(lambda s: wj.make_masks({"w": s}, 1.0, floor=floor))(jnp.arange(float(size)))
        assert int(masks["w"].sum()) == ceil(round(floor * size, 6))


@pytest.mark.parametrize("floor", [-0.1, 1.1, float("nan")])
def test_bad_floors(floor):
    with pytest.raises(ValueError, match="fraction of every leaf that stays"):
        wj.make_masks({"w": jnp.arange(4.0)}, 0.5, floor=floor)


def test_a_floor_above_what_was_kept():
    previous = {"w": jnp.array([True, False, False, False])}
    with pytest.raises(ValueError, match="leaf 'w' should keep 2 weights, but the previous masks left 1"):
        wj.make_masks({"w": jnp.arange(4.0)}, 0.75, floor=0.5, previous=previous)
