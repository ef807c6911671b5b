"""No public function lets a bad argument through: it answers rightly, or says what is wrong."""

import inspect
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import robustness_calls as robustness
import robustness_cases as cases
from jaxtyping import Array, Key

import woodjax as wj
from woodjax.door import checked

SAMPLE = 25  # of the calls that compile, drawn by a seed; benchmarks/robustness.py makes them all
pytestmark = pytest.mark.newest


def test_every_public_function_has_a_case():
    """A new one without a valid call to spoil, or a parameter that a valid call misnames, fails here."""
    found = {name for name in wj.__all__ if callable(getattr(wj, name))}
    assert found - set(cases.CASES) - cases.MADE_BY_FUNCTIONS == {"fail_together"}  # it takes nothing
    for name in cases.CASES:
        function, arguments = cases.call_of(name)
        inspect.signature(function).bind_partial(**{key: arguments[key] for key in arguments if key != "operands"})


@pytest.mark.parametrize("name", sorted(set(cases.CASES) - set(robustness.ONLY_VALID)))
def test_a_bad_argument_is_refused(name):
    """What must be refused is refused, by woodjax and not from inside JAX; nothing is computed."""
    outcomes = {
        (spoiled.argument, spoiled.mutation): robustness.run(spoiled)
        for spoiled in robustness.spoiled_calls(name)
        if spoiled.expected == "refuse"
    }
    assert {key: outcome for key, outcome in outcomes.items() if outcome.kind == "defect"} == {}


def test_a_strange_argument_gives_the_right_answer_or_an_error():
    """A sample of those that may be answered: dtypes, NaN, sparsity 0 and 1, huge and tiny numbers."""
    calls = [s for name in cases.CASES for s in robustness.spoiled_calls(name) if s.expected != "refuse"]
    drawn = random.Random(0).sample(calls, SAMPLE)
    outcomes = {(s.function, s.argument, s.mutation): robustness.run(s) for s in drawn}
    assert {key: outcome for key, outcome in outcomes.items() if outcome.kind == "defect"} == {}


def test_an_error_names_the_argument_and_the_leaf():
    """Kind of the argument, axes that disagree, and a leaf that is no array."""
    with pytest.raises(ValueError, match="curvature is None: pass a Curvature"):
        wj.obs_scores(cases.params(), None)
    with pytest.raises(ValueError, match=r"vector has shape \(2,\), expected \[b\] with b = 3 as in gradients"):
        wj.dual_solve(jnp.ones((4, 3)), wj.whiten_gram(jnp.ones((4, 3)), 0.1), jnp.ones(2))
    with pytest.raises(ValueError, match="leaf 'a/kernel' of params is 'text': pass a tree of arrays"):
        wj.magnitude_scores({"a": {"kernel": "text"}})
    with pytest.raises(ValueError, match="key is 3: pass a key such as"):
        wj.random_scores(None, cases.params(), cases.batch(), 3)


def test_checks_do_not_stand_in_the_way_of_jit():
    """Tracers pass, and a call that differs in numbers alone compiles nothing anew."""
    inverse = jax.jit(wj.woodbury_scan)
    for damping in (0.1, 0.2):
        np.testing.assert_allclose(inverse(jnp.array([[2.0]]), damping), 1 / (damping + 4), rtol=1e-6)
    assert inverse._cache_size() == 1
    arrays = jnp.ones((4, 3)), 0.1
    wj.woodbury_scan(*arrays)
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: compiled.append(event))
    try:
        wj.woodbury_scan(jnp.zeros((4, 3)), 0.2)
    finally:
        jax.monitoring.clear_event_listeners()
    assert [event for event in compiled if "compile" in event] == []


def test_a_checked_function_keeps_its_name_and_signature():
    def scale(x: float, times: int = 2) -> float:
        """Scale."""
        return x * times

    guarded = checked(scale)
    assert (guarded.__name__, guarded.__doc__) == ("scale", "Scale.")
    assert inspect.signature(guarded) == inspect.signature(scale)
    assert guarded(1.5, times=3) == 4.5
    with pytest.raises(ValueError, match=r"times is 2\.5: pass an integer"):
        guarded(1.5, 2.5)


def test_what_is_like_the_annotation_passes():
    """A row of numbers is a sequence, in NumPy as well; old keys of any implementation are keys."""
    fisher, params = cases.fisher(), cases.params()
    path = wj.sparsity_path(params, fisher, np.array([0.25, 0.5]))
    np.testing.assert_allclose(path.sparsity, wj.sparsity_path(params, fisher, [0.25, 0.5]).sparsity)
    with pytest.raises(ValueError, match="sparsities is float64"):
        wj.sparsity_path(params, fisher, np.array(0.5))

    @checked
    def shape_of(key: Key[Array, ""]) -> tuple[int, ...]:
        return key.shape

    for implementation, shape in (("threefry2x32", (2,)), ("rbg", (4,))):
        assert shape_of(jax.random.key_data(jax.random.key(0, impl=implementation))) == shape


def test_a_missing_argument_is_pythons_own_error():
    with pytest.raises(TypeError, match=r"make_masks\(\) missing 1 required positional argument"):
        wj.make_masks(cases.params())
