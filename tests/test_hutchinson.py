"""Hutchinson's estimates against dense Hessians whose every entry is known: of quadratic losses."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.flatten_util import ravel_pytree

import woodjax as wj

KEY = jax.random.key(0)
SHAPES = {"bias": (3,), "first": (2, 3), "last": (3, 2)}  # flat coordinates 0:3, 3:9, 9:15
BLOCKS = {"bias": range(3), "first": range(3, 9), "last": range(9, 15)}
D = 15


def quadratic_loss(p, matrix):
    """Of one example, whose Hessian is `matrix`."""
    w = jnp.concatenate([p[name].reshape(-1) for name in SHAPES])
    return 0.5 * jnp.einsum("q,qr,r", w, matrix.astype(w.dtype), w, precision="highest")


def problem(seed=0, n=5, shared=1.0):
    """Params and symmetric matrices `[n, d, d]`: a part they share, and a part of their own."""
    rng = np.random.default_rng(seed)
    matrices = shared * rng.standard_normal((D, D)) + rng.standard_normal((n, D, D))
    params = {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in SHAPES.items()}
    return params, np.asarray(matrices + matrices.swapaxes(1, 2) + 3 * np.eye(D), np.float32)


def flat(tree):
    return np.asarray(ravel_pytree(tree)[0])


def same(a, b, rtol=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-5), a, b)


@partial(jax.jit, static_argnames=("function", "signs", "probes"))
def estimate(function, params, batch, key, signs, probes=2000):
    return function(quadratic_loss, params, batch, key, probes=probes, signs=signs, probes_at_once=100, check=False)


def channels():
    """Coordinates of each output channel of the two kernels."""
    return [list(b)[c::width] for b, width in ((BLOCKS["first"], 3), (BLOCKS["last"], 2)) for c in range(width)]


def variances(matrices, blocks, signs):
    if signs == "batch":
        return np.array([oracle.probe_variance(matrices.mean(0), block) for block in blocks])
    return (
        np.array([[oracle.probe_variance(m, block) for block in blocks] for m in matrices]).sum(0) / len(matrices) ** 2
    )


def agrees(values, errors, exact, variance, probes=2000):
    """The estimate within its standard error, and the standard error within what 2000 probes tell of it."""
    np.testing.assert_allclose(errors, np.sqrt(variance / probes), rtol=0.15)
    assert np.abs((values - exact) / errors).max() < 4.5


@pytest.mark.parametrize("signs", ["batch", "example"])
@settings(max_examples=4)
@given(seed=st.integers(0, 1000))
def test_estimates_are_unbiased_and_know_their_variance(signs, seed):
    params, matrices = problem(seed)
    diagonal, single = np.diag(matrices.mean(0)), [[q] for q in range(D)]
    found = estimate(wj.hutchinson_diagonal, params, matrices, KEY, signs)
    errors = flat(found.standard_error)
    agrees(flat(found.diagonal), errors, diagonal, variances(matrices, single, signs))

    found = estimate(wj.hutchinson_trace, params, matrices, KEY, signs)
    exact = [diagonal[list(b)].sum() for b in BLOCKS.values()]
    agrees(flat(found.trace), flat(found.standard_error), exact, variances(matrices, BLOCKS.values(), signs))
    variance = variances(matrices, [range(D)], signs)
    agrees(found.total, found.total_standard_error, diagonal.sum(), variance[0])

    found = estimate(wj.hutchinson_axis_traces, params, matrices, KEY, signs)
    exact = [diagonal[block].sum() for block in channels()]
    kernels = np.ix_(range(3, 15), range(3, 15))  # the bias has no probes, and adds no variance
    small = np.stack([m[kernels] for m in matrices])
    variance = variances(small, [np.array(block) - 3 for block in channels()], signs)
    agrees(flat(found.traces), flat(found.standard_error), exact, variance)


def test_signs_for_each_example_share_out_what_examples_share():
    """`n` times less variance where examples have one Hessian; more where their Hessians cancel."""
    params, one = problem(n=1)
    run = partial(estimate, wj.hutchinson_trace, params)
    error = lambda batch, signs: float(run(batch, KEY, signs).total_standard_error)
    equal = np.repeat(one, 5, axis=0)
    np.testing.assert_allclose(error(equal, "batch") / error(equal, "example"), np.sqrt(5), rtol=0.1)
    opposite = equal * np.array([1, -1, 1, -1, 0], np.float32)[:, None, None]
    assert error(opposite, "batch") < 1e-5 < error(opposite, "example")


def test_one_set_of_signs_under_every_function_and_shape_of_the_loop():
    params, matrices = problem()
    options = {"probes": 7, "check": False}
    everything = lambda path, leaf: True
    run = lambda function, **more: function(quadratic_loss, params, matrices, KEY, **options, **more)
    diagonal = run(wj.hutchinson_diagonal)
    trace = run(wj.hutchinson_trace)
    columns = run(wj.hutchinson_axis_traces, select=everything)
    rows = run(wj.hutchinson_axis_traces, select=everything, axis=0)
    same(trace.trace, jax.tree.map(jnp.sum, diagonal.diagonal))
    np.testing.assert_allclose(trace.total, flat(diagonal.diagonal).sum(), rtol=1e-5)
    same(columns.traces, jax.tree.map(lambda x: x.sum(tuple(range(x.ndim - 1))), diagonal.diagonal))
    sums = run(wj.hutchinson_sums, sums=lambda tree: jax.tree.map(lambda x: x.sum(0), tree))
    same(sums.sums, jax.tree.map(lambda x: x.sum(0), diagonal.diagonal))
    same((sums.sums["last"], sums.standard_error["last"]), (columns.traces["last"], columns.standard_error["last"]))
    same(rows.traces, jax.tree.map(lambda x: x.sum(tuple(range(1, x.ndim))), diagonal.diagonal))

    alone = run(wj.hutchinson_diagonal, signs="batch", microbatch_size=1)
    for microbatch_size, probes_at_once in ((None, 3), (2, 1)):
        shape = {"microbatch_size": microbatch_size, "probes_at_once": probes_at_once}
        found = run(wj.hutchinson_diagonal, signs="example", **shape)
        same(found, alone, rtol=1e-4)
        assert int(found.probes) == 7
    assert not np.allclose(flat(diagonal.diagonal), flat(alone.diagonal), rtol=1e-2)


def test_the_rule_stops_and_keeps_its_promise():
    params, matrices = problem(shared=0.3)
    exact, tolerance = np.trace(matrices.mean(0)), 0.1
    run = partial(wj.hutchinson_trace, quadratic_loss, tolerance=tolerance, probes=400, check=False)
    found = jax.jit(jax.vmap(lambda key: run(params, matrices, key)))(jax.random.split(KEY, 300))
    used = np.asarray(found.probes)
    needed = oracle.probe_variance(matrices.mean(0), range(D)) / (tolerance * exact) ** 2
    assert wj.MINIMUM_PROBES < needed < 200
    assert used.min() >= wj.MINIMUM_PROBES
    assert used.max() < 400
    np.testing.assert_allclose(used.mean(), needed, rtol=0.25)
    assert (found.total_standard_error <= tolerance * np.abs(found.total) * (1 + 1e-5)).all()
    relative = np.asarray(found.total) / exact - 1
    assert np.sqrt(np.mean(relative**2)) < 1.25 * tolerance
    assert np.mean(np.abs(relative) < 2 * tolerance) > 0.9


def test_the_rule_outside_jit_inside_and_over_constants():
    params, matrices = problem(shared=0.3)
    options = {"tolerance": 0.3, "probes": 300, "probes_at_once": 4, "microbatch_size": 2, "check": False}
    run = partial(wj.hutchinson_trace, quadratic_loss, **options)
    outside = run(params, matrices, KEY)
    same(jax.jit(run)(params, matrices, KEY), outside, rtol=1e-4)
    same(jax.jit(lambda: run(params, matrices, KEY))(), outside, rtol=1e-4)
    found = wj.hutchinson_axis_traces(quadratic_loss, params, matrices, KEY, **options)
    assert wj.MINIMUM_PROBES < int(found.probes) < 300
    errors, values = flat(found.standard_error), flat(found.traces)
    assert np.sum(errors**2) <= 0.09 * (np.sum(values**2) - np.sum(errors**2))


def test_where_the_rule_has_nothing_to_say():
    params, matrices = problem()
    run = lambda batch, **more: wj.hutchinson_trace(quadratic_loss, params, batch, KEY, check=False, **more)
    certain = np.eye(D, dtype=np.float32)[None]
    assert int(run(certain, tolerance=1e-6).probes) == wj.MINIMUM_PROBES  # no variance
    assert int(run(0 * certain, tolerance=1e-6).probes) == wj.MINIMUM_PROBES
    assert int(run(certain, tolerance=1e-6, probes=4).probes) == 4
    traceless = matrices.mean(0, keepdims=True) * (1 - certain)
    assert int(run(traceless, tolerance=0.5, probes=30).probes) == 30  # no relative error of zero
    assert int(run(np.nan * certain, tolerance=0.5, probes=12).probes) == 12


def test_leaves_that_are_not_selected_are_constants():
    params, matrices = problem()
    only_last = lambda path, leaf: path == "last"
    found = wj.hutchinson_trace(quadratic_loss, params, matrices, KEY, probes=9, select=only_last)
    assert np.isnan(found.trace["bias"])
    assert np.isnan(found.standard_error["first"])
    np.testing.assert_allclose(found.total, found.trace["last"])
    inside = np.zeros_like(matrices)
    inside[:, 9:, 9:] = matrices[:, 9:, 9:]
    alone = wj.hutchinson_trace(quadratic_loss, params, inside, KEY, probes=9)
    np.testing.assert_allclose(found.trace["last"], alone.trace["last"], rtol=1e-4)
    np.testing.assert_allclose(found.standard_error["last"], alone.standard_error["last"], rtol=1e-4)
    columns = wj.hutchinson_axis_traces(quadratic_loss, params, matrices, KEY, probes=9)
    assert {name: leaf.shape for name, leaf in columns.traces.items()} == {"bias": (0,), "first": (3,), "last": (2,)}


def test_dtypes(x64):
    params, matrices = problem()
    run = lambda dtype: wj.hutchinson_axis_traces(
        quadratic_loss, jax.tree.map(lambda w: w.astype(dtype), params), matrices, KEY, probes=5, signs="example"
    ).traces["first"]
    half, double = run(jnp.bfloat16), run(jnp.float64)
    assert (half.dtype, double.dtype) == (jnp.float32, jnp.float64)
    np.testing.assert_allclose(half, double, atol=0.02 * np.abs(double).max())


def test_bad_arguments():
    params, matrices = problem()
    for function in (wj.hutchinson_diagonal, wj.hutchinson_trace, wj.hutchinson_axis_traces):
        run = partial(function, quadratic_loss, params, matrices, KEY)
        for bad, message in (
            ({"probes": 1}, "probes is 1"),
            ({"tolerance": 0.0}, "tolerance is 0.0"),
            ({"tolerance": float("nan")}, "tolerance is nan"),
            ({"signs": "row"}, "signs is 'row'"),
            ({"probes_at_once": 0}, "probes_at_once is 0"),
            ({"microbatch_size": 0}, "microbatch_size is 0"),
        ):
            with pytest.raises(ValueError, match=message):
                run(**bad)
    run = partial(wj.hutchinson_axis_traces, quadratic_loss, params, matrices, KEY)
    with pytest.raises(ValueError, match="axis is 2, but leaf 'first' has shape"):
        run(axis=2)
    with pytest.raises(ValueError, match="axis is -2, but leaf 'bias' has shape"):
        run(axis=-2, select=lambda path, leaf: True)
    with pytest.raises(ValueError, match="No leaf"):
        wj.hutchinson_trace(quadratic_loss, params, matrices, KEY, select=lambda path, leaf: False)
    with pytest.raises(ValueError, match="Batch leaves have leading sizes"):
        wj.hutchinson_trace(quadratic_loss, params, (matrices, matrices[:2]), KEY)
