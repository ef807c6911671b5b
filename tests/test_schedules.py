"""Schedules as tables: the target is met, the curve is the paper's, and a traced step sees the same."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import woodjax as wj

KINDS = {"cubic": wj.cubic_schedule, "linear": wj.linear_schedule, "exponential": wj.exponential_schedule}
for_each = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)


@st.composite
def spans(draw):
    begin, every = draw(st.integers(0, 50)), draw(st.integers(1, 30))
    return {"begin": begin, "end": begin + draw(st.integers(every, 200)), "every": every}


@for_each
@given(span=spans(), target=st.floats(1e-3, 1), share=st.floats(0, 1))
@example(span={"begin": 0, "end": 20, "every": 10}, target=0.3, share=1.0)  # 1 − (1 − 0.3) is above 0.3
def test_the_last_due_step_meets_the_target_and_nothing_falls(make, span, target, share):
    schedule = make(**span, target=target, initial=share * target)
    last = span["begin"] + (span["end"] - span["begin"]) // span["every"] * span["every"]
    assert schedule.steps[-1] == last
    assert schedule.sparsities[-1] == target
    assert schedule(10**6) == target
    assert (np.diff([0.0, *schedule.sparsities]) >= -1e-12).all()
    assert all((step - span["begin"]) % span["every"] == 0 for step in schedule.steps)


def test_the_curves_are_those_of_the_papers():
    span = {"begin": 10, "end": 110, "every": 25}
    steps = np.array([10, 35, 60, 85, 110])
    cubic = wj.cubic_schedule(**span, target=0.9, initial=0.2)
    np.testing.assert_allclose(cubic.sparsities, 0.9 + (0.2 - 0.9) * (1 - (steps - 10) / 100) ** 3)
    kept = 1 - np.array(wj.exponential_schedule(**span, target=0.9, initial=0.2).sparsities)
    np.testing.assert_allclose(kept[1:] / kept[:-1], (0.1 / 0.8) ** 0.25)
    np.testing.assert_allclose(np.diff(wj.linear_schedule(**span, target=0.9, initial=0.2).sparsities), 0.175)


@for_each
@given(span=spans(), target=st.floats(0.01, 1), size=st.integers(1, 10**9))
def test_a_traced_step_sees_the_same(make, span, target, size):
    schedule = make(**span, target=target)
    ask = jax.jit(lambda step: (schedule.due(step), schedule(step), wj.prune_count(schedule.exact(step), size)))
    for step in [0, *schedule.steps[:2], schedule.steps[-1], schedule.steps[-1] + 1]:
        due, sparsity, count = ask(jnp.int32(step))
        assert bool(due) == schedule.due(step) == (step in schedule.steps)
        np.testing.assert_allclose(sparsity, schedule(step), rtol=1e-6)
        assert int(count) == int(wj.prune_count(schedule(step), size))


def test_the_target_of_half_counts_is_not_rounded_by_float32():
    """0.9 · 15 is a little over 13.5 in float64, a little below in float32."""
    schedule = wj.one_shot_schedule(3, 0.9)
    assert oracle.rounded(0.9, 15) == 14
    assert int(jax.jit(lambda step: wj.prune_count(schedule.exact(step), 15))(3)) == 14
    assert int(jax.jit(lambda step: wj.prune_count(schedule(step), 15))(3)) == 13


def test_a_step_that_is_an_array_is_a_number():
    schedule = wj.one_shot_schedule(3, 0.9)
    assert schedule(jnp.int32(3)) == 0.9
    assert schedule.due(jnp.int32(3)) is True


def test_mappings_keep_their_keys_and_order():
    target = {"z*": 0.5, "a/kernel": 0.9}
    schedule = wj.cubic_schedule(begin=0, end=20, every=10, target=target, initial=0.6)
    assert schedule(5) == {"z*": 0.5, "a/kernel": 0.6}  # no leaf begins above its target
    assert list(schedule(20)) == list(jax.jit(lambda t: list(schedule.exact(t).values()))(20) and target)
    assert schedule(20) == target
    traced = jax.jit(lambda t: schedule(t)["a/kernel"])(jnp.int32(20))
    np.testing.assert_allclose(traced, 0.9)


def test_any_function_of_the_step():
    schedule = wj.schedule_of(optax.linear_schedule(0.0, 0.8, 40), begin=0, end=50, every=20)
    assert schedule.steps == (20, 40)  # nothing is due where nothing is pruned
    np.testing.assert_allclose(schedule.sparsities, [0.4, 0.8], rtol=1e-6)
    assert wj.one_shot_schedule(7, 0.3).steps == (7,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": 1.5}, r"sparsity is 1\.5"),
        ({"initial": 0.9}, r"initial=0\.9 is above target=0\.5"),
        ({"every": 0}, "every >= 1"),
        ({"end": 5}, "begin <= end"),
        ({"begin": -1}, "0 <= begin"),
        ({"target": 0.0}, "Nothing is ever pruned"),
        ({"target": {"a": 0.5}, "initial": {"b": 0.1}}, r"initial names \['b'\], target \['a'\]"),
        ({"initial": {"a": 0.1}}, "initial is a mapping and target=0.5 is not"),
    ],
)
def test_bad_requests(change, message):
    with pytest.raises(ValueError, match=message):
        wj.cubic_schedule(**{"begin": 10, "end": 20, "every": 5, "target": 0.5} | change)


def test_a_function_that_falls_is_refused():
    with pytest.raises(ValueError, match=r"falls from 0\.75 to 0\.5 at step 2"):
        wj.schedule_of(lambda step: 1 - step / 4, begin=1, end=3, every=1)
    with pytest.raises(ValueError, match="different leaves at step 1"):
        wj.schedule_of(lambda step: {str(step): 0.5}, begin=0, end=1, every=1)
