"""Route D: the window of gradients that the optimizer saw, and pruning by it."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_transform import ONCE, run
from test_transform_conformance import gradient, parameters

import woodjax as wj


def seen_gradients(tx, steps):
    """The gradients of a training, and the parameters that they led to."""
    params, state, rows = parameters(), tx.init(parameters()), []
    for number in range(steps):
        rows.append(gradient(params, number))
        updates, state = tx.update(rows[-1], state, params)
        params = optax.apply_updates(params, updates)
    return params, jax.tree.map(lambda *g: jnp.stack(g), *rows)


@partial(jax.jit, static_argnames=("build", "first_order"))
def pruned_by(rows, params, build, mean=None, previous=None, first_order=False):
    """What a window that holds these rows has to come to: parameters, masks, and the predicted change of the loss."""
    fisher = build(rows)
    scores = wj.woodtaylor_scores(params, fisher, mean) if first_order else wj.obs_scores(params, fisher)
    masks = wj.make_masks(scores, 0.75, previous=previous)
    updates = wj.compensate(params, masks, fisher, gradient=mean)
    return optax.apply_updates(params, updates), masks, wj.predicted_loss_change(updates, fisher, mean)


@pytest.mark.parametrize(
    ("m", "examples"),
    [pytest.param(2, 4, marks=pytest.mark.newest), (3, 1), pytest.param(8, 4, marks=pytest.mark.newest)],
)
def test_route_d_prunes_by_the_fisher_of_the_last_gradients(m, examples):
    """Steps 0 to 3, then the update that is due; a window that is not full counts what is in it."""
    inner, damping = optax.sgd(0.05), 1e-2
    build = partial(wj.low_rank_fisher, damping=damping)
    window = wj.gradient_window(m, curvature=build, examples_per_gradient=examples)
    ours, state = run(wj.prune_transform(inner, schedule=ONCE, fisher=window), 4)
    params, rows = seen_gradients(inner, 4)
    last = jax.tree.map(lambda g: jnp.sqrt(examples) * g[-m:], rows)
    expected, masks, change = pruned_by(last, params, build)
    chex.assert_trees_all_equal(wj.get_masks(state), masks)
    chex.assert_trees_all_close(ours, expected, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(wj.get_info(state).predicted_loss_change, change, rtol=1e-3)


@pytest.mark.parametrize("m", [3, pytest.param(8, marks=pytest.mark.newest)])
def test_route_d_with_the_first_order_term(m):
    """The gradient is the plain mean of those in the window, whatever the rows of the Fisher are scaled by."""
    build = partial(wj.low_rank_fisher, damping=1.0)
    window = wj.gradient_window(m, curvature=build, examples_per_gradient=4)
    ours, state = run(wj.prune_transform(optax.sgd(0.05), schedule=ONCE, fisher=window, first_order=True), 4)
    params, rows = seen_gradients(optax.sgd(0.05), 4)
    last = {"dense": {"kernel": rows["dense"]["kernel"][-m:]}, "out": rows["out"][-m:]}
    last["dense"]["bias"] = jnp.zeros_like(rows["dense"]["bias"][-m:])
    doubled, mean = jax.tree.map(lambda g: 2 * g, last), jax.tree.map(lambda g: g.mean(0), last)
    expected, masks, change = pruned_by(doubled, params, build, mean, first_order=True)
    chex.assert_trees_all_equal(wj.get_masks(state), masks)
    chex.assert_trees_all_close(ours, expected, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(wj.get_info(state).predicted_loss_change, change, rtol=1e-3)


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"recomputations": 2, "method": "sum"}, marks=pytest.mark.newest),
        pytest.param({"first_order": True, "scope": "leaf"}, marks=pytest.mark.newest),
    ],
)
def test_a_refresh_from_the_recorded_window_is_route_d(options):
    window = wj.gradient_window(3, curvature=partial(wj.low_rank_fisher, damping=1.0))
    params, state = run(wj.prune_transform(optax.sgd(0.05), fisher=window), 4)
    params, state, info = wj.refresh(params, state, None, 0.75, fisher=window, **options)
    expected, other = run(wj.prune_transform(optax.sgd(0.05), schedule=ONCE, fisher=window, **options), 4)
    chex.assert_trees_all_equal(wj.get_masks(state), wj.get_masks(other))
    chex.assert_trees_all_close(params, expected, rtol=1e-3, atol=1e-4)
    chex.assert_trees_all_close(info, wj.get_info(other), rtol=1e-3)


def test_what_was_pruned_before_leaves_the_problem_of_a_window():
    schedule = wj.schedule_of(lambda step: 0.5 if step < 3 else 0.75, begin=1, end=3, every=2)
    inner, build = optax.sgd(0.05), partial(wj.low_rank_fisher, damping=1e-2)
    tx = wj.prune_transform(inner, schedule=schedule, fisher=wj.gradient_window(8, curvature=build))
    params, state, update, rows = parameters(), tx.init(parameters()), jax.jit(tx.update), []
    for number in range(4):
        rows.append(gradient(params, number))
        before, masks = params, wj.get_masks(state)
        updates, state = update(rows[-1], state, params)
        params = optax.apply_updates(params, updates)
    stepped = jax.tree.map(lambda w, g, mask: jnp.where(mask, w - 0.05 * g, 0), before, rows[-1], masks)
    alive = wj.apply_masks(jax.tree.map(lambda *g: jnp.stack(g), *rows), masks)
    moved, expected, _ = pruned_by(alive, stepped, build, previous=masks)
    chex.assert_trees_all_equal(wj.get_masks(state), expected)
    chex.assert_trees_all_close(params, moved, rtol=1e-3, atol=1e-4)


def test_a_sketch_keeps_the_diagonal_of_separate_gradients_and_half_the_rows():
    """Gradients along different axes have no cross terms: signs cancel nothing, and sums are exact."""
    params = {"w": jnp.ones((2, 4))}
    window = wj.gradient_window(8, memory_budget=4 * 8 * 4)
    state = window.init(params)
    assert state.rows["w"].shape == (4, 2, 4)
    signs = []
    for number in range(19):  # more than two rounds of the ring: gradients 12 to 19 are in, the last row half full
        state = window.add(state, {"w": (number + 1.0) * jax.nn.one_hot(number % 8, 8).reshape(2, 4)})
        signs.append(np.sign(state.rows["w"]).sum())
    rows = np.asarray(window.gradients(state, params)["w"]).reshape(4, 8)
    inside = range(12, 19)
    expected = np.zeros(8)
    for number in inside:
        expected[number % 8] += (number + 1.0) ** 2 / len(inside)
    np.testing.assert_allclose((rows**2).mean(0), expected, rtol=1e-5)
    assert state.filled.tolist() == [2, 1, 2, 2]
    assert len(set(signs)) > 2  # both signs are drawn


@pytest.mark.parametrize(("size", "room", "rows"), [(65, 64, 33), (5, 4, 3), (6, 3, 3), (6, 6, 6), (4, 9, 4)])
def test_a_sketch_holds_hardly_more_than_its_window(size, room, rows):
    window = wj.gradient_window(size, memory_budget=room * 4 * 4)
    state, add = window.init({"w": jnp.ones((2, 2))}), jax.jit(window.add)
    assert state.filled.shape == (rows,)
    for _ in range(3 * size):
        state = add(state, {"w": jnp.ones((2, 2))})
    in_a_row = -(-size // rows)
    assert size - in_a_row < int(state.filled.sum()) <= rows * in_a_row < size + in_a_row


def test_a_sketch_is_unbiased():
    """Over many windows the mean of RᵀR is that of the gradients' outer products, cross terms included."""
    rows = jax.random.normal(jax.random.key(5), (4, 3, 2))
    window = wj.gradient_window(4, memory_budget=2 * 6 * 4)
    add = jax.jit(window.add)
    total = np.zeros((6, 6))
    rounds = 400
    state = window.init({"w": rows[0]})
    for _ in range(rounds):
        for row in rows:
            state = add(state, {"w": row})
        found = np.asarray(window.gradients(state, {"w": rows[0]})["w"], np.float64).reshape(2, 6)
        total += found.T @ found / 2 / rounds
    flat = np.asarray(rows, np.float64).reshape(4, 6)
    expected = flat.T @ flat / 4
    spread = np.abs(flat[:, :, None] * flat[:, None, :]).max()
    np.testing.assert_allclose(total, expected, atol=4 * spread / np.sqrt(rounds))


def test_a_gradient_that_is_not_finite_is_left_out():
    params = {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}
    window = wj.gradient_window(3)
    state = window.init(params)
    for value in (1.0, jnp.nan, 3.0):
        state = window.add(state, {"w": jnp.full((2, 2), value), "b": jnp.ones(2)})
    rows = np.asarray(window.gradients(state, params)["w"])
    np.testing.assert_allclose((rows**2).mean(0), (1 + 9) / 2, rtol=1e-6)
    assert not np.asarray(window.gradients(state, params)["b"]).any()  # not kept, not pruned


def test_a_window_of_nothing_but_nan_prunes_nothing_and_says_so():
    tx = wj.prune_transform(optax.identity(), schedule=wj.one_shot_schedule(0, 0.5), fisher=wj.gradient_window(2))
    params = parameters()
    bad = jax.tree.map(lambda w: w * jnp.nan, params)
    _, state = tx.update(bad, tx.init(params), params)
    info = wj.get_info(state)
    assert info.nonfinite.any()
    chex.assert_trees_all_equal(wj.get_masks(state), jax.tree.map(lambda w: jnp.ones(w.shape, bool), params))


def test_leaves_that_a_window_does_not_keep_are_not_pruned():
    window = wj.gradient_window(4, select=lambda path, leaf: path == "out")
    _, state = run(wj.prune_transform(optax.sgd(0.1), schedule=ONCE, fisher=window), 4)
    masks = wj.get_masks(state)
    assert masks["dense"]["kernel"].all()
    assert int((~masks["out"]).sum()) == 12
    assert state.window.rows["dense"]["kernel"].shape == (4,)


def test_grad_gives_an_element_of_a_chain_what_the_wrapper_sees():
    options = {"schedule": ONCE, "fisher": wj.gradient_window(4)}
    tx = optax.chain(optax.sgd(0.05), wj.prune_transform(**options))
    params, state, update = parameters(), tx.init(parameters()), jax.jit(tx.update)
    for number in range(4):
        grads = gradient(params, number)
        updates, state = update(grads, state, params, grad=grads)
        params = optax.apply_updates(params, updates)
    expected, other = run(wj.prune_transform(optax.sgd(0.05), **options), 4)
    chex.assert_trees_all_equal(wj.get_masks(state), wj.get_masks(other))
    chex.assert_trees_all_close(params, expected, rtol=1e-4, atol=1e-5)
