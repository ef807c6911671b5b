"""What `prune_transform` and `refresh` do, against steps written out by hand."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_transform_conformance import INPUTS, LABELS, gradient, loss_fn, parameters

import woodjax as wj

DATA = INPUTS, LABELS
ONCE = wj.one_shot_schedule(3, 0.75)
HALF = jax.tree.map(lambda w: jnp.abs(w) > 0.5 if w.ndim > 1 else jnp.ones(w.shape, bool), parameters())
REFRESH = partial(wj.refresh, loss_fn=loss_fn)


def run(tx, steps, params=None, state=None, **keywords):
    params = parameters() if params is None else params
    state = tx.init(params) if state is None else state
    step = jax.jit(lambda g, s, p: tx.update(g, s, p, **keywords))
    for number in range(steps):
        updates, state = step(gradient(params, number), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def masked_start(tx, masks=HALF):
    params = wj.apply_masks(parameters(), masks)
    return params, wj.set_masks(tx.init(params), masks)


@pytest.mark.parametrize(
    "inner", [optax.adamw(1e-2), optax.chain(optax.clip_by_global_norm(0.05), optax.sgd(0.1, momentum=0.9))]
)
def test_the_wrapper_is_the_optimizer_of_the_survivors_alone(inner):
    """Clipping, moments and decay see a network that consists of the surviving weights."""
    tx = wj.prune_transform(inner)
    params, _ = run(tx, 6, *masked_start(tx))

    def pick(tree):
        return jax.tree.map(lambda x, mask: x[mask], tree, HALF)

    def spread(few):
        return jax.tree.map(lambda x, mask: jnp.zeros(mask.shape).at[mask].set(x), few, HALF)

    few = pick(parameters())
    state = inner.init(few)
    for number in range(6):
        updates, state = inner.update(pick(gradient(spread(few), number)), state, few)
        few = optax.apply_updates(few, updates)
    chex.assert_trees_all_close(params, spread(few), rtol=1e-5, atol=1e-6)


def test_as_the_last_of_a_chain_it_holds_zeros_through_weight_decay_and_as_the_first_it_would_not():
    last = optax.chain(optax.adamw(1e-2), wj.prune_transform())
    first = optax.chain(wj.prune_transform(), optax.adamw(1e-2))
    for tx, zeros in ((last, True), (first, False)):
        params, state = masked_start(tx)
        params = run(tx, 3, params, state)[0] if zeros else run(tx, 3, parameters(), state)[0]
        assert (np.asarray(params["out"])[~np.asarray(HALF["out"])] == 0).all() == zeros


def moments_of_the_dead(state, masks):
    """Largest entry at a pruned place among everything in the state that is shaped like that leaf."""
    dead = 0.0
    for path, x in jax.tree_util.tree_leaves_with_path(state):
        if x.shape == (4, 4) and jnp.issubdtype(x.dtype, jnp.floating) and "out" in jax.tree_util.keystr(path):
            dead = max(dead, float(jnp.abs(jnp.where(masks["out"], 0, x)).max()))
    return dead


INNER = {
    "adam": optax.adam(1e-2),
    "chain": optax.chain(optax.clip(1.0), optax.adam(1e-2), optax.ema(0.9)),
    "multi steps": optax.MultiSteps(optax.adam(1e-2), 2).gradient_transformation(),
    "partition": optax.partition(
        {"a": optax.adam(1e-2), "b": optax.sgd(0.1, momentum=0.9)}, {"dense": "b", "out": "a"}
    ),
    "masked": optax.masked(optax.adam(1e-2), {"dense": False, "out": True}),
    "schedule-free": optax.contrib.schedule_free(optax.sgd(0.1), learning_rate=0.1),
}


@pytest.mark.newest
# Both clean by one function: what it finds in a state does not depend on who calls it.
@pytest.mark.parametrize(
    ("inner", "who"), [*((inner, "refresh") for inner in INNER), ("chain", "update"), ("multi steps", "update")]
)
def test_moments_of_weights_that_die_are_zero(inner, who):
    inner = INNER[inner]
    tx = wj.prune_transform(inner, schedule=ONCE, criterion=wj.magnitude_scores if who == "update" else None)
    params, state = run(tx, 4)
    if who == "refresh":
        chance = jax.random.bernoulli(jax.random.key(3), 0.5, (4, 4))
        assert moments_of_the_dead(state, {"out": chance}) > 0  # there is something to clean
        params, state, _ = wj.refresh(params, state, None, 0.75, curvature=None)
    masks = wj.get_masks(state)
    assert moments_of_the_dead(state, masks) == 0
    params, state = run(tx, 3, params, state)
    assert moments_of_the_dead(state, masks) == 0


def test_moments_before_the_element_of_a_chain_are_cleaned_by_a_refresh():
    tx = optax.chain(optax.adam(1e-2), wj.prune_transform())
    params, state = run(tx, 4)
    _, state, _ = wj.refresh(params, state, None, 0.75, curvature=None)
    assert moments_of_the_dead(state, wj.get_masks(state)) == 0


@pytest.mark.newest
def test_factored_moments_are_left_alone():
    big = {"w": jax.random.normal(jax.random.key(0), (128, 128))}
    tx = wj.prune_transform(optax.adafactor(1e-2))
    state = tx.init(big)
    _, state = tx.update(big, state, big)
    pruned = wj.set_masks(state, {"w": jnp.eye(128, dtype=bool)})
    chex.assert_trees_all_equal(pruned.inner_state, state.inner_state)


def test_refresh_is_prune_one_shot_between_two_steps():
    tx = wj.prune_transform(optax.adamw(1e-2))
    params, state = run(tx, 4)
    pruned, after, info = REFRESH(params, state, DATA, 0.75, measure_loss=True)
    expected, masks, one_shot = wj.prune_one_shot(loss_fn, params, DATA, 0.75, **wj.FIXED)
    chex.assert_trees_all_equal(pruned, expected)
    chex.assert_trees_all_equal(wj.get_masks(after), masks)
    chex.assert_trees_all_equal(wj.get_info(after), info)
    assert int(info.step) == 4
    for name in ("predicted_loss_change", "loss_before", "loss_after", "damping", "raised"):
        np.testing.assert_allclose(getattr(info, name), getattr(one_shot, name)[0], rtol=1e-6)
    np.testing.assert_allclose(info.density, [1, masks["dense"]["kernel"].mean(), masks["out"].mean()])
    assert np.isnan(REFRESH(params, state, DATA, 0.75)[2].loss_after)


def test_recomputations_are_stages_from_the_sparsity_there_is():
    tx = wj.prune_transform(optax.adamw(1e-2))
    params, state = run(tx, 2)
    params, state, _ = REFRESH(params, state, DATA, 0.5)
    pruned, _, info = REFRESH(params, state, DATA, 0.875, recomputations=2)
    one_shot = partial(wj.prune_one_shot, loss_fn, batch=DATA, **wj.FIXED)
    middle, masks, first = one_shot(params=params, sparsity=0.75, masks=wj.get_masks(state))
    expected, _, second = one_shot(params=middle, sparsity=0.875, masks=masks)
    chex.assert_trees_all_close(pruned, expected, rtol=1e-4, atol=1e-5)
    both = first.predicted_loss_change[0] + second.predicted_loss_change[0]
    np.testing.assert_allclose(info.predicted_loss_change, both, rtol=1e-4)


def test_route_b_prunes_as_route_a():
    schedule = wj.cubic_schedule(begin=1, end=7, every=2, target=0.8)
    tx = wj.prune_transform(optax.adamw(1e-2), schedule=schedule)
    a, state_a, update = parameters(), tx.init(parameters()), jax.jit(tx.update)
    for number in range(9):
        updates, state_a = update(gradient(a, number), state_a, a)
        a = optax.apply_updates(a, updates)
        if schedule.due(number):
            a, state_a, _ = REFRESH(a, state_a, DATA, schedule(number))
    b, state_b = run(tx, 9, refresh_fn=partial(wj.refresh_masks, loss_fn=loss_fn, batch=DATA))
    chex.assert_trees_all_equal(wj.get_masks(state_a), wj.get_masks(state_b))
    chex.assert_trees_all_close(a, b, rtol=1e-3, atol=1e-4)
    chex.assert_trees_all_close(state_a, state_b, rtol=2e-3, atol=1e-3)


def test_a_refresh_function_of_your_own():
    """It may be two lines: masks by any rule, and no info."""

    def refresh_fn(params, masks, sparsity):
        level = jnp.quantile(jnp.abs(params["out"]), sparsity.value)
        masks = {**masks, "out": masks["out"] & (jnp.abs(params["out"]) > level)}
        return wj.apply_masks(params, masks), masks

    params, state = run(wj.prune_transform(optax.sgd(0.1), schedule=ONCE), 6, refresh_fn=refresh_fn)
    masks, info = wj.get_masks(state), wj.get_info(state)
    assert int((~masks["out"]).sum()) == 12
    assert not np.asarray(params["out"])[~np.asarray(masks["out"])].any()
    assert int(info.step) == 4
    assert np.isnan(info.sparsity)
    np.testing.assert_allclose(info.density, [1, 1, 0.25])


def test_the_last_pattern_holds_inside_the_update():
    schedule = wj.one_shot_schedule(3, {"out": 0.75, "*": 0.25})
    _, state = run(
        wj.prune_transform(optax.sgd(0.1), schedule=schedule, criterion=wj.magnitude_scores, scope="leaf"), 4
    )
    assert int((~wj.get_masks(state)["out"]).sum()) == 4


@pytest.mark.newest
def test_a_memory_of_past_steps_is_cleaned_too():
    tx = wj.prune_transform(optax.scale_by_lbfgs(memory_size=3))
    params, state = run(tx, 4)
    _, state, _ = wj.refresh(params, state, None, 0.75, curvature=None)
    masks = wj.get_masks(state)
    memory = state.inner_state.diff_params_memory["out"]
    assert memory.shape == (3, 4, 4)
    assert np.asarray(memory)[:, np.asarray(masks["out"])].any()
    assert not np.asarray(memory)[:, ~np.asarray(masks["out"])].any()


def test_parameters_that_are_one_number_leave_hyperparameters_alone():
    tx = optax.inject_hyperparams(lambda learning_rate: wj.prune_transform(optax.adam(learning_rate)))(0.5)
    state = wj.set_masks(tx.init(jnp.float32(1.0)), jnp.array(False))
    np.testing.assert_allclose(state.hyperparams["learning_rate"], 0.5)


def test_what_is_pruned_stays_pruned_and_regrowth_is_asked_for():
    tx = wj.prune_transform(optax.adam(1e-2))
    params, state = run(tx, 2, *masked_start(tx))
    again, state, _ = REFRESH(params, state, DATA, 0.1)  # less than there is
    chex.assert_trees_all_equal(wj.get_masks(state), HALF)
    more = jax.tree.map(lambda mask: mask.at[0].set(True), HALF)
    grown, state = run(tx, 1, again, wj.set_masks(state, more))
    back = np.asarray(more["out"] & ~HALF["out"])
    assert back.any()
    assert np.asarray(grown["out"])[back].all()
    np.testing.assert_allclose(np.abs(np.asarray(grown["out"])[back]), 0.01, rtol=0.9)


def test_masks_of_a_sparse_checkpoint():
    params = wj.apply_masks(parameters(), HALF)
    chex.assert_trees_all_equal(wj.masks_from_params(params), HALF)
    params["out"] = jnp.zeros((4, 4))
    with pytest.raises(ValueError, match="'out' is zero altogether"):
        wj.masks_from_params(params)
    assert wj.masks_from_params(params, select=lambda path, leaf: "dense/k" in path)["out"].all()


@pytest.mark.newest
@pytest.mark.parametrize("mend", [False, True])
def test_lookahead_needs_its_slow_weights_masked(mend):
    """Else the fast weights get back, at every synchronisation, what the slow ones still have."""
    tx = optax.lookahead(wj.prune_transform(optax.sgd(0.1), schedule=ONCE, criterion=wj.magnitude_scores), 2, 0.5)
    params = optax.LookaheadParams.init_synced(parameters())
    state, update, dead = tx.init(params), jax.jit(tx.update), []
    for number in range(10):
        updates, state = update(gradient(params.fast, number), state, params)
        params = optax.apply_updates(params, updates)
        masks = wj.get_masks(state)
        if mend:
            params = params._replace(slow=wj.apply_masks(params.slow, masks))
        dead.append(np.abs(np.asarray(params.fast["out"])[~np.asarray(masks["out"])]).max(initial=0))
    assert (max(dead[4:]) == 0) == mend


@pytest.mark.newest
def test_schedule_free_evaluation_is_sparse_too():
    inner = optax.contrib.schedule_free_adamw(1e-2)
    tx = wj.prune_transform(inner, schedule=ONCE, criterion=wj.magnitude_scores)
    params, state = run(tx, 8)
    evaluated = optax.contrib.schedule_free_eval_params(state.inner_state, params)
    masks = wj.get_masks(state)
    assert not np.asarray(evaluated["out"])[~np.asarray(masks["out"])].any()
    assert np.asarray(evaluated["out"]).any()


def test_float32_masters_of_bfloat16_weights():
    """The masters are what is trained and pruned; the loss sees their bfloat16 copy, zeros included."""
    tx = wj.prune_transform(optax.adam(1e-2), schedule=ONCE, fisher=wj.gradient_window(4))
    masters, state, update = parameters(), tx.init(parameters()), jax.jit(tx.update)
    small = lambda tree: jax.tree.map(lambda w: w.astype(jnp.bfloat16), tree)
    for number in range(6):
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), gradient(small(masters), number))
        updates, state = update(grads, state, masters)
        masters = optax.apply_updates(masters, updates)
    masks = wj.get_masks(state)
    assert masters["out"].dtype == jnp.float32
    chex.assert_trees_all_equal(jax.tree.map(lambda w: w != 0, small(masters)), masks)


def test_bfloat16_gradients_of_float32_weights_still_give_exact_zeros():
    tx = wj.prune_transform(optax.sgd(0.1), schedule=ONCE, criterion=wj.magnitude_scores)
    params, state, update = parameters(), tx.init(parameters()), jax.jit(tx.update)
    for number in range(5):
        grads = jax.tree.map(lambda g: g.astype(jnp.bfloat16), gradient(params, number))
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    assert not np.asarray(params["out"])[~np.asarray(wj.get_masks(state)["out"])].any()


def test_info_outlives_a_donated_state():
    tx = wj.prune_transform(optax.adam(1e-2))
    params, state, info = REFRESH(parameters(), tx.init(parameters()), DATA, 0.5, measure_loss=True)
    masks = wj.get_masks(state)
    step = jax.jit(lambda g, s, p: tx.update(g, s, p), donate_argnums=1)
    step(gradient(params), state, params)
    np.testing.assert_allclose(info.sparsity, 0.5)
    assert float(info.loss_after) > 0
    assert counted(masks) == 20


def counted(masks):
    return sum(int((~mask).sum()) for mask in jax.tree.leaves(masks))


def test_refresh_keeps_a_leaf_whose_scores_are_lost():
    tx = wj.prune_transform(optax.adam(1e-2))
    params, state = run(tx, 2)
    inputs = INPUTS.at[0].set(jnp.nan)
    pruned, after, info = REFRESH(params, state, (inputs, LABELS), 0.5, curvature=wj.diagonal_fisher)
    assert info.nonfinite.any()
    chex.assert_trees_all_equal(pruned["dense"], params["dense"])
    assert wj.get_masks(after)["dense"]["kernel"].all()


INSIDE = optax.masked(wj.prune_transform(), {"dense": False, "out": True})
TWO = optax.chain(wj.prune_transform(), wj.prune_transform())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: wj.prune_transform(schedule=lambda step: 0.5), "schedule_of"),
        (lambda: wj.prune_transform(criterion=wj.magnitude_scores), "pass schedule="),
        (lambda: wj.gradient_window(0), "size is 0"),
        (lambda: wj.gradient_window(4, examples_per_gradient=0), "examples_per_gradient is 0"),
        (lambda: wj.gradient_window(4, memory_budget=8).init(parameters()), "one row of gradients takes 160"),
        (lambda: update(wj.prune_transform(), params=None), "params is None"),
        (lambda: update(wj.prune_transform(), grads={"w": jnp.ones(2)}), "updates has the structure"),
        (lambda: update(wj.prune_transform(), grads=jax.tree.map(lambda w: w[None], parameters())), "updates: leaf"),
        (lambda: update(wj.prune_transform(optax.sgd(1.0)), grad={"w": jnp.ones(2)}), "grad has the structure"),
        (lambda: update(wj.prune_transform(), refresh_fn=wj.refresh_masks), "pass schedule="),
        (lambda: wj.prune_transform(ONCE), "inner is a Schedule"),
        (
            lambda: wj.prune_transform(schedule=ONCE, scope="leaf"),
            r"\['scope'\] are of no use here: pass them to refresh",
        ),
        (lambda: pruner(method="sum"), r"\['method'\] are of no use without fisher"),
        (lambda: pruner(scope="layer"), "scope is 'layer'"),
        (lambda: pruner(recomputations=0), "stages is 0"),
        (lambda: pruner(fisher=wj.gradient_window(4), path="cubc"), "path is 'cubc'"),
        (lambda: pruner(fisher=wj.gradient_window(4), method="add"), "method is 'add'"),
        (lambda: refresh(fisher=wj.gradient_window(4)), "leave out batch, loss_fn"),
        (lambda: refresh(None, loss_fn=None, fisher=wj.gradient_window(4)), "holds no window"),
        (lambda: recorded(first_order=True), "random signs cancel"),
        (lambda: recorded(stream=True), "of no use without data"),
        (
            lambda: wj.prune_transform(optax.sgd(0.1), fisher=wj.gradient_window(4), scope="leaf"),
            "pass them to refresh",
        ),
        (lambda: wj.get_masks(INSIDE.init(parameters())), "put it around"),
        (
            lambda: update(wj.prune_transform(schedule=ONCE, criterion=abs), refresh_fn=wj.refresh_masks),
            "leave out fisher and criterion",
        ),
        (lambda: update(wj.prune_transform(schedule=ONCE, fisher=wj.gradient_window(2))), "wrap the whole chain"),
        (lambda: wj.get_masks(optax.adam(1e-3).init(parameters())), "holds 0 prune_transform"),
        (lambda: wj.get_masks(TWO.init(parameters())), "holds 2 prune_transform"),
        (lambda: wj.set_masks(wj.prune_transform().init(parameters()), {"w": True}), "masks has the structure"),
        (
            lambda: wj.set_masks(wj.prune_transform().init(parameters()), jax.tree.map(jnp.ones_like, parameters())),
            "masks are bool",
        ),
        (lambda: refresh(loss_fn=None), "loss_fn is None"),
        (lambda: refresh(batch=None), "batch is None"),
        (lambda: refresh(batch=None, curvature=None, stream=True), "of no use without data"),
        (lambda: refresh(batch=None, curvature=None, examples_per_gradient=2), "of no use without data"),
        (lambda: refresh(batch=None, curvature=None, measure_loss=True), "measure_loss needs examples"),
        (lambda: refresh(recomputations=0), "stages is 0"),
        (lambda: refresh(batch=None, curvature=None, recomputations=0), "stages is 0"),
        (lambda: refresh(sparsity=1.5), r"sparsity is 1\.5"),
    ],
)
def test_bad_requests(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def update(tx, grads=None, params=True, **keywords):
    params = parameters() if params else None
    return tx.update(parameters() if grads is None else grads, tx.init(parameters()), params, **keywords)


def refresh(batch=DATA, sparsity=0.5, **options):
    state = wj.prune_transform().init(parameters())
    return wj.refresh(parameters(), state, batch, sparsity, **{"loss_fn": loss_fn} | options)


def pruner(**options):
    source = {} if "fisher" in options else {"criterion": wj.magnitude_scores}
    return wj.prune_transform(schedule=ONCE, **source, **options)


def recorded(**options):
    window = wj.gradient_window(4, memory_budget=999)
    state = wj.prune_transform(optax.sgd(0.1), fisher=window).init(parameters())
    return wj.refresh(parameters(), state, None, 0.5, fisher=window, **options)
