"""What one-shot pruning chooses by itself: plans, candidates, and that held-out examples decide."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_one_shot import data, trained

import woodjax as wj
from woodjax.choices import choose_plan, choose_search, stages_for
from woodjax.update_search import scale

PLAN = partial(
    choose_plan, stages="auto", examples_per_stage=None, examples_per_gradient="auto", held_out="auto", searching=True
)


def test_plan_grows_with_the_pool_and_the_sparsity():
    assert PLAN(0.9, 60_000, 10**5) == (28, 1000, 8, 2048)
    assert PLAN(0.9, 60_000, 10**5, first_order=True) == (32, 1000, 32, 2048)
    assert PLAN(0.98, 3805, 268_336) == (47, 500, 6, 761)  # 512 MiB of rows
    assert PLAN(0.98, 3805, 25 * 10**6) == (47, 256, 8, 761)
    assert PLAN(0.5, 100, 100) == (9, 80, 1, 20)
    assert PLAN(0.5, 20, 100).held_out == 0  # fewer than 8 would be left aside
    assert PLAN(0.5, 100, 100, searching=False).held_out == 0
    assert PLAN(0.5, 100, 100, examples_per_gradient=7) == (9, 11, 7, 23)  # what fills no row is held out too


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.7, 0.95, 0.98, 1.0])
def test_a_stage_takes_about_a_twelfth_of_the_density(sparsity):
    stages = stages_for(sparsity)
    assert 1 <= stages <= 48
    if sparsity > 0.5 and sparsity < 1:
        assert 0.919 <= (1 - sparsity) ** (1 / stages) < 0.93
    assert stages_for({"a": 0.1, "b": sparsity}) == max(stages, stages_for(0.1))


def test_a_traced_sparsity_takes_a_fixed_number_of_stages():
    assert int(jax.jit(lambda s: jnp.asarray(stages_for(s)))(0.9)) == 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"held_out": 100}, "held_out is 100"),
        ({"held_out": -1}, "held_out is -1"),
        ({"examples_per_stage": 81}, "pass 1 to 80 of 100 examples, 20 of which are held out"),
        ({"examples_per_stage": 70, "examples_per_gradient": 8}, "groups of examples_per_gradient=8"),
    ],
)
def test_plans_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        PLAN(0.5, 100, 100, **arguments)


@pytest.mark.parametrize(
    ("method", "multiples", "step", "message"),
    [
        ("add", "auto", "auto", "method is 'add'"),
        ("joint", (0.0,), "auto", "damping_multiples are"),
        ("joint", (), "auto", "damping_multiples are"),
        ("joint", "auto", -1.0, "step is -1.0"),
        ("joint", "auto", float("nan"), "step is nan"),
    ],
)
def test_candidates_that_cannot_be(method, multiples, step, message):
    with pytest.raises(ValueError, match=message):
        choose_search(method, multiples, step, first_order=False)


def quadratic_problem(seed=0):
    rng = np.random.default_rng(seed)
    params = {"w": rng.standard_normal((3, 4)).astype(np.float32)}
    fisher = wj.low_rank_fisher({"w": rng.standard_normal((6, 3, 4)).astype(np.float32)}, damping=0.1)
    masks = {"w": rng.random((3, 4)) < 0.5}
    return params, masks, fisher


@pytest.mark.parametrize(
    ("method", "multiple", "step"), [("joint", 1.0, 1.0), ("joint", 10.0, 0.5), ("sum", 1.0, 0.5), ("sum", 1.0, 0.0)]
)
def test_the_candidate_that_held_out_examples_prefer_is_taken(method, multiple, step):
    """A loss that is lowest at one of the candidates finds that one."""
    params, masks, fisher = quadratic_problem()
    strong = wj.low_rank_fisher({"w": fisher.gradients.reshape(6, 3, 4)}, damping=0.1 * multiple)
    whole = wj.compensate(params, masks, strong, method=method)
    part = scale(whole, masks, step)

    def nearest(goal):
        return lambda moved: jnp.full(4, jnp.sum((moved["w"] - params["w"] - goal["w"]) ** 2))

    rules = wj.UpdateSearch(("joint", "sum"), (0.1, 1.0, 10.0), (1.0,))
    update, choice = wj.choose_update(params, masks, fisher, None, rules, nearest(whole))
    assert bool(choice.joint) == (method == "joint")
    assert float(choice.damping_multiple) == multiple
    np.testing.assert_allclose(update["w"], whole["w"], rtol=1e-3, atol=1e-4)
    steps = wj.UpdateSearch((method,), (multiple,), (0.0, 0.5, 1.0))
    update, choice = wj.choose_update(params, masks, fisher, None, steps, nearest(part))
    assert float(choice.step) == step
    np.testing.assert_allclose(update["w"], part["w"], rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(np.asarray(update["w"])[~masks["w"]], -params["w"][~masks["w"]])


def test_a_candidate_that_is_not_finite_is_never_taken():
    params, masks, fisher = quadratic_problem()
    search = wj.UpdateSearch(("joint", "sum"), (1.0,), (0.5, 1.0))
    losses = iter([jnp.nan, 3.0, jnp.inf])
    _, choice = wj.choose_update(params, masks, fisher, None, search, lambda _: jnp.full(4, next(losses)))
    assert not choice.joint
    assert float(choice.step) == 1
    assert float(choice.held_out_loss) == 3


@pytest.mark.parametrize(("noise", "taken"), [(0.0, 0.1), (1.0, 1.0)])
def test_a_gain_within_the_noise_changes_nothing(noise, taken):
    """Two examples gain and one loses: 1 % on average, which is nothing where the spread is a hundred times that."""
    params, masks, fisher = quadratic_problem()
    gains = np.array([0.01, 0.01, 0.01]) + noise * np.array([1, 1, -2.0])
    losses = iter([1 - gains, np.ones(3), np.ones(3) + 0.1])
    search = wj.UpdateSearch(("joint",), (0.1, 1.0, 10.0), (1.0,))
    _, choice = wj.choose_update(params, masks, fisher, None, search, lambda _: jnp.asarray(next(losses)))
    assert float(choice.damping_multiple) == pytest.approx(taken)


def test_other_curvatures_are_asked_at_their_own_damping():
    params, masks, fisher = quadratic_problem()
    diagonal = wj.diagonal_fisher({"w": fisher.gradients.reshape(6, 3, 4)}, damping=0.1)
    search = wj.UpdateSearch(("joint",), (0.1, 1.0, 10.0), (1.0,))
    update, choice = wj.choose_update(params, masks, diagonal, None, search, lambda p: jnp.sum(p["w"] ** 2, axis=0))
    assert choice.candidate_losses.shape == (1,)
    np.testing.assert_allclose(update["w"], wj.compensate(params, masks, diagonal)["w"])


def test_steps_at_several_dampings_are_those_at_each():
    params, masks, fisher = quadratic_problem(3)
    rows = {"w": fisher.gradients.reshape(6, 3, 4)}
    gradient = {"w": rows["w"].mean(0)}
    steps = fisher.compensate_at(params, masks, jnp.array([0.1, 1.0, 10.0]), gradient)
    for number, multiple in enumerate((0.1, 1.0, 10.0)):
        alone = wj.low_rank_fisher(rows, damping=0.1 * multiple).compensate(params, masks, gradient)
        np.testing.assert_allclose(steps["w"][number], alone["w"], rtol=2e-3, atol=1e-4)


def test_no_knobs_at_all():
    """Everything chosen: exact sparsity, what was held out decides, and it says what it did; in and out of jit."""
    loss_fn, params, mean_loss = trained()
    run = partial(wj.prune_one_shot, loss_fn, sparsity=0.3)
    pruned, masks, info = run(params, data())
    total = sum(mask.size for mask in jax.tree.leaves(masks) if mask.ndim == 2)
    assert sum(int((~mask).sum()) for mask in jax.tree.leaves(masks)) == round(0.3 * total)
    stages = stages_for(0.3)
    assert info.held_out.tolist() == [12] * stages
    assert info.rows.tolist() == [52] * stages
    assert info.choice.candidate_losses.shape == (stages, 4)
    assert info.choice.step_losses.shape == (stages, 6)
    aside = jax.tree.map(lambda x: x[-12:], data())
    np.testing.assert_allclose(info.choice.held_out_loss[-1], mean_loss(pruned, aside), rtol=1e-4)
    usual = info.choice.candidate_losses[:, 1]
    assert (info.choice.held_out_loss <= usual * (1 + 1e-6)).all()  # never worse than the fixed choice
    assert jax.eval_shape(run, params, data())[2].sparsity.shape == (16,)  # masks there could be are traced
    two_stages = partial(run, stages=2)  # one program holds them all
    pruned, _, info = two_stages(params, data())
    jitted = jax.jit(two_stages)(params, data())
    np.testing.assert_allclose(jitted[2].sparsity, info.sparsity)
    assert float(mean_loss(jitted[0], data())) == pytest.approx(float(mean_loss(pruned, data())), rel=0.2)


def test_held_out_choice_is_no_worse_there_than_the_fixed_one():
    loss_fn, params, mean_loss = trained()
    aside = jax.tree.map(lambda x: x[-12:], data())
    options = {"stages": 1, "examples_per_gradient": 1, "held_out": 12}
    chosen, _, _ = wj.prune_one_shot(loss_fn, params, data(), 0.7, **options)
    plain = {"method": "joint", "damping_multiples": (1.0,), "step": 1.0}
    fixed, _, info = wj.prune_one_shot(loss_fn, params, data(), 0.7, **options, **plain)
    assert float(mean_loss(chosen, aside)) <= float(mean_loss(fixed, aside)) * (1 + 1e-6)
    assert info.choice is None  # nothing was chosen


def test_first_order_never_diverges():
    """Tiny damping, a network that is not at a minimum: the Newton step is far too long, and is not taken."""
    loss_fn, params, mean_loss = trained()
    curvature = partial(wj.low_rank_fisher, damping=1e-6)
    options = {"first_order": True, "curvature": curvature, "stages": 4, "check": False}
    free = wj.prune_one_shot(loss_fn, params, data(), 0.7, **{**wj.FIXED, **options})[0]
    searched, _, info = wj.prune_one_shot(loss_fn, params, data(), 0.7, **options)
    assert float(mean_loss(free, data())) > 100
    assert float(mean_loss(searched, data())) < float(mean_loss(free, data())) / 50
    assert (info.choice.held_out_loss <= info.choice.step_losses[:, 0]).all()  # at worst the survivors stay


def test_first_order_of_averages_is_scaled_like_the_fisher():
    """Averages of s examples: H is about 1/s of the Fisher of single ones, and so must be the gradient."""
    loss_fn, params, _ = trained()
    batch = jax.tree.map(lambda x: np.repeat(x, 2, axis=0), data())  # twins: their average is each of them
    curvature = partial(wj.low_rank_fisher, damping=1e-1)
    options = {
        **wj.FIXED,
        "first_order": True,
        "curvature": curvature,
        "criterion": lambda p, h, g: wj.obs_scores(p, h),
    }
    twins = {**options, "examples_per_gradient": 2}
    _, masks, info = wj.prune_one_shot(loss_fn, params, batch, 0.5, **twins)
    rows = wj.per_example_gradients(loss_fn, params, data())
    fisher = curvature(rows)
    gradient = jax.tree.map(lambda g: g.mean(0) / 2, rows)
    update = wj.compensate(params, masks, fisher, gradient=gradient)
    predicted = 2 * wj.predicted_loss_change(update, fisher, gradient)  # in units of the loss again
    np.testing.assert_allclose(info.predicted_loss_change[0], predicted, rtol=1e-3)


def test_signed_rows_have_the_fisher_of_single_examples():
    """Averaged over many draws of the signs, and far from the Fisher of averages."""
    loss_fn, params, _ = trained()
    single = wj.stream_gradients(loss_fn, params, data()).collect()["out"].reshape(64, -1)
    fisher = single.T @ single / 64
    draws = []
    for seed in range(60):
        key = jax.random.key(seed)
        rows = wj.stream_gradients(loss_fn, params, data(), examples_per_gradient=4, signs=key, check=False).collect()
        rows = rows["out"].reshape(16, -1)
        draws.append(rows.T @ rows / 16)
    error = np.linalg.norm(np.mean(draws, axis=0) - fisher) / np.linalg.norm(fisher)
    spread = np.linalg.norm(np.std(draws, axis=0)) / np.linalg.norm(fisher) / np.sqrt(60)
    assert error < 3 * spread < 0.3


def test_signed_products_and_combinations_are_those_of_the_rows():
    loss_fn, params, _ = trained()
    stream = wj.stream_gradients(
        loss_fn, params, data(), examples_per_gradient=4, signs=jax.random.key(1), microbatch_size=5
    )
    rows = stream.collect()
    vector = jax.tree.map(jnp.ones_like, params)
    expected = sum(np.asarray(leaf).reshape(16, -1).sum(1) for leaf in jax.tree.leaves(rows))
    np.testing.assert_allclose(stream.products(vector), expected, rtol=1e-3, atol=1e-4)
    weights = jnp.arange(16.0)
    combined = stream.combine(weights)
    np.testing.assert_allclose(combined["out"], jnp.tensordot(weights, rows["out"], 1), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("held_out", ["auto", 12])
def test_what_is_fixed_by_hand_holds_with_and_without_held_out_examples(held_out):
    """Step 0 leaves the survivors; a damping without bounds too; half a step goes half of the way."""
    loss_fn, params, _ = trained()
    options = {**wj.FIXED, "held_out": held_out}
    whole, masks, _ = wj.prune_one_shot(loss_fn, params, data(), 0.5, **options)
    half, _, info = wj.prune_one_shot(loss_fn, params, data(), 0.5, **{**options, "step": 0.5})
    none, _, _ = wj.prune_one_shot(loss_fn, params, data(), 0.5, **{**options, "step": 0.0})
    damped, _, _ = wj.prune_one_shot(loss_fn, params, data(), 0.5, **{**options, "damping_multiples": (1e9,)})
    masked = wj.apply_masks(params, masks)
    assert float(info.choice.step[0]) == 0.5
    if held_out == "auto":
        np.testing.assert_allclose(half["out"], (whole["out"] + none["out"]) / 2, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(none["out"], masked["out"])
    np.testing.assert_allclose(damped["out"], masked["out"], atol=1e-4)
    assert float(jnp.abs(whole["out"] - masked["out"]).max()) > 1e-2


def test_first_order_asks_for_examples_to_hold_out():
    """Without them nothing keeps the Newton step in bounds: even a thousand times the damping does not."""
    loss_fn, params, _ = trained()
    few = jax.tree.map(lambda x: x[:39], data())
    with pytest.raises(ValueError, match=r"first_order needs held-out examples.*none of 39"):
        wj.prune_one_shot(loss_fn, params, few, 0.3, first_order=True)
    wj.prune_one_shot(loss_fn, params, few, 0.3, first_order=True, **wj.FIXED)  # by hand


def test_stages_begin_at_the_masks_that_are_there():
    assert stages_for(0.82, reached=0.8) == 2
    assert stages_for(0.5, reached=0.8) == 1
    loss_fn, params, _ = trained()
    _, masks, _ = prune_half(loss_fn, params)
    assert len(wj.prune_one_shot(loss_fn, params, data(), 0.55, masks=masks)[2].sparsity) == 2


def prune_half(loss_fn, params):
    return wj.prune_one_shot(loss_fn, params, data(), 0.5, **wj.FIXED)


def test_noise_is_not_followed_where_losses_are_negative():
    rng = np.random.default_rng(0)
    params, masks, fisher = quadratic_problem()
    search = wj.UpdateSearch(("joint",), (0.1, 1.0, 10.0), (1.0,))
    taken = []
    for _ in range(20):
        losses = iter(rng.standard_normal((3, 50)) - 5)
        _, choice = wj.choose_update(params, masks, fisher, None, search, lambda _, it=losses: jnp.asarray(next(it)))
        taken.append(float(choice.damping_multiple))
    assert np.mean(np.array(taken) == 1) > 0.7
