"""Every engine against the paper's recursion, and every step against the Lagrangian system."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st

from woodjax import linalg

SHAPES = [(1, 1), (3, 1), (1, 5), (4, 6), (9, 6), (40, 7), (7, 40)]
ENGINES = {
    "scan": linalg.woodbury_scan,
    "rank_3": lambda g, damping: linalg.woodbury_scan_rank_k(g, damping, rank=3),
    "rank_32": linalg.woodbury_scan_rank_k,
    "primal": lambda g, damping: linalg.primal_inverse(g, damping).inverse,
    "dual": lambda g, damping: linalg.dual_inverse(g, damping).inverse,
}


@st.composite
def problems(draw):
    m, b = draw(st.sampled_from(SHAPES))
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    scale = 10.0 ** draw(st.integers(-3, 1))
    damping = scale**2 * 10.0 ** draw(st.floats(-3, 1))  # relative to the mean squared gradient
    gradients = (scale * rng.standard_normal((m, b))).astype(np.float32)
    weights = rng.standard_normal(b).astype(np.float32)
    kept = rng.random(b) < 0.5
    return gradients, damping, weights, kept


def assert_close(actual, expected, digits=3):
    """Error relative to the largest entry: that is what float32 arithmetic promises."""
    np.testing.assert_allclose(actual, expected, rtol=0, atol=10.0**-digits * np.abs(expected).max())


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("jit", [False, True])
@given(problem=problems())
def test_every_engine_is_the_papers_recursion(engine, jit, problem):
    gradients, damping, _, _ = problem
    function = jax.jit(ENGINES[engine]) if jit else ENGINES[engine]
    inverse = function(jnp.asarray(gradients), damping)
    assert_close(inverse, oracle.woodfisher_inverse(gradients, damping))


def test_the_recursion_inverts_the_fisher():
    gradients = np.random.default_rng(0).standard_normal((5, 8))
    product = oracle.woodfisher_inverse(gradients, 0.1) @ oracle.fisher(gradients, 0.1)
    np.testing.assert_allclose(product, np.eye(8), atol=1e-12)


@given(problem=problems())
def test_dual_diagonal_and_products(problem):
    gradients, damping, vector, _ = problem
    inverse = oracle.woodfisher_inverse(gradients, damping)
    whitener = linalg.whiten_gram(jnp.asarray(gradients), damping)
    assert_close(linalg.dual_inverse_diagonal(jnp.asarray(gradients), whitener), np.diag(inverse))
    assert_close(linalg.dual_solve(jnp.asarray(gradients), whitener, jnp.asarray(vector)), inverse @ vector)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", [(2, linalg.COLUMN_WINDOW), (3, linalg.COLUMN_WINDOW + 1), (5, 9000), (700, 300)])
def test_windows_and_panels_cover_the_matrix_once(shape, masked):
    rng = np.random.default_rng(0)
    gradients = rng.standard_normal(shape)
    kept = rng.random(shape[1]) < 0.5 if masked else None
    counted = gradients * kept if masked else gradients
    narrow = jnp.asarray(gradients, jnp.float32)
    assert_close(linalg.gram(narrow, kept), counted @ counted.T, digits=5)
    whitener = linalg.whiten_gram(narrow, 0.1)
    system = shape[0] * 0.1 * np.eye(shape[0]) + gradients @ gradients.T
    expected = (1 - np.sum(gradients * np.linalg.solve(system, gradients), axis=0)) / 0.1
    assert_close(linalg.dual_inverse_diagonal(narrow, whitener), expected, digits=4)


def test_small_factors_are_float64_where_jax_has_it():
    rng = np.random.default_rng(0)
    rotation = np.linalg.qr(rng.standard_normal((150, 150)))[0]
    rows = rng.standard_normal((200, 150)) * np.geomspace(1, 1e-2, 150) @ rotation
    fisher = (rows.T @ rows / 200).astype(np.float32)
    exact = np.linalg.inv(fisher.astype(np.float64) + 1e-7 * np.eye(150))

    def error():
        found = linalg.fisher_inverse(jnp.asarray(fisher), 1e-7)
        assert found.inverse.dtype == jnp.float32
        return np.abs(found.inverse - exact).max() / np.abs(exact).max()

    narrow = error()
    try:
        jax.config.update("jax_enable_x64", True)
        assert error() < 0.1 * narrow
    finally:
        jax.config.update("jax_enable_x64", False)


@pytest.mark.parametrize("first_order", [False, True])
@given(problem=problems())
def test_joint_steps_solve_the_lagrangian_system(first_order, problem):
    gradients, damping, weights, kept = problem
    mean = gradients.mean(0) if first_order else None
    expected = oracle.constrained_minimiser(oracle.fisher(gradients, damping), weights, ~kept, mean)
    gradient = None if mean is None else jnp.asarray(mean)
    arguments = jnp.asarray(weights), jnp.asarray(kept), gradient
    inverse = linalg.primal_inverse(jnp.asarray(gradients), damping).inverse
    from_gram = linalg.joint_step_gram(jnp.asarray(gradients), damping, *arguments)
    from_inverse = linalg.joint_step_inverse(inverse, *arguments)
    assert_close(from_gram, expected)
    assert_close(from_inverse, expected, digits=2)
    for step in (from_gram, from_inverse):
        np.testing.assert_array_equal(step[~kept], -weights[~kept])


@pytest.mark.parametrize("function", [linalg.primal_inverse, linalg.dual_inverse, linalg.whiten_gram])
def test_spoiled_factor_raises_the_damping_and_says_so(function):
    row = 1e3 * np.ones((1, 50), np.float32)
    gradients = jnp.asarray(np.repeat(row, 50, 0))  # rank one: eigenvalue 5e7 against 1e-6
    result = function(gradients, 1e-6)
    assert np.isfinite(result[0]).all()
    assert result.damping > 1e-6
    assert np.log10(result.damping / 1e-6) == pytest.approx(round(np.log10(result.damping / 1e-6)), abs=1e-3)


@pytest.mark.parametrize("function", [linalg.primal_inverse, linalg.dual_inverse])
def test_raised_damping_is_what_the_inverse_has(function):
    gradients = np.repeat(1e3 * np.ones((1, 20), np.float32), 20, 0)
    inverse, used = function(jnp.asarray(gradients), 1e-6)
    # The smallest pivot is sound to 1 %, so the inverse to a few.
    assert_close(inverse, oracle.woodfisher_inverse(gradients, float(used)), digits=1.5)


def test_sound_factor_keeps_the_damping():
    gradients = jnp.asarray(np.random.default_rng(0).standard_normal((9, 6)), jnp.float32)
    assert linalg.primal_inverse(gradients, 0.01).damping == jnp.float32(0.01)


def test_nan_gradients_end_in_nan_and_not_in_a_loop():
    assert np.isnan(linalg.primal_inverse(jnp.full((3, 2), jnp.nan), 1.0).inverse).all()


def test_contract_accumulates_bfloat16_in_float32():
    x = jnp.full(4096, 1.01, jnp.bfloat16)
    total = linalg.contract("i,i->", x, x)
    assert total.dtype == jnp.float32
    np.testing.assert_allclose(total, 4096 * float(x[0]) ** 2, rtol=1e-3)  # a bfloat16 sum stops growing at 256


def test_contract_asks_for_full_precision():
    assert "HIGHEST" in str(jax.make_jaxpr(lambda x: linalg.contract("ij,jk->ik", x, x))(jnp.ones((2, 2))))


@pytest.mark.parametrize("engine", ENGINES)
def test_diagonals_lost_to_cancellation_are_bounded(engine):
    """[F⁻¹]_qq ≥ 1/F_qq, with equality for uncorrelated rows, where 1 − ΣZ² is rounding alone."""
    gradients = jnp.asarray(1e3 * np.eye(4, 8), jnp.float32)
    diagonal = jnp.diagonal(ENGINES[engine](gradients, 1e-3))
    np.testing.assert_allclose(diagonal, 1 / (np.asarray(gradients**2).mean(0) + 1e-3), rtol=1e-3)
    whitener = linalg.whiten_gram(gradients, 1e-3)
    np.testing.assert_allclose(linalg.dual_inverse_diagonal(gradients, whitener), diagonal, rtol=1e-3)


def test_rank_must_be_positive():
    with pytest.raises(ValueError, match="rank is 0"):
        linalg.woodbury_scan_rank_k(jnp.ones((2, 2)), 1.0, rank=0)
