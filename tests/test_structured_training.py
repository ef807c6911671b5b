"""Smaller networks are trained, pruned again, rebuilt, saved and exported."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import woodjax as wj
from woodjax.adapters.nnx import functional, functional_train, functional_variables, with_shapes_of
from woodjax.datasets import load_dataset
from woodjax.models import ResNet, digits_mlp
from woodjax.training import fit_shrunk, reestimate_shrunk, sgd_recipe

IMAGES = np.random.default_rng(1).normal(size=(32, 8, 8, 3)).astype(np.float32)


class Net(nnx.Module):
    """A convolution with statistics, and a head: its code has no widths."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.bn = nnx.BatchNorm(8, rngs=rngs)
        self.linear = nnx.Linear(8, 10, rngs=rngs)

    def __call__(self, x):
        return self.linear(jax.nn.relu(self.bn(self.conv(x))).mean(axis=(1, 2)))


class Averaged(Net):
    """The same with a width in its code."""

    def __call__(self, x):
        x = jax.nn.relu(self.bn(self.conv(x))).mean(axis=(1, 2))
        return self.linear(x - x.mean(-1, keepdims=True) * (x.shape[-1] != 8))


def made(kind=Net, seed=0):
    model = kind(nnx.Rngs(seed))
    model.eval()
    apply_fn, variables = functional_variables(model)
    return model, apply_fn, variables, wj.channel_groups(apply_fn, variables, IMAGES[:1])


def planned(groups, ratio=0.4, implants=0.0, seed=0):
    scores = wj.random_channel_scores(groups, jax.random.key(seed))
    return wj.make_plan(groups, *wj.select_channels(groups, scores, ratio=ratio, implants=implants))


@pytest.mark.parametrize("streams", ["joint", "union"])
def test_train_mode_updates_stay_small_and_are_those_of_the_masked_network(streams):
    model = ResNet(1, widths=(4, 8), rngs=nnx.Rngs(0))
    model.eval()
    groups = wj.channel_groups(*functional_variables(model), IMAGES[:1], streams=streams)
    plan = planned(groups, implants=0.3)
    model.train()
    forward, params, rest = functional_train(model)
    network = wj.shrunk_network(lambda v, x: forward(v["params"], v["rest"], x), plan, updates=True)
    logits, stats = jax.jit(network)({"params": plan.shrink(params), "rest": plan.shrink(rest)}, IMAGES)
    masked = [wj.apply_masks(tree, plan.masks(tree)) for tree in (params, rest)]
    expected, whole = jax.jit(forward)(*masked, IMAGES)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), stats, plan.shrink(whole))


def test_fine_tuning_trains_what_is_left_and_leaves_the_model_alone():
    digits, model = load_dataset("digits"), digits_mlp(nnx.Rngs(0))
    model.eval()
    apply_fn, variables = functional_variables(model)
    before = jax.tree.map(np.array, variables)
    groups = wj.channel_groups(apply_fn, variables, digits.test_inputs[:1])
    plan = planned(groups)
    network = jax.jit(wj.shrunk_network(apply_fn, plan))

    def accuracy(tree):
        return float((network(tree, digits.test_inputs).argmax(-1) == digits.test_labels).mean())

    seen = []
    small = fit_shrunk(
        model,
        plan,
        plan.shrink(variables),
        digits,
        optimizer=sgd_recipe(0.1, steps=100),
        epochs=3,
        seed=0,
        batch_size=64,
        on_epoch=lambda info, tree: seen.append((info.epoch, accuracy(tree))),
    )
    assert [epoch for epoch, _ in seen] == [1, 2, 3]
    assert accuracy(plan.shrink(variables)) < 0.3 < 0.8 < accuracy(small) == seen[-1][1]
    jax.tree.map(np.testing.assert_array_equal, before, functional_variables(model)[1])


def test_statistics_are_those_of_the_smaller_network():
    model, _, variables, groups = made()
    plan = planned(groups)
    small = reestimate_shrunk(model, plan, plan.shrink(variables), [IMAGES])
    conv = small["conv"]
    seen = jax.lax.conv_general_dilated(
        IMAGES, conv["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    written = np.asarray(seen + conv["bias"])
    np.testing.assert_allclose(small["bn"]["mean"], written.mean((0, 1, 2)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(small["bn"]["var"], written.var((0, 1, 2)), rtol=1e-3)
    jax.tree.map(np.testing.assert_array_equal, small["conv"], plan.shrink(variables)["conv"])


def test_rounds_are_one_plan_and_scores_of_the_smaller_network_go_on():
    _, apply_fn, variables, whole = made()
    groups, plan, small = whole, wj.make_plan(whole, {}), variables
    state = optax.adam(1e-3).init(variables)
    for _ in range(2):
        network = wj.shrunk_network(apply_fn, plan)
        scores = wj.gate_scores(groups, network, small, IMAGES[:8])
        later = wj.make_plan(groups, *wj.select_channels(groups, scores, macs=0.7))
        groups, small, state = wj.shrink_groups(groups, later), later.shrink(small), later.shrink(state)
        plan = plan.then(later)
        assert groups.macs({}) == whole.macs(plan.kept)
        assert groups.parameters({}) == sum(leaf.size for leaf in jax.tree.leaves(small))
    assert jax.tree.map(jnp.shape, state[0].mu) == jax.tree.map(jnp.shape, small)
    assert 0 < plan.kept["conv/kernel"].sum() < 8
    jax.tree.map(np.testing.assert_array_equal, small, plan.shrink(variables))


def test_code_without_widths_runs_by_itself():
    model, apply_fn, variables, groups = made()
    plan = planned(groups)
    small, network = plan.shrink(variables), wj.shrunk_network(apply_fn, plan)
    rebuilt, _ = functional_variables(with_shapes_of(model, small))
    wj.check_rebuilt(rebuilt, network, small, IMAGES)


def test_code_with_widths_is_found_out():
    model, apply_fn, variables, groups = made(Averaged)
    plan = planned(groups)
    small, network = plan.shrink(variables), wj.shrunk_network(apply_fn, plan)
    rebuilt, _ = functional_variables(with_shapes_of(model, small))
    with pytest.raises(ValueError, match="a width is written into it"):
        wj.check_rebuilt(rebuilt, network, small, IMAGES)
    with pytest.raises(ValueError, match="does not run on fewer channels"):
        wj.check_rebuilt(lambda v, x: functional(model)[0](v, x.reshape(-1, 7)), network, small, IMAGES)
    with pytest.raises(ValueError, match="returns"):
        wj.check_rebuilt(lambda v, x: rebuilt(v, x)[:1], network, small, IMAGES)


@pytest.mark.parametrize("rank", [None, 2])
def test_files_hold_arrays_implants_and_the_plan(tmp_path, rank):
    model = ResNet(1, widths=(4, 8), rngs=nnx.Rngs(0))
    model.eval()
    apply_fn, variables = functional_variables(model)
    groups = wj.channel_groups(apply_fn, variables, IMAGES[:1])
    plan = planned(groups, ratio=0.6, implants=0.6)
    small = wj.start_implants(apply_fn, variables, plan, IMAGES, rank=rank)
    wj.save_pruned(tmp_path / "small.safetensors", small, plan)
    loaded, again = wj.load_pruned(tmp_path / "small.safetensors")
    assert again == plan
    assert plan.has_implants
    assert jax.tree.structure(loaded) == jax.tree.structure(small)
    jax.tree.map(np.testing.assert_array_equal, loaded, small)
    network = jax.jit(wj.shrunk_network(apply_fn, plan))
    np.testing.assert_array_equal(network(loaded, IMAGES), network(small, IMAGES))
    exported = wj.export_stablehlo(wj.shrunk_network(apply_fn, plan), small, IMAGES, symbolic_batch=False)
    np.testing.assert_allclose(wj.load_stablehlo(exported)(small, IMAGES), network(small, IMAGES), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"sizes that are numbers.*symbolic_batch=False for the batch of"):
        wj.export_stablehlo(wj.shrunk_network(apply_fn, plan), small, IMAGES)
    wj.save_arrays(tmp_path / "other.safetensors", variables)
    with pytest.raises(ValueError, match="has no plan"):
        wj.load_pruned(tmp_path / "other.safetensors")
