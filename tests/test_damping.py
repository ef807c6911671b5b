"""Relative and automatic damping, against a dense float64 search over the likelihood."""

import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import woodjax as wj

SHAPE = (5, 4)


def draw(m, seed=0, scale=1.0, dead=()):
    """Gradients whose coordinates differ in size by a factor of a hundred; some are always zero."""
    rng = np.random.default_rng(seed)
    rows = scale * rng.standard_normal((m, 20)) @ np.diag(np.geomspace(1, 1e-2, 20))
    rows[:, list(dead)] = 0
    return rows.astype(np.float32)


def tree(rows):
    return jnp.asarray(rows).reshape(-1, *SHAPE)


def damping_of(build, rows, damping, **options):
    return float(build(tree(rows), damping=damping, **options).damping[0])


BUILDERS = {
    "block primal": (wj.block_fisher, {"block_size": 20, "engine": "primal"}),
    "block dual": (wj.block_fisher, {"block_size": 20, "engine": "dual"}),
    "low rank": (wj.low_rank_fisher, {}),
    "diagonal": (wj.diagonal_fisher, {}),
}
for_each = pytest.mark.parametrize("name", BUILDERS)


@for_each
@pytest.mark.parametrize("m", [6, 64])
def test_relative_damping_is_a_fraction_of_the_mean_diagonal_of_live_weights(name, m):
    build, options = BUILDERS[name]
    rows = draw(m, dead=(3, 4))
    expected = 0.1 * np.mean(np.delete(rows, [3, 4], axis=1) ** 2)
    assert damping_of(build, rows, wj.Relative(0.1), **options) == pytest.approx(expected, rel=1e-5)


@for_each
def test_relative_scores_follow_the_scale_of_the_loss(name):
    build, options = BUILDERS[name]
    weights = jnp.asarray(draw(1, seed=1)).reshape(SHAPE)
    small, large = (
        wj.obs_scores(weights, build(tree(draw(30, scale=scale)), damping=wj.Relative(0.1), **options))
        for scale in (1.0, 100.0)
    )
    np.testing.assert_allclose(large, 1e4 * small, rtol=1e-4)


def surprise(known, held_out, damping, live, diagonal):
    """−2 log likelihood of held-out gradients under N(0, F + λI), of the live coordinates."""
    fisher = oracle.fisher(known[:, live], damping)
    if diagonal:
        fisher = np.diag(np.diag(fisher))
    log_det = np.linalg.slogdet(fisher)[1]
    return log_det + np.mean(np.einsum("md,md->m", held_out[:, live] @ np.linalg.inv(fisher), held_out[:, live]))


@for_each
@pytest.mark.parametrize("m", [8, 200])
def test_automatic_damping_is_the_most_likely(name, m):
    build, options = BUILDERS[name]
    rows, live = draw(m, seed=2, dead=(0, 7)).astype(np.float64), np.delete(np.arange(20), [0, 7])
    even, odd = rows[::2], rows[1::2]
    both = name in {"block dual", "low rank"}  # rows can be told apart: each half is held out in turn

    def total(damping):
        pairs = [(even, odd), (odd, even)] if both else [(even, odd)]
        return sum(surprise(a, b, damping, live, name == "diagonal") for a, b in pairs)

    grid = np.mean(rows[:, live] ** 2) * np.geomspace(1e-6, 1e2, 2000)
    best = min(total(damping) for damping in grid)
    found = damping_of(build, rows, "auto", **options)
    assert total(found) == pytest.approx(best, abs=1e-2)  # the search is 3 % fine
    assert total(10 * found) > best + 0.01 or total(found / 10) > best + 0.01  # the test can tell


@pytest.mark.parametrize("build", [wj.block_fisher, wj.low_rank_fisher, wj.diagonal_fisher])
@pytest.mark.parametrize("damping", [wj.Relative(0.1), "auto"])
def test_a_broken_leaf_does_not_take_the_damping_along(build, damping):
    options = {} if build is wj.diagonal_fisher else {"block_size": 20}
    sound = {"a": tree(draw(30)), "b": tree(draw(30, seed=1))}
    broken = sound | {"b": sound["b"].at[0, 0, 0].set(jnp.nan)}
    alone = build({"a": sound["a"]}, damping=damping, **options).damping[0]
    found = build(broken, damping=damping, **options)
    assert 0.2 < float(found.damping[0]) / float(alone) < 5
    assert np.isfinite(found.inverse_diagonal()["a"]).all()
    assert np.isnan(found.inverse_diagonal()["b"]).any()


def test_a_fraction_may_be_any_number():
    assert wj.Relative(jnp.float32(0.5)) == wj.Relative(0.5)
    assert hash(wj.Relative(jnp.float32(0.5))) == hash(wj.Relative(0.5))


@for_each
def test_automatic_damping_needs_two_rows(name):
    build, options = BUILDERS[name]
    with pytest.raises(ValueError, match="at least two"):
        build(tree(draw(1)), damping="auto", **options)


@pytest.mark.parametrize("bad", [0.0, -1.0, np.nan, np.inf, "relative", np.ones(2)])
@for_each
def test_bad_damping(name, bad):
    build, options = BUILDERS[name]
    with pytest.raises(ValueError, match="damping"):
        build(tree(draw(3)), damping=bad, **options)


@pytest.mark.parametrize("alpha", [0.0, -1.0, np.nan, np.inf])
def test_bad_fraction(alpha):
    with pytest.raises(ValueError, match="alpha"):
        wj.Relative(alpha)


@pytest.mark.parametrize("name", ["block primal", "block dual", "low rank"])
def test_raised_blocks_are_counted(name):
    build, options = BUILDERS[name]
    rows = np.tile(draw(3, scale=1e3), (2, 1))  # a singular Gram matrix
    assert int(build(tree(rows), damping=1.0, **options).raised) == 0
    spoiled = build(tree(rows), damping=1e-6, **options)
    assert int(spoiled.raised) == 1
    assert float(spoiled.damping[0]) > 1e-5
