"""The training loop: against a plain loop in NumPy, under masks, and resumed."""

import signal
import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from training_job import EPOCHS, SETTINGS, data, network

import woodjax as wj
from woodjax.adapters import nnx as bridge
from woodjax.datasets import Dataset, Normalise
from woodjax.training import EpochInfo, evaluate, evaluate_model, fit, sgd_recipe, train

JOB = Path(__file__).with_name("training_job.py")


def values(model):
    return nnx.to_pure_dict(nnx.state(model))


def half_masks(model):
    _, params = bridge.functional(model)
    return wj.make_masks(wj.magnitude_scores(params), 0.5), params


class Linear(nnx.Module):
    """Softmax regression: a training that NumPy can repeat."""

    def __init__(self, size):
        self.w = nnx.Param(jnp.asarray(np.random.default_rng(0).normal(size=(size, 3)), jnp.float32))

    def __call__(self, x):
        return x.reshape(len(x), -1) @ self.w


def numpy_training(w, mask, inputs, labels, orders, rates, decay, smoothing, momentum=0.9):
    """`v = μv + g + λw; w = w − ηv` on survivors, in float64."""
    w, v = w * mask, np.zeros_like(w)
    losses = []
    for chosen, rate in zip(orders, rates, strict=True):
        x, y = inputs[chosen], np.eye(3)[labels[chosen]]
        targets = (1 - smoothing) * y + smoothing / 3
        logits = x @ w
        logp = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        losses.append(-(targets * logp).sum(1).mean())
        gradient = x.T @ (np.exp(logp) - targets) / len(x)
        v = (momentum * v + gradient + decay * w) * mask
        w = w - rate * v
    return w, losses


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("masked", [False, True])
def test_a_training_is_the_recipe_written_out(masked, smoothing):
    rng = np.random.default_rng(1)
    inputs, labels = rng.normal(size=(22, 1, 2, 1)).astype(np.float32), rng.integers(0, 3, 22)
    dataset = Dataset("toy", inputs, labels, inputs, labels)
    model, infos = Linear(2), []
    start = np.asarray(model.w[...], np.float64)
    mask = np.array([[True, False, True], [False, True, True]]) if masked else np.ones((2, 3), bool)
    epochs, size = 4, 5
    optimizer = sgd_recipe(0.5, steps=16, weight_decay=0.01)
    masks = {"w": jnp.asarray(mask)} if masked else None
    options = {"optimizer": optimizer, "seed": 3, "batch_size": size, "label_smoothing": smoothing}
    fit(model, dataset, epochs=epochs, masks=masks, on_epoch=infos.append, **options)
    orders = [np.random.default_rng((3, epoch)).permutation(22)[:20].reshape(4, size) for epoch in range(epochs)]
    rates = [0.5] * 8 + [0.1] * 4 + [0.02] * 4
    flat = inputs.reshape(22, 2).astype(np.float64)
    w, losses = numpy_training(start, mask, flat, labels, np.concatenate(orders), rates, 0.01, smoothing)
    np.testing.assert_allclose(model.w[...], w, rtol=1e-5, atol=1e-6)
    assert not np.asarray(model.w[...])[~mask].any()
    np.testing.assert_allclose(np.concatenate([info.losses for info in infos]), losses, rtol=1e-5)
    assert [(info.epoch, info.steps) for info in infos] == [(1, 4), (2, 8), (3, 12), (4, 16)]


@pytest.mark.parametrize("decay", ["steps", "cosine", "constant"])
def test_learning_rates_of_the_recipe(decay):
    recipe = sgd_recipe(0.3, steps=160, momentum=0.0, weight_decay=0.0, decay=decay)
    params = {"w": jnp.ones(1)}
    state, rates = recipe.init(params), []
    update = jax.jit(recipe.update)
    for _ in range(160):
        updates, state = update({"w": jnp.ones(1)}, state, params)
        rates.append(-float(updates["w"][0]))
    steps = np.arange(160)
    expected = {
        "steps": 0.3 * 0.2 ** ((steps >= 80).astype(int) + (steps >= 120)),
        "cosine": 0.15 * (1 + np.cos(np.pi * steps / 160)),
        "constant": np.full(160, 0.3),
    }
    np.testing.assert_allclose(rates, expected[decay], rtol=1e-4, atol=1e-8)
    assert recipe is sgd_recipe(0.3, steps=160, momentum=0.0, weight_decay=0.0, decay=decay)


def test_masks_hold_and_statistics_move_and_nothing_compiles_twice():
    model = network(0)
    masks, before = half_masks(model)
    fit(model, data(), epochs=1, masks=masks, **SETTINGS)
    again, compiled = network(1), []
    masks_again, _ = half_masks(again)
    jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: compiled.append(name))
    fit(again, data(), epochs=1, masks=masks_again, **SETTINGS | {"seed": 8})
    assert "/jax/core/compile/backend_compile_duration" not in compiled
    assert model.norm.use_running_average
    assert model.drop.deterministic
    assert (np.asarray(model.norm.mean[...]) != 0).any()
    _, params = bridge.functional(model)
    for w, mask, was in zip(*map(jax.tree.leaves, (params, masks, before)), strict=True):
        assert not np.asarray(w)[~np.asarray(mask)].any()
        assert (np.asarray(w) != np.asarray(was)).any()


def test_an_optimizer_that_prunes_gradually_keeps_its_masks():
    schedule = wj.cubic_schedule(begin=0, end=4, every=2, target=0.75)
    optimizer = wj.prune_transform(optax.adam(1e-2), schedule=schedule, criterion=wj.magnitude_scores)
    model = Linear(192)
    masks, _ = half_masks(model)
    fit(model, data(), epochs=3, masks=masks, **SETTINGS | {"optimizer": optimizer})
    zero = np.asarray(model.w[...]) == 0
    assert zero.sum() == 432  # of 576
    assert zero[~np.asarray(masks["w"])].all()


def test_killed_and_resumed_to_the_same_bits(tmp_path):
    """Killed in the middle of the third epoch; random numbers of dropout and of the augmentation go on."""
    killed = subprocess.run(
        [sys.executable, str(JOB), str(tmp_path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    whole, resumed, epochs = network(0), network(5), []
    masks, _ = half_masks(whole)
    options = SETTINGS | {"masks": masks, "epochs": EPOCHS}
    fit(whole, data(), **options)
    fit(resumed, data(), checkpoint_dir=tmp_path, on_epoch=lambda info: epochs.append(info.epoch), **options)
    assert epochs == [3, 4]
    chex.assert_trees_all_equal(*(jax.tree.map(bits, values(model)) for model in (resumed, whole)))
    done = network(6)
    fit(done, data(), checkpoint_dir=tmp_path, **options)  # nothing left to do
    chex.assert_trees_all_equal(*(jax.tree.map(bits, values(model)) for model in (done, whole)))
    with pytest.raises(ValueError, match="seed 7 there and 1 here"):
        fit(network(0), data(), checkpoint_dir=tmp_path, **options | {"seed": 1})
    with pytest.raises(ValueError, match="masks"):
        fit(network(0), data(), checkpoint_dir=tmp_path, **options | {"masks": None})


def bits(x):
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return np.asarray(jax.random.key_data(x))
    return np.asarray(x)


def test_bytes_and_normalised_floats_train_alike():
    raw = data()
    floats = [np.asarray(raw.normalise(x)) for x in (raw.train_inputs, raw.test_inputs)]
    wide = Dataset("floats", floats[0], raw.train_labels, floats[1], raw.test_labels)
    models = Linear(192), Linear(192)
    for model, dataset in zip(models, (raw, wide), strict=True):
        fit(model, dataset, epochs=1, **SETTINGS | {"augment": None})
    np.testing.assert_allclose(models[0].w[...], models[1].w[...], rtol=1e-4, atol=1e-5)
    assert evaluate_model(models[0], raw) == evaluate_model(models[0], wide)
    apply_fn, params = bridge.functional(models[0])
    expected = np.mean(np.argmax(apply_fn(params, floats[1]), axis=1) == raw.test_labels)
    assert evaluate(apply_fn, params, raw, batch_size=7) == pytest.approx(expected)


def test_normalise_is_torchvision_s():
    images = np.arange(24, dtype=np.uint8).reshape(1, 2, 4, 3) * 10
    expected = (images / 255 - [0.4, 0.5, 0.6]) / [0.2, 0.3, 0.4]
    np.testing.assert_allclose(Normalise((0.4, 0.5, 0.6), (0.2, 0.3, 0.4))(images), expected, rtol=1e-5, atol=1e-6)


def test_a_loss_that_is_not_finite_names_its_step():
    raw = data()
    inputs = np.array(raw.normalise(raw.train_inputs))
    poison = np.random.default_rng((7, 1)).permutation(len(inputs))[20]  # step 1 of epoch 1, 16 a batch
    inputs[poison] = np.nan
    first = np.random.default_rng((7, 0)).permutation(len(inputs))
    assert np.flatnonzero(first == poison)[0] >= 32  # not in the two batches of epoch 0
    dataset = raw._replace(train_inputs=inputs)
    model, seen = Linear(192), []
    with pytest.raises(FloatingPointError, match="loss of step 3 is nan"):
        fit(model, dataset, epochs=2, on_epoch=seen.append, **SETTINGS | {"augment": None})
    assert [type(info) for info in seen] == [EpochInfo]
    assert np.isfinite(model.w[...]).all()


def test_arguments_out_of_range_are_refused():
    good = SETTINGS | {"epochs": 1}
    for bad, message in [
        ({"epochs": 0}, "epochs is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 1000}, "has 41 training examples"),
        ({"seed": -1}, "seed is -1"),
        ({"label_smoothing": 1.0}, "label_smoothing is 1.0"),
        ({"checkpoint_every": 0}, "checkpoint_every is 0"),
        ({"masks": {"wrong": jnp.ones(3, bool)}}, "masks"),
    ]:
        with pytest.raises(ValueError, match=message):
            fit(network(0), data(), **good | bad)
    with pytest.raises(ValueError, match="learning_rate=0"):
        sgd_recipe(0, steps=1)
    with pytest.raises(ValueError, match="decay is 'linear'"):
        sgd_recipe(0.1, steps=1, decay="linear")


def test_train_is_fit_by_adam():
    model, calls = Linear(192), []
    train(model, data(), epochs=2, seed=0, batch_size=16, on_epoch=lambda: calls.append(evaluate_model(model, data())))
    assert len(calls) == 2
    with pytest.raises(ValueError, match="training examples"):
        train(model, data(), epochs=2, seed=0)
