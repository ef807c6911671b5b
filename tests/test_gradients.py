"""Per-example gradients against a loop, the three Fishers, and the probe for unfit losses."""

from functools import partial

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx

import woodjax as wj
from woodjax.adapters import linen as linen_adapter
from woodjax.adapters import nnx as nnx_adapter
from woodjax.losses import cross_entropy

KEY = jax.random.key(0)


def loss_fn(params, example):
    x, y = example
    return (jnp.tanh(x @ params["w"]).sum() - y) ** 2


def batch(n=6):
    rng = np.random.default_rng(0)
    return rng.standard_normal((n, 3)).astype(np.float32), rng.standard_normal(n).astype(np.float32)


PARAMS = {"w": np.linspace(-1, 1, 6, dtype=np.float32).reshape(3, 2)}


def loop(examples):
    x, y = examples
    return np.stack([jax.grad(loss_fn)(PARAMS, (x[i], y[i]))["w"] for i in range(len(y))])


@pytest.mark.parametrize("microbatch_size", [None, 1, 2, 4, 6, 100])
@pytest.mark.parametrize("jit", [False, True])
def test_equals_a_loop_over_examples(microbatch_size, jit):
    def rows(params, examples):
        return wj.per_example_gradients(loss_fn, params, examples, microbatch_size=microbatch_size)

    found = (jax.jit(rows) if jit else rows)(PARAMS, batch())
    np.testing.assert_allclose(found["w"], loop(batch()), rtol=1e-5)


@pytest.mark.parametrize("microbatch_size", [None, 2])
def test_means_of_consecutive_examples(microbatch_size):
    rows = wj.per_example_gradients(loss_fn, PARAMS, batch(), microbatch_size=microbatch_size, examples_per_gradient=2)
    np.testing.assert_allclose(rows["w"], loop(batch()).reshape(3, 2, 3, 2).mean(1), rtol=1e-5, atol=1e-6)


def test_compiled_once_for_the_same_loss():
    traces = []

    def counted(params, example):
        traces.append(1)
        return loss_fn(params, example)

    wj.per_example_gradients(counted, PARAMS, batch(), microbatch_size=2, check=False)
    first = len(traces)
    wj.per_example_gradients(counted, PARAMS, batch(), microbatch_size=2, check=False)
    assert len(traces) - first <= 1  # shapes of a row are asked for again, nothing is compiled


@pytest.mark.parametrize(
    ("options", "examples", "message"),
    [
        ({"examples_per_gradient": 4}, batch(), "6 examples cannot be averaged"),
        ({"microbatch_size": 0}, batch(), "microbatch_size is 0"),
        ({}, (np.ones((3, 3)), np.ones(4)), "leading sizes"),
        ({}, (np.ones((0, 3)), np.ones(0)), "non-zero number of examples"),
        ({}, (np.ones((3, 3)), 1.0), "leading sizes"),
        ({}, [(np.ones(3), 1.0)] * 9, "not a list of examples"),
    ],
)
def test_bad_batches(options, examples, message):
    with pytest.raises(ValueError, match=message):
        wj.per_example_gradients(loss_fn, PARAMS, examples, **options)


def apply_fn(params, x):
    return jnp.tanh(x) @ params["w"]


def exact_fisher(x):
    total = 0
    for row in x:
        jacobian = jax.jacobian(lambda p, row=row: apply_fn(p, row[None])[0])(PARAMS)["w"].reshape(2, -1)
        probabilities = jax.nn.softmax(apply_fn(PARAMS, row[None])[0])
        total = total + oracle.softmax_fisher(np.asarray(jacobian, float), np.asarray(probabilities, float))
    return total / len(x)


@pytest.mark.parametrize("microbatch_size", [None, 4])
def test_all_classes_give_the_exact_fisher(microbatch_size):
    x, _ = batch()
    rows = wj.all_class_gradients(apply_fn, PARAMS, x, microbatch_size=microbatch_size)["w"].reshape(12, -1)
    np.testing.assert_allclose(rows.T @ rows / 12, exact_fisher(x), atol=1e-6)


def test_all_classes_are_the_gauss_newton_matrix_of_cross_entropy():
    """Logits linear in the parameters: the Hessian of cross-entropy is the exact Fisher."""
    x, _ = batch()
    rows = wj.all_class_gradients(apply_fn, PARAMS, x)["w"].reshape(12, -1)
    loss = cross_entropy(apply_fn)
    mean_loss = lambda w: jnp.mean(jax.vmap(lambda row: loss({"w": w}, (row, 0)))(x))
    hessian = jax.hessian(mean_loss)(PARAMS["w"]).reshape(6, 6)
    np.testing.assert_allclose(rows.T @ rows / 12, hessian, atol=1e-5)


def test_sampled_labels_estimate_the_exact_fisher():
    x, _ = batch()
    rows = wj.sampled_label_gradients(apply_fn, PARAMS, x, KEY, samples=4000, microbatch_size=2)["w"]
    rows = rows.reshape(6 * 4000, -1)
    expected = exact_fisher(x)
    error = np.abs(rows.T @ rows / len(rows) - expected).max()
    assert error < 5 * np.abs(expected).max() / np.sqrt(4000)


def test_every_sampled_row_is_a_gradient_at_some_label():
    x, _ = batch()
    loss = cross_entropy(apply_fn)
    rows = wj.sampled_label_gradients(apply_fn, PARAMS, x, KEY)["w"]
    for i, row in enumerate(rows):
        candidates = [jax.grad(loss)(PARAMS, (x[i], label))["w"] for label in (0, 1)]
        assert min(np.abs(row - c).max() for c in candidates) < 1e-6


def test_bad_label_requests():
    x, _ = batch()
    with pytest.raises(ValueError, match="samples is 0"):
        wj.sampled_label_gradients(apply_fn, PARAMS, x, KEY, samples=0)
    with pytest.raises(ValueError, match=r"expected logits \[1, C\]"):
        wj.all_class_gradients(lambda p, x: apply_fn(p, x)[0], PARAMS, x)


class LinenNet(nn.Module):
    norm: type | None = None
    dropout: bool = False

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(4)(x)
        if self.norm is nn.BatchNorm:
            x = nn.BatchNorm(use_running_average=not train)(x)
        elif self.norm is not None:
            x = self.norm()(x)
        if self.dropout:
            x = nn.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(2)(nn.relu(x))


X, LABELS = np.ones((5, 3), np.float32), np.zeros(5, int)


def linen_loss(train, **options):
    module = LinenNet(**options)
    variables = module.init(KEY, X)
    rest = {name: value for name, value in variables.items() if name != "params"}

    def loss(params, example):
        x, label = example
        logits = module.apply(
            {"params": params, **rest}, x[None], train=train, rngs={"dropout": KEY}, mutable=["batch_stats"]
        )[0]
        return -jax.nn.log_softmax(logits[0])[label]

    return loss, variables["params"]


@pytest.mark.parametrize("options", [{}, {"norm": nn.LayerNorm}, {"norm": nn.BatchNorm}, {"dropout": True}])
def test_eval_mode_passes_the_probe(options):
    loss, params = linen_loss(train=False, **options)
    rows = wj.per_example_gradients(loss, params, (X, LABELS))
    assert rows["Dense_0"]["kernel"].shape == (5, 3, 4)


def test_dropout_is_found():
    loss, params = linen_loss(train=True, dropout=True)
    with pytest.raises(ValueError, match="draws random numbers"):
        wj.per_example_gradients(loss, params, (X, LABELS))


def test_train_mode_batch_normalisation_is_found():
    loss, params = linen_loss(train=True, norm=nn.BatchNorm)
    with pytest.raises(ValueError, match="batch normalisation in train mode"):
        wj.per_example_gradients(loss, params, (X, LABELS))
    wj.per_example_gradients(loss, params, (X, LABELS), check=False)


def test_convolutional_batch_normalisation_is_found():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.BatchNorm(use_running_average=not train)(nn.Conv(4, (3, 3))(x))
            return nn.Dense(2)(nn.relu(x).mean((1, 2)))

    images = np.ones((2, 5, 5, 1), np.float32)
    variables = Net().init(KEY, images, train=False)

    def loss(train):
        def loss_fn(params, x):
            merged = {**variables, "params": params}
            return Net().apply(merged, x[None], train=train, mutable=["batch_stats"])[0].sum()

        return loss_fn

    wj.check_loss(loss(False), variables["params"], images[0])
    with pytest.raises(ValueError, match="batch normalisation in train mode"):
        wj.check_loss(loss(True), variables["params"], images[0])


def test_batch_normalisation_by_a_power_is_found():
    def loss(p, x):
        y = (x @ p)[None]
        return ((y - y.mean(0)) * (y.var(0) + 1e-5) ** -0.5).sum()

    with pytest.raises(ValueError, match="batch normalisation in train mode"):
        wj.check_loss(loss, jnp.ones((3, 2)), jnp.ones(3))


def test_statistics_of_parameters_are_not_batch_normalisation():
    """Weight standardisation of a 1×1 kernel reduces over a leading axis of length one, of parameters alone."""

    def loss(p, x):
        return (x @ (p / jnp.sqrt((p**2).sum((0, 1), keepdims=True)))[0]).sum()

    wj.check_loss(loss, jnp.ones((1, 3, 2)), jnp.ones(3))


def test_a_norm_after_a_new_layer_is_not_batch_normalisation():
    """The mean over a batch of one, a dense layer, then a layer norm: the root is of the layer's own statistics."""

    def loss(p, x):
        y = x[None].sum(0, keepdims=True) @ p
        return (y / jnp.sqrt((y**2).sum(-1, keepdims=True))).sum()

    wj.check_loss(loss, jnp.ones((3, 2)), jnp.ones(3))


def test_a_loss_that_cannot_be_hashed_is_refused():
    class Loss:
        __hash__ = None

        def __call__(self, params, example):
            return loss_fn(params, example)

    with pytest.raises(ValueError, match="cannot be hashed"):
        wj.per_example_gradients(Loss(), PARAMS, batch())


@pytest.mark.parametrize("rows", [wj.all_class_gradients, partial(wj.sampled_label_gradients, key=KEY)])
def test_label_free_gradients_look_for_dropout_too(rows):
    module = LinenNet(dropout=True)
    params = module.init(KEY, X)["params"]
    with pytest.raises(ValueError, match="draws random numbers"):
        rows(lambda p, x: module.apply({"params": p}, x, train=True, rngs={"dropout": KEY}), params, X)


def test_numpy_randomness_is_found():
    rng = np.random.default_rng(0)
    for draw in (lambda: float(rng.random()), lambda: jnp.asarray(rng.random(3), jnp.float32)):
        with pytest.raises(ValueError, match="two different programs"):
            wj.check_loss(lambda p, x, draw=draw: jnp.sum(p["w"] * draw()), {"w": jnp.ones(3)}, jnp.ones(3))


def test_a_custom_derivative_is_not_a_different_program():
    wj.check_loss(lambda p, x: jax.nn.relu(p * x).sum() + jax.nn.silu(p).sum(), jnp.ones(3), jnp.ones(3))


@pytest.mark.parametrize(
    ("loss", "params", "message"),
    [
        (lambda p, x: p * x, jnp.ones(3), "one floating scalar"),
        (lambda p, x: (p.sum(), x), jnp.ones(3), "one floating scalar"),
        (lambda p, x: jnp.int32(1), jnp.ones(3), "one floating scalar"),
        (lambda p, x: p["n"].sum() * x.sum(), {"n": jnp.arange(3)}, "Leaf 'n' is int32"),
    ],
)
def test_unfit_losses(loss, params, message):
    with pytest.raises(ValueError, match=message):
        wj.check_loss(loss, params, jnp.ones(3))


def test_a_loss_over_a_batch_is_told_what_it_gets():
    with pytest.raises(ValueError, match="axis 1 is out of bounds") as caught:
        wj.per_example_gradients(lambda p, x: jax.nn.log_softmax(x @ p["w"], axis=1).sum(), PARAMS, batch()[0])
    assert any("with ONE example, of shapes (3,)" in note for note in caught.value.__notes__)


def test_nnx_adapter():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.fc = nnx.Linear(3, 2, rngs=rngs)
            self.bn = nnx.BatchNorm(2, rngs=rngs)
            self.drop = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return self.drop(self.bn(self.fc(x)))

    model = Net(nnx.Rngs(0))
    model.eval()
    apply, params = nnx_adapter.functional(model)
    rows = wj.per_example_gradients(cross_entropy(apply), params, (X, LABELS))
    assert rows["fc"]["kernel"].shape == (5, 3, 2)
    nnx_adapter.update(model, jax.tree.map(jnp.zeros_like, params))
    assert not np.asarray(nnx.to_pure_dict(nnx.state(model, nnx.Param))["fc"]["kernel"]).any()
    model.train()
    broken, params = nnx_adapter.functional(model)
    with pytest.raises(ValueError, match=r"call model\.eval\(\)"):
        wj.per_example_gradients(cross_entropy(broken), params, (X, LABELS))


def test_linen_adapter():
    module = LinenNet(norm=nn.BatchNorm)
    variables = module.init(KEY, X)
    apply, params = linen_adapter.functional(module, variables, train=False)
    np.testing.assert_allclose(apply(params, X), module.apply(variables, X, train=False), rtol=1e-6)
    broken, params = linen_adapter.functional(module, variables, train=True)
    with pytest.raises(ValueError, match=r"changes \['batch_stats'\]"):
        wj.per_example_gradients(cross_entropy(broken), params, (X, LABELS))
    with pytest.raises(ValueError, match="'params' is missing"):
        linen_adapter.functional(module, {"batch_stats": {}})


def test_equinox_trees_have_gradients():
    model = eqx.nn.MLP(3, 2, 4, 1, key=KEY)
    params, static = eqx.partition(model, eqx.is_inexact_array)
    loss = cross_entropy(lambda p, x: jax.vmap(eqx.combine(p, static))(x))
    rows = wj.per_example_gradients(loss, params, (X, LABELS), microbatch_size=2)
    assert rows.layers[0].weight.shape == (5, 4, 3)
