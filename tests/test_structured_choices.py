"""Choosing channels: exact counts, ties, caps, budgets, widths and implants."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from structured_cases import arrays

import woodjax as wj

NUMBERS = ("NHWC", "HWIO", "NHWC")
SHAPES = {"first": (3, 3, 2, 10), "second": (3, 3, 10, 8), "third": (8, 6), "last": (6, 3)}
SIZES = {"first": 10, "second": 8, "third": 6}
SCORES = st.tuples(*(st.lists(st.sampled_from([0.0, 1.0, 2.0, 3.0]), min_size=n, max_size=n) for n in SIZES.values()))


def apply_fn(v, x):
    for name in ("first", "second"):
        x = jax.nn.relu(lax.conv_general_dilated(x, v[name], (1, 1), "SAME", dimension_numbers=NUMBERS))
    return jax.nn.relu(x.mean((1, 2)) @ v["third"]) @ v["last"]


@pytest.fixture(scope="module")
def groups():
    found = wj.channel_groups(apply_fn, arrays(SHAPES), jnp.ones((1, 4, 4, 2)))
    assert {group.name: group.size for group in found.groups} == SIZES
    return found


def named(scores):
    return {name: np.array(score) for name, score in zip(SIZES, scores, strict=True)}


def removed(chosen):
    return {name: np.flatnonzero(~mask) for name, mask in chosen.kept.items()}


@hypothesis.given(SCORES, st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.8]))
def test_ratio_is_exact_and_ties_go_by_index(groups, scores, ratio):
    disordered = dict(reversed(named(scores).items()))
    chosen = wj.select_channels(groups, disordered, ratio=ratio)
    flat, gone = np.concatenate(scores), np.concatenate([~chosen.kept[name] for name in SIZES])
    left = {name: int(0.95 * size) for name, size in SIZES.items()}
    names = [name for name, size in SIZES.items() for _ in range(size)]
    expected = np.zeros(len(flat), bool)
    for i in sorted(range(len(flat)), key=lambda i: (flat[i], i)):
        if expected.sum() < round(ratio * len(flat)) and left[names[i]] > 0:
            expected[i], left[names[i]] = True, left[names[i]] - 1
    np.testing.assert_array_equal(gone, expected)
    assert not any(mask.any() for mask in chosen.implanted.values())


def test_infinite_scores_and_groups_left_out_stay(groups):
    chosen = wj.select_channels(groups, {"first": jnp.where(jnp.arange(10) < 4, jnp.inf, 0.0)}, ratio=0.6)
    assert removed(chosen)["first"].tolist() == [4, 5, 6, 7, 8, 9]
    assert chosen.kept["second"].all()
    with pytest.raises(ValueError, match=r"ratio is 0.7, 7 of 10.*\+inf leave 6 to remove"):
        wj.select_channels(groups, {"first": jnp.where(jnp.arange(10) < 4, jnp.inf, 0.0)}, ratio=0.7)


@pytest.mark.parametrize(("cap", "count"), [(0.7, 7), (0.3, 3), (0.29, 2), (0.6, 6), (1.0, 9), (0.0, 0)])
def test_caps_are_exact(groups, cap, count):
    scores = {"first": np.arange(10.0)}
    chosen = wj.select_channels(groups, scores, ratio=count / 10, max_ratio=cap)
    assert len(removed(chosen)["first"]) == count
    with pytest.raises(ValueError, match=f"leave {count} to remove"):
        wj.select_channels(groups, scores, ratio=(count + 1) / 10, max_ratio=cap)


def test_caps_of_fractions_without_a_binary():
    groups = wj.channel_groups(
        lambda v, x: jnp.tanh(x @ v["first"]) @ v["last"],
        arrays({"first": (2, 100), "last": (100, 2)}),
        jnp.ones((1, 2)),
    )
    chosen = wj.select_channels(groups, {"first": np.arange(100.0)}, ratio=0.29, max_ratio=0.29)
    assert len(removed(chosen)["first"]) == 29


@hypothesis.given(SCORES, st.sampled_from(["parameters", "macs"]), st.sampled_from([1, 4]), st.sampled_from([0.0, 0.5]))
@hypothesis.settings(max_examples=15)
def test_budgets_hold_and_are_used(groups, scores, budget, round_to, implants):
    count, scores = getattr(groups, budget), named(scores)
    costs = []
    for fraction in (0.9, 0.6, 0.4):
        options = {"implants": implants, "round_to": round_to}
        chosen = wj.select_channels(groups, scores, **{budget: fraction}, **options)
        costs.append(count(*chosen))
        assert costs[-1] <= fraction * count({})
        absolute = wj.select_channels(groups, scores, **{budget: int(fraction * count({}))}, **options)
        assert all((absolute.kept[name] == chosen.kept[name]).all() for name in SIZES)
        if round_to == 4:
            assert all(mask.sum() % 4 == 0 or mask.all() for mask in chosen.kept.values())
        if round_to == 1 and not implants:  # one channel less does not fit
            number = sum(map(len, removed(chosen).values()))
            before = wj.select_channels(groups, scores, ratio=(number - 1) / groups.num_channels)
            assert count(*before) > fraction * count({})
    assert costs == sorted(costs, reverse=True)


@hypothesis.given(SCORES, st.sampled_from([0.25, 0.5, 1.0]))
def test_implants_are_the_best_of_what_goes(groups, scores, fraction):
    scores = named(scores)
    plain = wj.select_channels(groups, scores, ratio=0.5)
    chosen = wj.select_channels(groups, scores, ratio=0.5, implants=fraction)
    out = [(scores[name][i], k, i, name) for k, name in enumerate(SIZES) for i in removed(plain)[name]]
    able = [(i, name) for _, _, i, name in sorted(out, reverse=True) if name != "third"]
    expected = {name: np.zeros(size, bool) for name, size in SIZES.items()}
    for i, name in able[: round(fraction * 12)]:
        expected[name][i] = True
    for name in SIZES:
        np.testing.assert_array_equal(chosen.implanted[name], expected[name])
        np.testing.assert_array_equal(chosen.kept[name], plain.kept[name] | expected[name])


def test_any_cost(groups):
    calls = []

    def cost(kept, implanted):
        calls.append(sum(mask.sum() for mask in kept.values()))
        return float(calls[-1])

    chosen = wj.select_channels(groups, {name: np.arange(size) for name, size in SIZES.items()}, cost=(cost, 15.0))
    assert sum(mask.sum() for mask in chosen.kept.values()) == 15
    assert len(calls) < 8


@pytest.mark.parametrize(
    ("scores", "options", "match"),
    [
        ({}, {}, r"Budgets given: \[\]"),
        ({}, {"ratio": 0.5, "macs": 0.5}, r"Budgets given: \['ratio', 'macs'\]"),
        ({}, {"ratio": 1.5}, "ratio is 1.5"),
        ({}, {"ratio": -0.5}, "ratio is -0.5"),
        ({}, {"macs": 0.0}, "macs is 0.0"),
        ({}, {"parameters": float("nan")}, "parameters is nan"),
        ({}, {"ratio": 0.1, "implants": 1.5}, "implants is 1.5"),
        ({}, {"ratio": 0.1, "max_ratio": -1}, "max_ratio is -1"),
        ({}, {"ratio": 0.1, "round_to": 0}, "round_to is 0"),
        ({}, {"ratio": 0.1, "round_to": 2.5}, "round_to is 2.5"),
        ({}, {"ratio": 0.1, "round_to": float("nan")}, "round_to is nan"),
        ({"other": np.ones(3)}, {"ratio": 0.1}, "No group 'other'"),
        ({"first": np.ones(3)}, {"ratio": 0.1}, r"scores\['first'\] has shape \(3,\), expected \(10,\)"),
        ({"third": np.array([1, 2, 3, np.nan, 1, 1])}, {"ratio": 0.1}, r"scores\['third'\] has NaN or -inf"),
        ({"third": np.array([1, 2, 3, -np.inf, 1, 1])}, {"ratio": 0.1}, r"scores\['third'\] has NaN or -inf"),
        ({"third": np.ones(6)}, {"macs": 0.2}, r"macs=0.2 cannot be reached: with all 5 channels"),
    ],
)
def test_bad_choices(groups, scores, options, match):
    with pytest.raises(ValueError, match=match):
        wj.select_channels(groups, scores, **options)
