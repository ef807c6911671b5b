"""Accumulators: whatever the order, the cuts and the merges, the curvature is that of all rows at once."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import woodjax as wj

PARAMS = {"bias": jnp.ones(3), "kernel": jnp.ones((3, 4))}
SHAPES = jax.eval_shape(lambda: PARAMS)
KINDS = {
    "block": (partial(wj.BlockSums.init, block_size=5), partial(wj.block_fisher, block_size=5, engine="primal")),
    "diagonal": (wj.DiagonalSums.init, wj.diagonal_fisher),
    "rows": (partial(wj.GradientRows.init, capacity=20), wj.low_rank_fisher),
    "rows in blocks": (
        partial(wj.GradientRows.init, capacity=20, block_size=5),
        partial(wj.low_rank_fisher, block_size=5),
    ),
}
for_each = pytest.mark.parametrize("kind", KINDS)


def draw(m, seed=0):
    rng = np.random.default_rng(seed)
    return {"bias": jnp.zeros((m, 3)), "kernel": jnp.asarray(rng.standard_normal((m, 3, 4)), jnp.float32)}


def cut(gradients, start, end):
    return jax.tree.map(lambda g: g[start:end], gradients)


def diagonal(curvature):
    return np.asarray(curvature.inverse_diagonal()["kernel"])


@for_each
@settings(max_examples=10)
@given(cuts=st.lists(st.integers(0, 20), min_size=1, max_size=4).map(sorted), split=st.integers(0, 4))
def test_any_cuts_and_one_merge(kind, cuts, split):
    init, build = KINDS[kind]
    gradients, states = draw(20), [init(SHAPES), init(SHAPES)]
    for number, (start, end) in enumerate(zip([0, *cuts], [*cuts, 20], strict=True)):
        if end > start:
            side = int(number >= split)
            states[side] = states[side].add(cut(gradients, start, end))
    whole = states[0].merge(states[1])
    assert int(whole.count) == 20
    np.testing.assert_allclose(diagonal(whole.finalize(0.1)), diagonal(build(gradients, damping=0.1)), rtol=1e-4)


@for_each
def test_one_state_serves_every_damping_and_stays_as_it_is(kind):
    init, build = KINDS[kind]
    gradients = cut(draw(20), 0, 19)
    state = init(SHAPES).add(gradients)
    before = jax.tree.map(np.array, state)
    for damping in (1.0, 0.01, wj.Relative(0.1)):
        found, expected = state.finalize(damping), build(gradients, damping=damping)
        np.testing.assert_allclose(diagonal(found), diagonal(expected), rtol=1e-4)
    state.add(draw(1))
    jax.tree.map(np.testing.assert_array_equal, before, state)


@for_each
def test_a_killed_run_resumes_from_orbax_to_the_same_bits(kind, tmp_path):
    init, _ = KINDS[kind]
    gradients = draw(20)
    at_once = init(SHAPES).add(cut(gradients, 0, 7)).add(cut(gradients, 7, 20))
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "state", init(SHAPES).add(cut(gradients, 0, 7)))
    with ocp.StandardCheckpointer() as saver:
        resumed = saver.restore(tmp_path / "state", jax.eval_shape(lambda: init(SHAPES)))
    assert int(resumed.count) == 7
    resumed = resumed.add(cut(gradients, 7, 20))
    for ours, theirs in zip(jax.tree.leaves(resumed), jax.tree.leaves(at_once), strict=True):
        assert ours.tobytes() == theirs.tobytes()
    assert diagonal(resumed.finalize(0.1)).tobytes() == diagonal(at_once.finalize(0.1)).tobytes()


@for_each
def test_add_and_merge_under_jit(kind):
    init, build = KINDS[kind]
    first, second = cut(draw(20), 0, 8), cut(draw(20), 8, 20)
    add = jax.jit(lambda state, gradients: state.add(gradients))
    state = jax.jit(lambda a, b: a.merge(b))(add(init(SHAPES), first), add(init(SHAPES), second))
    np.testing.assert_allclose(diagonal(state.finalize(0.1)), diagonal(build(draw(20), damping=0.1)), rtol=1e-4)


@for_each
def test_states_of_different_kinds_do_not_merge(kind):
    init, _ = KINDS[kind]
    other = wj.BlockSums.init(SHAPES, block_size=2)
    with pytest.raises(ValueError, match="make both by init with the same parameters"):
        init(SHAPES).merge(other)


@for_each
def test_a_state_without_rows_is_refused(kind):
    init, _ = KINDS[kind]
    with pytest.raises(ValueError, match="no rows yet"):
        init(SHAPES).finalize(0.1)


@for_each
def test_rows_of_another_shape_are_refused(kind):
    init, _ = KINDS[kind]
    with pytest.raises(ValueError, match="Leaf 'kernel' has shape"):
        init(SHAPES).add({"bias": jnp.zeros((2, 3)), "kernel": jnp.zeros((2, 4, 4))})


@for_each
def test_one_gradient_without_an_example_axis_is_refused(kind):
    init, _ = KINDS[kind]
    with pytest.raises(ValueError, match=r"leading sizes|has shape"):
        init(SHAPES).add(PARAMS)
    with pytest.raises(ValueError, match="Leaf 'bias' is int32"):
        init(SHAPES).add(jax.tree.map(lambda g: g.astype(int), draw(3)))


@pytest.mark.parametrize("kind", ["block", "diagonal"])
def test_automatic_damping_of_sums_asks_for_held_out_ones(kind):
    init, build = KINDS[kind]
    gradients = draw(20)
    even, odd = (init(SHAPES).add(jax.tree.map(lambda g, i=i: g[i::2], gradients)) for i in (0, 1))
    found = even.finalize("auto", held_out=odd)
    np.testing.assert_allclose(diagonal(found), diagonal(build(gradients, damping="auto")), rtol=1e-4)
    with pytest.raises(ValueError, match="pass them as held_out"):
        even.finalize("auto")
    with pytest.raises(ValueError, match="with it alone"):
        even.finalize(0.1, held_out=odd)


def test_rows_that_do_not_fit_are_refused():
    state = wj.GradientRows.init(SHAPES, capacity=20).add(draw(15))
    with pytest.raises(ValueError, match="10 rows do not fit behind 15 of 20"):
        state.add(draw(10))
    with pytest.raises(ValueError, match="capacity is 0"):
        wj.GradientRows.init(SHAPES, capacity=0)
    with pytest.raises(ValueError, match="by themselves"):
        state.finalize(0.1, held_out=state)
    spilled = jax.jit(lambda s, g: s.add(g))(state, draw(10))
    with pytest.raises(ValueError, match="25 rows were added inside jit to a state with room for 20"):
        spilled.finalize(0.1)
    with pytest.raises(ValueError, match="outside jit"):
        jax.jit(lambda s: s.finalize(0.1))(state)
