"""Masks of scores on a mesh of devices: the same to the bit as on one."""

import jax
import jax.numpy as jnp
import mesh_cases as mc
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType
from mesh_cases import CASES, same_place

import woodjax as wj

FEW = settings(max_examples=4)
SPARSITIES = st.sampled_from([0.0, 0.1, 0.33, 0.5, 0.77, 1.0]) | st.floats(0, 1)
OPTIONS = {
    "global": {},
    "leaf": {"scope": "leaf"},
    "erdos_renyi": {"scope": "erdos_renyi"},
    "floor": {"floor": 0.25},
    "layers": {"scope": "leaf", "batch_axes": 1, "floor": 0.1},
}


@st.composite
def scores(draw, dtype=np.float32, protected=True):
    """Few levels, so many ties; with `protected`, `+inf` on some."""
    rng, levels = np.random.default_rng(draw(st.integers(0, 10_000))), draw(st.sampled_from([1, 3, 1000]))

    def leaf(shape):
        values = (rng.integers(-levels, levels, shape) / 7).astype(dtype)
        return np.where(rng.random(shape) < 0.1, np.inf, values).astype(dtype) if protected else values

    return jax.tree.map(leaf, mc.SHAPES, is_leaf=lambda x: isinstance(x, tuple))


def check(case, here, sparsity, kind=AxisType.Auto, make=wj.make_masks, **options):
    there = case.params(here, kind)
    placed = {name: case.params(tree, kind) for name, tree in options.items() if name == "previous"}
    expected, found = make(here, sparsity, **options), make(there, sparsity, **options | placed)
    for one, other in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_array_equal(one, other)
    assert same_place(found, there)
    return found


def earlier(here, sparsity, seed=0):
    """Masks of other scores, that keep what is protected."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: (rng.random(s.shape) >= sparsity) | np.isposinf(s), here)


@pytest.mark.parametrize("option", OPTIONS)
@FEW
@given(here=scores(), sparsity=SPARSITIES)
def test_every_scope(option, here, sparsity):
    if "floor" in OPTIONS[option]:
        sparsity = 0.5 * sparsity
    check(CASES["layers" if option == "layers" else "mixed"], here, sparsity, **OPTIONS[option])


@pytest.mark.parametrize("name", ["last", "rows"])
@FEW
@given(here=scores(), sparsity=SPARSITIES)
def test_every_layout(name, here, sparsity):
    check(CASES[name], here, sparsity)


@FEW
@given(here=scores(), first=st.floats(0, 1), second=st.floats(0, 1))
def test_mappings(here, first, second):
    check(CASES["last"], here, {"a/*": first, "*": second, "s": 0.5, "a/b": 0.25})


@FEW
@given(here=scores(), low=st.floats(0, 0.4), high=st.floats(0.4, 0.8))
def test_what_was_pruned_stays_pruned(here, low, high):
    before = earlier(here, 0.5 * low)
    found = check(CASES["mixed"], here, high, previous=before, floor=0.05)
    assert not any((m & ~b).any() for m, b in zip(jax.tree.leaves(found), jax.tree.leaves(before), strict=True))


@pytest.mark.usefixtures("x64")
@settings(FEW, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(here=scores(np.float64), sparsity=SPARSITIES)
def test_float64(here, sparsity):
    nudged = jax.tree.map(lambda s: s * (1 + 1e-12 * (np.arange(s.size).reshape(s.shape) % 7)), here)
    check(CASES["mixed"], nudged, sparsity)


@FEW
@given(here=scores(jnp.bfloat16), sparsity=SPARSITIES)
def test_bfloat16(here, sparsity):
    check(CASES["mixed"], here, sparsity)


@FEW
@given(here=scores(), sparsity=SPARSITIES)
def test_explicit_axes(here, sparsity):
    with jax.set_mesh(CASES["mixed"].devices(AxisType.Explicit)):
        check(CASES["mixed"], here, sparsity, AxisType.Explicit)


@FEW
@given(here=scores(), sparsity=st.floats(0, 1, width=32))
def test_inside_jit_with_a_traced_sparsity(here, sparsity):
    found = JITTED(CASES["mixed"].params(here), jnp.float32(sparsity))
    jax.tree.map(np.testing.assert_array_equal, found, JITTED(here, jnp.float32(sparsity)))


JITTED = jax.jit(wj.make_masks)


def test_errors_are_those_of_one_device():
    case = CASES["first"]
    there = case.params(mc.normal(0))
    broken = case.params(mc.normal(0) | {"s": np.full(mc.SHAPES["s"], np.nan, np.float32)})
    with pytest.raises(ValueError, match=r"'s'.*NaN"):
        wj.make_masks(broken, 0.5)
    with pytest.raises(ValueError, match="floor is 0"):
        wj.make_masks(there, 0.5, floor=0.9)
    with pytest.raises(ValueError, match=r"'a/w' stacks layers along an axis that is split"):
        wj.make_masks(there, 0.5, scope="leaf", batch_axes=1)
    other = CASES["data"].params(mc.normal(1))
    with pytest.raises(ValueError, match="different meshes"):
        wj.make_masks(there | {"s": other["s"]}, 0.5)
