"""Micro-batches from a memory budget."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import woodjax as wj
from woodjax import microbatches


def loss_fn(params, example):
    x, y = example
    return jnp.mean((jnp.tanh(x @ params["w"]) @ params["v"] - y) ** 2)


PARAMS = {"w": jnp.ones((32, 64)), "v": jnp.ones(64)}
BATCH = (np.ones((40, 16, 32), np.float32), np.ones((40, 16), np.float32))
WEIGHTS = 4 * (32 * 64 + 64)  # bytes of one gradient


def needed(size, group=1):
    rows = lambda p, b: wj.per_example_gradients(loss_fn, p, b, examples_per_gradient=group, check=False)
    chunk = jax.tree.map(lambda x: x[: size * group], BATCH)
    memory = jax.jit(rows).lower(PARAMS, chunk).compile().memory_analysis()
    return memory.temp_size_in_bytes + memory.output_size_in_bytes


@pytest.mark.parametrize(("rows", "found"), [(1, 1), (3, 2), (4, 4), (9, 8), (35, 32)])
def test_the_largest_power_of_two_that_fits(rows, found):
    budget = needed(rows)
    assert wj.microbatch_for(loss_fn, PARAMS, BATCH, memory_budget=budget) == found
    assert needed(found) <= budget < needed(2 * found)


def test_all_rows_where_they_fit():
    assert wj.microbatch_for(loss_fn, PARAMS, BATCH, memory_budget=needed(40)) == 40
    one = jax.tree.map(lambda x: x[:1], BATCH)
    assert wj.microbatch_for(loss_fn, PARAMS, one, memory_budget=10**9) == 1


def test_rows_of_several_examples():
    budget = needed(5, group=4)
    options = {"memory_budget": budget, "examples_per_gradient": 4}
    assert wj.microbatch_for(loss_fn, PARAMS, BATCH, **options) == 4
    assert needed(4, group=4) <= budget < needed(8, group=4)


def test_shapes_are_enough_and_arrays_may_be_carried():
    carried = jax.tree_util.Partial(lambda scale, p, e: scale * loss_fn(p, e), jnp.float32(2.0))
    shapes = jax.eval_shape(lambda *x: x, PARAMS, BATCH)
    assert wj.microbatch_for(carried, *shapes, memory_budget=40 * WEIGHTS) in {8, 16, 32}


def test_rows_that_are_computed_again_take_more_at_once():
    def deep(params, x):
        body = lambda c, w: (jnp.tanh(jnp.tanh(c @ w) + c), None)
        return jnp.mean(jax.lax.scan(body, x, params)[0] ** 2)

    params, batch = jnp.ones((24, 8, 8)), jnp.ones((64, 64, 8))
    plain, again = (
        wj.microbatch_for(deep, params, batch, memory_budget=2_000_000, remat=remat) for remat in (False, True)
    )
    assert again >= 2 * plain


def test_where_nothing_fits_the_numbers_are_said():
    with pytest.raises(ValueError, match=r"One row takes \d+ bytes, memory_budget is 100: pass more, or remat=True"):
        wj.microbatch_for(loss_fn, PARAMS, BATCH, memory_budget=100)
    with pytest.raises(ValueError, match=r"pass more\."):
        wj.microbatch_for(loss_fn, PARAMS, BATCH, memory_budget=100, remat=True)
    with pytest.raises(ValueError, match="pass a divisor of 40"):
        wj.microbatch_for(loss_fn, PARAMS, BATCH, memory_budget=10**9, examples_per_gradient=3)


class Silent:
    """A compiler that says nothing."""

    lower = compile = lambda self, *arguments: self
    memory_analysis = lambda self: None


def test_a_backend_that_does_not_tell(monkeypatch):
    monkeypatch.setattr(microbatches, "_rows", Silent())
    with pytest.raises(ValueError, match="does not say how much memory"):
        wj.microbatch_for(loss_fn, PARAMS, BATCH, memory_budget=10**9)
