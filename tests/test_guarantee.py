"""Promises: p-values against exact distributions, error rates by simulation, and the ladder."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import woodjax as wj

TESTS = {
    "betting": lambda x, mean: wj.betting_p_value(x, mean, 0.1),
    "hoeffding_bentkus": wj.hoeffding_bentkus_p_value,
}


@pytest.mark.newest
@pytest.mark.parametrize("name", TESTS)
@pytest.mark.parametrize(("rate", "size"), [(0.02, 400), (0.1, 100), (0.5, 50)])
def test_a_true_hypothesis_is_rejected_no_more_often_than_promised(name, rate, size):
    """Bernoulli losses whose mean is the one tested, the hardest case: at most α, up to what 2,000 trials can tell."""
    rng = np.random.default_rng(0)
    trials, level = 2000, 0.1
    rejected = sum(TESTS[name]((rng.random(size) < rate).astype(float), rate) <= level for _ in range(trials))
    assert rejected <= stats.binom.ppf(0.999, trials, level)


@pytest.mark.newest
@pytest.mark.parametrize("name", TESTS)
def test_a_test_that_ignores_chance_would_be_caught(name):
    """The sample mean alone, taken for a proof, rejects a true hypothesis half of the time; a good network passes."""
    rng = np.random.default_rng(0)
    naive = sum(rng.random(100).mean() < 0.5 for _ in range(400))
    assert naive > stats.binom.ppf(0.999, 400, 0.1)
    passed = sum(TESTS[name]((rng.random(500) < 0.05).astype(float), 0.15) <= 0.1 for _ in range(50))
    assert passed >= 45


@given(n=st.integers(1, 300), k=st.integers(0, 300), mean=st.floats(0.01, 0.99))
@settings(max_examples=60)
def test_hoeffding_bentkus_is_above_the_exact_binomial_and_follows_its_formula(n, k, mean):
    k = min(k, n)
    values = np.repeat([1.0, 0.0], [k, n - k])
    exact = stats.binom.cdf(k, n, mean)
    found = wj.hoeffding_bentkus_p_value(values, mean)
    assert found >= min(exact * (1 - 1e-9), 1)
    share = min(k / n, mean)
    terms = [x * np.log(x / y) if x else 0.0 for x, y in ((share, mean), (1 - share, 1 - mean))]
    np.testing.assert_allclose(found, min(1, np.e * exact, np.exp(-n * sum(terms))), rtol=1e-9)


def test_betting_is_the_capital_of_a_gambler_who_knows_the_past_only():
    values, mean, level = np.random.default_rng(1).random(60) * 0.6, 0.5, 0.05
    capital, richest, past = 1.0, 1.0, []
    for x in values:
        means = [(0.5 + sum(past[: i + 1])) / (i + 2) for i in range(len(past))]
        variance = (0.25 + sum((y - m) ** 2 for y, m in zip(past, means, strict=True))) / (len(past) + 1)
        stake = min(np.sqrt(2 * np.log(1 / level) / (len(values) * variance)), 0.75 / (1 - mean))
        capital *= 1 + stake * (mean - x)
        richest = max(richest, capital)
        past.append(x)
    np.testing.assert_allclose(wj.betting_p_value(values, mean, level), 1 / richest, rtol=1e-9)


def test_betting_profits_from_a_small_variance():
    values = 0.5 + 0.01 * np.random.default_rng(0).standard_normal(1000)
    assert wj.betting_p_value(values, 0.51) < 1e-3 < 0.05 < wj.hoeffding_bentkus_p_value(values, 0.51)


def test_bad_observations():
    for p_value in TESTS.values():
        for values, mean in (([], 0.5), ([1.5], 0.5), ([np.nan], 0.5), ([[0.5]], 0.5), ([0.5], 0.0), ([0.5], 1.0)):
            with pytest.raises(ValueError, match=r"observations in \[0, 1\]|mean is"):
                p_value(np.array(values), mean)
    with pytest.raises(ValueError, match="level is 0"):
        wj.betting_p_value(np.ones(3), 0.5, 0)


@given(size=st.integers(2, 50), share=st.floats(0.05, 0.95), seed=st.integers(0, 100))
@settings(max_examples=4)
def test_the_split_is_disjoint_and_whole(size, share, seed):
    batch = (jnp.arange(size), -jnp.arange(size))
    count = round(share * size)
    if not 0 < count < size:
        return
    pool, calibration = wj.split_batch(batch, share, jax.random.key(seed))
    assert len(calibration[0]) == count
    assert sorted([*pool[0].tolist(), *calibration[0].tolist()]) == list(range(size))
    np.testing.assert_array_equal(pool[0], -pool[1])
    assert len(wj.split_batch(batch, count, jax.random.key(seed))[1][0]) == count


def loss_fn(params, example):
    return params["w"][0, 0] * example


class Ladder:
    """Networks whose loss rises with the sparsity by as much as each rung says, times the example."""

    def __init__(self, rises):
        self.rises, self.pools = rises, []

    def __call__(self, pool, sparsity):
        self.pools.append(np.asarray(pool))
        return {"w": jnp.full((1, 1), 1 + self.rises[sparsity])}, {"w": jnp.zeros((1, 1), bool)}, f"info {sparsity}"


PARAMS = {"w": jnp.ones((1, 1))}
EXAMPLES = jnp.asarray(np.random.default_rng(0).random(400), jnp.float32) * 2  # mean 1


@pytest.mark.parametrize("test", TESTS)
def test_the_ladder_stops_at_the_first_failure(test):
    prune = Ladder({0.1: 0.0, 0.5: 0.01, 0.7: 0.6, 0.9: 0.0})
    promise = {"max_loss_increase": 0.25, "sparsities": [0.1, 0.5, 0.7, 0.9], "held_out": 300, "test": test}
    params, masks, info = wj.prune_to_loss(loss_fn, PARAMS, EXAMPLES, prune=prune, **promise)
    assert float(params["w"][0, 0]) == pytest.approx(1.01)
    assert not masks["w"].any()
    assert (info.sparsity, info.certified, info.num_calibration) == (0.5, True, 300)
    assert (info.confidence, info.max_loss_increase, info.loss_bound) == (0.95, 0.25, 1.0)
    assert info.prune_info == "info 0.5"
    assert info.passed.tolist() == [True, True, False, False]
    assert np.isnan(info.p_value).tolist() == [False, False, False, True]
    assert (info.p_value[:2] <= 0.05).all()
    assert info.p_value[2] > 0.05
    assert len(prune.pools) == 3  # what comes after the failure is not even pruned
    np.testing.assert_allclose(info.mean_increase[:2], [0, 0.01], atol=2e-3)
    pool = prune.pools[0]
    calibration = np.setdiff1d(np.asarray(EXAMPLES), pool)
    assert len(pool) == 100
    assert len(calibration) == 300
    np.testing.assert_allclose(info.mean_increase[2], np.minimum(0.6 * calibration, 1).mean(), rtol=1e-4)


def test_nothing_passes():
    prune = Ladder({0.3: 0.5, 0.6: 0.0})
    params, masks, info = wj.prune_to_loss(
        loss_fn, PARAMS, EXAMPLES, max_loss_increase=0.1, sparsities=[0.3, 0.6], prune=prune
    )
    assert params is PARAMS
    assert masks["w"].all()
    assert (info.sparsity, info.certified, info.prune_info) == (0.0, False, None)
    assert not info.passed.any()


@pytest.mark.parametrize("rise", [np.nan, np.inf])
def test_a_broken_network_does_not_pass(rise):
    info = wj.prune_to_loss(
        loss_fn, PARAMS, EXAMPLES, max_loss_increase=0.5, sparsities=[0.5], prune=Ladder({0.5: rise})
    )[2]
    assert not info.certified
    assert info.mean_increase[0] == 1.0  # as bad as the bound allows


def test_a_network_at_the_tolerance_passes_no_more_often_than_promised():
    """The whole way, with splits and data drawn anew: a ladder whose only rung breaks the promise by a hair."""
    rng, trials = np.random.default_rng(0), 300
    certified = 0
    for number in range(trials):
        # An example errs after pruning with a probability of 0.1; before, it never does.
        examples = jnp.asarray(rng.random(200) < 0.1, jnp.float32)
        certified += wj.prune_to_loss(
            loss_fn,
            {"w": jnp.zeros((1, 1))},
            examples,
            max_loss_increase=0.1,
            confidence=0.8,
            sparsities=[0.5],
            metric=loss_fn,
            prune=lambda pool, sparsity: ({"w": jnp.ones((1, 1))}, None, None),
            key=jax.random.key(number),
        )[2].certified
    assert 0 < certified <= stats.binom.ppf(0.999, trials, 0.2)


def test_the_default_prunes_in_one_shot():
    def squared(params, example):
        x, y = example
        return (x @ params["w"][:, 0] - y) ** 2

    x = jax.random.normal(jax.random.key(0), (1000, 4))
    params = {"w": jnp.array([[1.0], [0.5], [0.02], [0.01]])}
    y = x @ params["w"][:, 0] + 0.1 * jax.random.normal(jax.random.key(1), (1000,))
    pruned, masks, info = wj.prune_to_loss(squared, params, (x, y), max_loss_increase=0.1, sparsities=[0.25, 0.5, 0.75])
    assert masks["w"][:, 0].tolist() == [True, True, False, False]
    np.testing.assert_array_equal(pruned["w"] != 0, masks["w"])
    assert info.sparsity == float(info.prune_info.sparsity[-1]) == 0.5


def test_bad_arguments():
    def call(**options):
        wj.prune_to_loss(loss_fn, PARAMS, EXAMPLES, **({"max_loss_increase": 0.1, "prune": Ladder({0.5: 0})} | options))

    for options, message in (
        ({"max_loss_increase": 1.0}, "between ±1.0"),
        ({"confidence": 1.0}, "confidence is 1.0"),
        ({"sparsities": [0.5, 0.4]}, "increasing fractions"),
        ({"sparsities": [0.5, 1.4]}, "increasing fractions"),
        ({"sparsities": []}, "increasing fractions"),
        ({"held_out": 400}, "held_out is 400"),
        ({"held_out": 0.0}, "held_out is 0.0"),
        ({"loss_bound": 0.0}, "loss_bound is 0.0"),
        ({"test": "normal"}, "test is 'normal'"),
        ({"metric": loss_fn, "sparsities": [0.5]}, r"metric is between .* must lie in \[0, 1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            call(**options)
    with pytest.raises(ValueError, match="200 of 200 losses of the dense network"):
        wj.prune_to_loss(loss_fn, PARAMS, EXAMPLES * jnp.nan, max_loss_increase=0.1)
    with pytest.raises(ValueError, match="pruned parameters: leaf 'w'"):
        call(sparsities=[0.5], prune=lambda pool, sparsity: ({"w": jnp.ones((2, 1))}, None, None))
