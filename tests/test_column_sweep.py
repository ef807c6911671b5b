"""The column sweep against greedy pruning with explicit inverses."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import woodjax as wj

SWEEPS = {
    "unstructured": {"sparsity": 0.55, "block_size": 4},
    "one block": {"sparsity": 0.3, "block_size": 128},
    "2:4": {"pattern": (2, 4), "block_size": 8},
}


def layer(seed, inputs=12, out=5, m=40):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((m, inputs)) @ rng.standard_normal((inputs, inputs)) / np.sqrt(inputs)
    return rng.standard_normal((inputs, out)).astype(np.float32), (x.T @ x / m).astype(np.float32)


@pytest.mark.parametrize("name", SWEEPS)
@settings(max_examples=8)
@given(seed=st.integers(0, 1000))
def test_sweep_is_greedy_obs_in_the_order_of_inputs(name, seed):
    options = SWEEPS[name]
    kernel, hessian = layer(seed, inputs=10 if name == "unstructured" else 12)
    damped = hessian.astype(np.float64) + 0.02 * np.eye(len(hessian))
    swept = wj.column_sweep(kernel, hessian, damping=0.02, **options)
    total = len(kernel)

    def choose(first, scores):
        if "pattern" in options:
            return np.argsort(np.argsort(scores, axis=0, kind="stable"), axis=0) < 2
        end = min(first + options["block_size"], total)
        count = oracle.rounded(options["sparsity"], 5 * end) - oracle.rounded(options["sparsity"], 5 * first)
        return oracle.lowest(scores.ravel(), count).reshape(scores.shape)

    width = 4 if "pattern" in options else options["block_size"]
    expected, mask = oracle.column_sweep(kernel, damped, width, choose)
    np.testing.assert_array_equal(swept.mask, mask)
    np.testing.assert_allclose(swept.kernel, expected, atol=2e-4 * np.abs(expected).max())
    assert float(swept.damping) == pytest.approx(0.02)


def test_sweep_lies_between_plain_removal_and_exact_compensation():
    kernel, hessian = layer(3, inputs=64, out=16, m=300)
    swept = jax.jit(partial(wj.column_sweep, sparsity=0.6, block_size=16))(kernel, hessian)
    kept = np.asarray(swept.mask)
    assert (~kept).sum() == oracle.rounded(0.6, kernel.size)
    np.testing.assert_array_equal(np.asarray(swept.kernel) != 0, kept)
    damped = hessian + float(swept.damping) * np.eye(64)

    def cost(change):
        return 0.5 * np.einsum("io,ij,jo->", change, damped, change)

    best = np.stack(
        [oracle.constrained_minimiser(damped, kernel[:, o].astype(float), ~kept[:, o]) for o in range(16)], axis=1
    )
    found = cost(np.asarray(swept.kernel, np.float64) - kernel)
    assert cost(best) < found < cost(np.where(kept, 0, -kernel))


def test_sweep_of_half_precision_and_traced_sparsity():
    kernel, hessian = layer(1)
    half = wj.column_sweep(jnp.asarray(kernel, jnp.bfloat16), hessian, sparsity=0.5)
    assert half.kernel.dtype == jnp.bfloat16
    assert int((~half.mask).sum()) == 30
    traced = jax.jit(lambda s: wj.column_sweep(kernel, hessian, sparsity=s))(0.5)
    np.testing.assert_array_equal(traced.mask, wj.column_sweep(kernel, hessian, sparsity=0.5).mask)


def test_sweep_does_not_take():
    kernel, hessian = layer(0)
    for options, message in (
        ({}, "Pass one of"),
        ({"sparsity": 0.5, "pattern": (2, 4)}, "Pass one of"),
        ({"pattern": (2, 5)}, r"pattern is \(2, 5\) for 12 inputs"),
        ({"pattern": (5, 4)}, "pattern is"),
        ({"sparsity": 0.5, "block_size": 0}, "block_size is 0"),
        ({"sparsity": 1.5}, "1.5"),
        ({"sparsity": 0.5, "damping": "auto"}, "not offered"),
    ):
        with pytest.raises(ValueError, match=message):
            wj.column_sweep(kernel, hessian, **options)
    with pytest.raises(ValueError, match=r"hessian \(5, 5\)"):
        wj.column_sweep(kernel, hessian[:5, :5], sparsity=0.5)


@pytest.mark.parametrize(
    ("kernel", "hessian", "message"),
    [
        (np.array([[1], [3]]), np.eye(2), "kernel is int"),
        (np.array([[1.0], [np.nan]]), np.eye(2), "kernel holds NaN"),
        (np.ones((2, 1)), np.full((2, 2), np.inf), "hessian holds NaN or inf"),
    ],
)
def test_arrays_that_cannot_be(kernel, hessian, message):
    with pytest.raises(ValueError, match=message):
        wj.column_sweep(kernel, hessian, sparsity=0.5)
