"""Implants: kernels of which some outputs have one place, or are of low rank, and what they start from."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax import lax
from structured_cases import arrays, assert_close, assert_counts, masked

import woodjax as wj

NUMBERS = ("NHWC", "HWIO", "NHWC")
KEPT = {"first": np.array([1, 1, 0, 1, 1], bool), "second": np.array([1, 0, 1, 1, 1, 0, 1], bool)}
IMPLANTED = {"second": np.array([0, 0, 1, 1, 0, 0, 1], bool)}
SHAPE = (7, 8, 3)
X = jnp.asarray(np.random.default_rng(0).normal(size=(4, *SHAPE)) + 0.3, jnp.float32)


def pads(kind, places, strides, dilation):
    """Explicit padding of a kind of it."""
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, places, strict=True)]
    return lax.padtype_to_pads(SHAPE[:2], reach, strides, kind) if isinstance(kind, str) else kind


def network(places=(3, 3), strides=(1, 1), padding="SAME", dilation=(1, 1)):
    """Two convolutions and a classifier; the second has the implants."""

    def responses(v, x):
        h = jnp.tanh(lax.conv_general_dilated(x, v["first"], (1, 1), "SAME", dimension_numbers=NUMBERS))
        options = {"dimension_numbers": NUMBERS, "rhs_dilation": dilation}
        return h, lax.conv_general_dilated(h, v["second"], strides, padding, **options)

    def apply_fn(v, x):
        return jnp.tanh(responses(v, x)[1]).mean((1, 2)) @ v["last"]

    variables = arrays({"first": (1, 1, 3, 5), "second": (*places, 5, 7), "last": (7, 2)})
    return apply_fn, responses, variables


def planned(apply_fn, variables, streams="joint", kept=KEPT, implanted=IMPLANTED):
    groups = wj.channel_groups(apply_fn, variables, X[:1], streams=streams)
    return groups, wj.make_plan(groups, kept, implanted)


GEOMETRIES = {
    "same": ((3, 3), (1, 1), "SAME", (1, 1)),
    "same, strided": ((3, 3), (2, 2), "SAME", (1, 1)),
    "valid": ((3, 2), (1, 1), "VALID", (1, 1)),
    "valid, strided, dilated": ((2, 3), (2, 1), "VALID", (2, 2)),
    "explicit": ((3, 3), (1, 2), ((2, 0), (0, 3)), (1, 1)),
    "even": ((4, 2), (1, 1), "SAME", (1, 1)),
}


@pytest.mark.parametrize("name", GEOMETRIES)
def test_least_squares_is_the_oracle(name):
    places, strides, padding, dilation = GEOMETRIES[name]
    apply_fn, responses, variables = network(*GEOMETRIES[name])
    groups, plan = planned(apply_fn, variables)
    assert_counts(apply_fn, groups, KEPT, IMPLANTED, variables, X[:1])
    small = wj.start_implants(apply_fn, variables, plan, X, ridge=1e-3, microbatch_size=3)
    h, response = responses(variables, X)
    expected, centre = oracle.convolution(
        h, variables["second"], strides, pads(padding, places, strides, dilation), dilation
    )
    np.testing.assert_allclose(response, expected, atol=1e-4)
    at = np.flatnonzero(IMPLANTED["second"])
    weights = oracle.implant(centre[..., KEPT["first"]], expected[..., at], 1e-3)
    np.testing.assert_allclose(small["second"].implant[0, 0], weights, rtol=1e-4, atol=1e-5)
    found = wj.shrunk_network(apply_fn, plan)(small, X)
    assert_close(found, apply_fn(plan.expand(small), X))
    kernel = np.asarray(variables["second"])[..., KEPT["first"], :]
    np.testing.assert_array_equal(small["second"].kernel, kernel[..., KEPT["second"] & ~IMPLANTED["second"]])


def test_dense_kernels_are_masked_kernels():
    apply_fn, _, variables = network((3, 4))
    _, plan = planned(apply_fn, variables)
    small = plan.shrink(variables)
    kernel = np.asarray(variables["second"] * plan.masks(variables)["second"])
    dense = np.asarray(small["second"].dense())
    np.testing.assert_array_equal(dense, kernel[..., KEPT["first"], :][..., KEPT["second"]])
    assert small["second"].shape == dense.shape
    replaced = kernel[..., IMPLANTED["second"]]
    assert np.count_nonzero(replaced) == np.count_nonzero(replaced[1, 1]) == 4 * 3


def errors(apply_fn, responses, variables, plan, **options):
    """Squared error of the response of implants, when the inputs are those of the whole network; what is left of it."""
    small = wj.start_implants(apply_fn, variables, plan, X, **options)
    at = np.flatnonzero(IMPLANTED["second"])
    h, expected = responses(variables, X)
    whole = plan.expand(small)["second"]
    return float(
        jnp.sum(
            (lax.conv_general_dilated(h, whole, (1, 1), "SAME", dimension_numbers=NUMBERS) - expected)[..., at] ** 2
        )
    ), float(jnp.sum(expected[..., at] ** 2))


def test_least_squares_is_the_best_of_one_place():
    apply_fn, responses, variables = network()
    _, plan = planned(apply_fn, variables)
    args = (apply_fn, responses, variables, plan)
    fit, whole = errors(*args, ridge=1e-9)
    centre, _ = errors(*args, start="centre")
    zero, _ = errors(*args, start="zero")
    assert fit < 0.999 * min(centre, zero)
    assert zero == pytest.approx(whole, rel=1e-5)
    rng = np.random.default_rng(0)
    small = wj.start_implants(apply_fn, variables, plan, X, ridge=0.0)
    at = np.flatnonzero(IMPLANTED["second"])
    h, expected = responses(variables, X)
    read = h[..., KEPT["first"]].reshape(-1, 4)
    for _ in range(3):  # no other weights near by are better
        other = small["second"].implant[0, 0] + rng.normal(size=(4, 3)) * 0.05
        assert float(jnp.sum((read @ other - expected[..., at].reshape(-1, 3)) ** 2)) > fit


@pytest.mark.parametrize("rank", [1, 2, 3, 9])
def test_rank_is_the_nearest_response(rank):
    """Of the directions of the outputs; all inputs stay, so nothing else is lost."""
    apply_fn, responses, variables = network((3, 3), (2, 1), "SAME")
    _, plan = planned(apply_fn, variables, kept={})
    small = wj.start_implants(apply_fn, variables, plan, X, rank=rank)
    kernel = small["second"]
    assert kernel.implant.shape == (3, 3, 5, min(rank, 3))
    assert kernel.mix.shape == (1, 1, min(rank, 3), 3)
    at = np.flatnonzero(IMPLANTED["second"])
    expected = np.asarray(responses(variables, X)[1], np.float64)[..., at]
    _, found = responses({**variables, "second": plan.expand(small)["second"]}, X)
    np.testing.assert_allclose(found[..., at], oracle.best_rank(expected, rank), atol=1e-4 * abs(expected).max())
    assert_close(wj.shrunk_network(apply_fn, plan)(small, X), apply_fn(plan.expand(small), X))


def test_implants_in_unions():
    def apply_fn(v, x):
        def conv(x, name):
            return lax.conv_general_dilated(x, v[name], (1, 1), "SAME", dimension_numbers=NUMBERS)

        h = jnp.tanh(conv(x, "first"))
        return conv(jnp.tanh(h + conv(h, "second")), "last").mean((1, 2))

    variables = arrays({"first": (3, 3, 3, 7), "second": (3, 3, 7, 7), "last": (3, 3, 7, 2)})
    kept = {"first": np.array([1, 0, 1, 0, 1, 1, 0], bool), "second": np.array([0, 1, 1, 0, 1, 0, 1], bool)}
    implanted = {"first": np.array([1, 0, 0, 0, 1, 0, 0], bool), "second": np.array([0, 1, 1, 0, 0, 0, 0], bool)}
    groups, plan = planned(apply_fn, variables, "union", kept, implanted)
    assert_counts(apply_fn, groups, kept, implanted, variables, X[:1])
    network_of = wj.shrunk_network(apply_fn, plan)
    assert_close(network_of(plan.shrink(variables), X), apply_fn(masked(plan, variables), X))
    for options in ({}, {"start": "zero"}, {"rank": 1}):
        small = wj.start_implants(apply_fn, variables, plan, X, **options)
        assert_close(network_of(small, X), apply_fn(plan.expand(small), X))
        gradient = jax.grad(lambda v: jnp.sum(network_of(v, X) ** 2))(small)
        assert jax.tree.structure(gradient) == jax.tree.structure(small)
        whole = jax.grad(lambda v: jnp.sum(apply_fn(v, X) ** 2))(plan.expand(small))
        full = plan.shrink(whole)["first"].kernel
        assert_close(gradient["first"].kernel, full, 1e-4)


def test_starts_are_deterministic_and_split():
    """Sums over microbatches are those over all examples, in their own dtype of the leaf."""
    apply_fn, _, variables = network()
    _, plan = planned(apply_fn, variables)
    one, other = (wj.start_implants(apply_fn, variables, plan, X, microbatch_size=n)["second"].implant for n in (1, 4))
    assert_close(one, other)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), variables)
    started = wj.start_implants(apply_fn, half, plan, X.astype(jnp.bfloat16))["second"]
    assert {leaf.dtype for leaf in jax.tree.leaves(started)} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_allclose(started.implant.astype(jnp.float32), other, atol=0.05)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"start": "ones"}, "'least-squares', 'centre' or 'zero'"),
        ({"rank": 0}, "rank is 0"),
        ({"microbatch_size": 0}, "microbatch_size is 0"),
        ({"ridge": -1.0}, "ridge is -1.0"),
    ],
)
def test_bad_starts(options, match):
    apply_fn, _, variables = network()
    with pytest.raises(ValueError, match=match):
        wj.start_implants(apply_fn, variables, planned(apply_fn, variables)[1], X, **options)


def test_kernels_of_loops_have_no_implants():
    def apply_fn(v, x):
        def step(h, _):
            return jnp.tanh(lax.conv_general_dilated(h, v["second"], (1, 1), "SAME", dimension_numbers=NUMBERS)), None

        h = lax.conv_general_dilated(x, v["first"], (1, 1), "SAME", dimension_numbers=NUMBERS)
        return lax.scan(step, h, None, length=2)[0].mean((1, 2)) @ v["last"]

    variables = arrays({"first": (3, 3, 3, 6), "second": (3, 3, 6, 6), "last": (6, 2)})
    kept, implanted = {"first": np.arange(6) > 1}, {"first": np.arange(6) > 3}
    groups, plan = planned(apply_fn, variables, "joint", kept, implanted)
    assert [kernel.path for kernel in groups.kernels] == ["first"]
    assert_counts(apply_fn, groups, kept, implanted, variables, X[:1])
    small = wj.start_implants(apply_fn, variables, plan, X)
    assert_close(wj.shrunk_network(apply_fn, plan)(small, X), apply_fn(plan.expand(small), X))
