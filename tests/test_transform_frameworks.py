"""The transform where its users have it: NNX, Linen, Equinox; and batch statistics after pruning."""

from functools import partial

import chex
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import woodjax as wj
from woodjax.adapters import linen as linen_bridge
from woodjax.adapters import nnx as nnx_bridge
from woodjax.losses import cross_entropy

INPUTS = jax.random.normal(jax.random.key(0), (24, 6, 6, 2)) + 0.5
LABELS = jnp.arange(24) % 3
SCHEDULE = wj.cubic_schedule(begin=0, end=6, every=2, target=0.75)


class NnxNet(nnx.Module):
    def __init__(self, rngs, momentum=0.9):
        self.conv = nnx.Conv(2, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, momentum=momentum, rngs=rngs)
        self.drop = nnx.Dropout(0.1, rngs=rngs)
        self.out = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        return self.out(self.drop(nnx.relu(self.norm(self.conv(x)))).mean((1, 2)))


class LinenNet(nn.Module):
    momentum: float = 0.9

    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(4, (3, 3), name="conv")(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=self.momentum, name="norm")(x)
        return nn.Dense(3, name="out")(nn.relu(x).mean((1, 2)))


def mean_cross_entropy(logits):
    return optax.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean()


def transform(route):
    inner = optax.adamw(1e-2)
    if route == "D":
        return wj.prune_transform(inner, schedule=SCHEDULE, fisher=wj.gradient_window(4))
    if route == "magnitude":
        return wj.prune_transform(inner, schedule=SCHEDULE, criterion=wj.magnitude_scores)
    return wj.prune_transform(inner, schedule=SCHEDULE)


def assert_sparse(params, masks):
    leaves = jax.tree.leaves(params), jax.tree.leaves(masks)
    for w, mask in zip(*leaves, strict=True):
        assert not np.asarray(w)[~np.asarray(mask)].any()
    assert sum(int((~mask).sum()) for mask in leaves[1]) == 63  # of 72 + 12


@nnx.jit
def nnx_step(model, optimizer):
    optimizer.update(model, nnx.grad(lambda m: mean_cross_entropy(m(INPUTS)))(model))


@pytest.mark.parametrize("route", ["A", "D", pytest.param("magnitude", marks=pytest.mark.newest)])
def test_nnx_optimizer(route):
    model = NnxNet(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, transform(route), wrt=nnx.Param)
    for number in range(8):
        nnx_step(model, optimizer)
        if route == "A" and SCHEDULE.due(number):
            info = nnx_bridge.refresh(model, optimizer, (INPUTS, LABELS), SCHEDULE(number), measure_loss=True)
            assert not model.norm.use_running_average  # still in train mode
            assert float(info.loss_after) > 0
    assert_sparse(nnx.state(model, nnx.Param), nnx_bridge.masks(optimizer))
    info = nnx_bridge.info(optimizer)
    assert int(info.step) == 7
    np.testing.assert_allclose(info.sparsity, 0.75)


def test_nnx_masks_of_a_sparse_checkpoint():
    model = NnxNet(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, transform("A"), wrt=nnx.Param)
    nnx_step(model, optimizer)
    _, params = nnx_bridge.functional(model)
    half = jax.tree.map(lambda w: jnp.abs(w) > 0.1 if w.ndim > 1 else jnp.ones(w.shape, bool), params)
    nnx_bridge.set_masks(model, optimizer, half)
    chex.assert_trees_all_equal(nnx_bridge.masks(optimizer), half)
    for _ in range(2):
        _, params = nnx_bridge.functional(model)
        chex.assert_trees_all_equal(wj.masks_from_params(params), half)
        nnx_step(model, optimizer)


def test_nnx_route_b():
    model = NnxNet(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, transform("B"), wrt=nnx.Param)
    refresh = partial(wj.refresh_masks, batch=None, curvature=None)

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(lambda m: mean_cross_entropy(m(INPUTS)))(model)
        optimizer.update(model, grads, refresh_fn=refresh)

    for _ in range(8):
        step(model, optimizer)
    assert_sparse(nnx.state(model, nnx.Param), nnx_bridge.masks(optimizer))


def test_the_second_refresh_of_a_network_with_batch_statistics_compiles_nothing():
    model = NnxNet(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, transform("A"), wrt=nnx.Param)
    refresh = partial(nnx_bridge.refresh, model, optimizer, (INPUTS, LABELS))
    nnx_step(model, optimizer)
    refresh(0.3)
    before = jnp.copy(model.norm.mean[...])
    nnx_step(model, optimizer)
    assert (before != model.norm.mean[...]).any()
    with NoCompilation():
        refresh(0.5)


class NoCompilation:
    """Fails where XLA compiles anything."""

    def __enter__(self):
        self.found = []
        jax.monitoring.register_event_duration_secs_listener(self.listen)

    def listen(self, event, duration, **kwargs):
        if event == "/jax/core/compile/backend_compile_duration":
            self.found.append(duration)

    def __exit__(self, *error):
        self.listen = None
        assert not self.found


@pytest.mark.parametrize("route", ["A", pytest.param("D", marks=pytest.mark.newest)])
def test_linen_train_state(route):
    module = LinenNet()
    variables = module.init(jax.random.key(0), INPUTS, train=False)
    state = TrainState.create(apply_fn=module.apply, params=variables["params"], tx=transform(route))
    state = state.replace(step=jnp.int32(0))  # a Python integer would compile the first step twice
    stats = variables["batch_stats"]

    @jax.jit
    def step(state, stats):
        def loss(params):
            variables = {"params": params, "batch_stats": stats}
            logits, changed = module.apply(variables, INPUTS, train=True, mutable=["batch_stats"])
            return mean_cross_entropy(logits), changed["batch_stats"]

        grads, stats_ = jax.grad(loss, has_aux=True)(state.params)
        return state.apply_gradients(grads=grads), stats_

    for number in range(8):
        state, stats = step(state, stats)
        if route == "A" and SCHEDULE.due(number):
            variables = {"params": state.params, "batch_stats": stats}
            apply_fn, params = linen_bridge.functional(module, variables, train=False)
            params, opt_state, _ = wj.refresh(
                params, state.opt_state, (INPUTS, LABELS), SCHEDULE(number), loss_fn=cross_entropy(apply_fn)
            )
            state = state.replace(params=params, opt_state=opt_state)
    assert step._cache_size() == 1
    assert_sparse(state.params, wj.get_masks(state.opt_state))


@pytest.mark.parametrize("route", [pytest.param("A", marks=pytest.mark.newest), "D"])
def test_equinox(route):
    model = eqx.nn.MLP(72, 3, 4, 1, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    loss_fn = cross_entropy(lambda p, x: jax.vmap(eqx.combine(p, static))(x))
    data = INPUTS.reshape(24, 72), LABELS
    tx = transform(route)
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        mean = lambda p: jnp.mean(jax.vmap(loss_fn, in_axes=(None, 0))(p, data))
        updates, state = tx.update(jax.grad(mean)(params), state, params)
        return eqx.apply_updates(params, updates), state

    for number in range(8):
        params, state = step(params, state)
        if route == "A" and SCHEDULE.due(number):
            params, state, _ = wj.refresh(params, state, data, SCHEDULE(number), loss_fn=loss_fn)
    masks = wj.get_masks(state)
    assert not np.asarray(params.layers[0].weight)[~np.asarray(masks.layers[0].weight)].any()
    assert sum(int((~mask).sum()) for mask in jax.tree.leaves(masks)) == 225  # of 288 + 12


@pytest.mark.parametrize(
    "momentum", [pytest.param(0.0, marks=pytest.mark.newest), 0.5, pytest.param(0.99, marks=pytest.mark.newest)]
)
def test_batch_statistics_are_plain_averages_whatever_the_momentum(momentum):
    batches = [INPUTS[:12], 3 * INPUTS[12:] - 1]
    model = NnxNet(nnx.Rngs(0), momentum)
    model.eval()
    nnx_bridge.reestimate_batch_stats(model, batches)
    assert model.norm.use_running_average  # still in eval mode
    hidden = [model.conv(batch) for batch in batches]
    mean = np.mean([h.mean((0, 1, 2)) for h in hidden], axis=0)
    variance = np.mean([h.var((0, 1, 2)) for h in hidden], axis=0)
    np.testing.assert_allclose(model.norm.mean[...], mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(model.norm.var[...], variance, rtol=1e-3)

    module = LinenNet(momentum)
    variables = module.init(jax.random.key(0), INPUTS, train=False)
    graph, params, _ = nnx.split(model, nnx.Param, ...)
    del graph
    values = nnx.to_pure_dict(params)
    variables["params"] = {name: values[name] for name in ("conv", "norm", "out")}
    done = linen_bridge.reestimate_batch_stats(module, variables, batches, train=True)
    np.testing.assert_allclose(done["batch_stats"]["norm"]["mean"], mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(done["batch_stats"]["norm"]["var"], variance, rtol=1e-3)
    chex.assert_trees_all_equal(done["params"], variables["params"])


def test_batch_statistics_that_do_not_move_are_refused():
    module = LinenNet()
    variables = module.init(jax.random.key(0), INPUTS, train=False)
    with pytest.raises(ValueError, match="do not move towards the batch"):
        linen_bridge.reestimate_batch_stats(module, variables, [INPUTS], train=False)
    with pytest.raises(ValueError, match="No batch"):
        linen_bridge.reestimate_batch_stats(module, variables, [], train=True)
    with pytest.raises(ValueError, match="'batch_stats' is missing"):
        linen_bridge.reestimate_batch_stats(module, {"params": variables["params"]}, [INPUTS], train=True)
    with pytest.raises(ValueError, match="one size"):
        linen_bridge.reestimate_batch_stats(module, variables, [INPUTS, INPUTS[:3]], train=True)
    counter = lambda params, stats, x: {"mean": x.mean(), "count": stats["count"] + 1}
    done = wj.reestimate_batch_stats(counter, None, {"mean": jnp.ones(()), "count": jnp.int32(7)}, [INPUTS])
    assert int(done["count"]) == 7


def test_warm_up_is_the_same_function_and_reads_the_data_once():
    assert wj.warm_up_batch_stats is wj.reestimate_batch_stats
    assert nnx_bridge.warm_up_batch_stats is nnx_bridge.reestimate_batch_stats
    assert linen_bridge.warm_up_batch_stats is linen_bridge.reestimate_batch_stats
    batches = iter([INPUTS[:12], INPUTS[12:]])  # could not be read twice
    model = NnxNet(nnx.Rngs(0))
    before = jax.tree.map(jnp.copy, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    nnx_bridge.warm_up_batch_stats(model, batches)
    chex.assert_trees_all_equal(nnx.to_pure_dict(nnx.state(model, nnx.Param)), before)
    hidden = np.asarray(model.conv(INPUTS))
    np.testing.assert_allclose(model.norm.mean[...], hidden.mean((0, 1, 2)), rtol=1e-4, atol=1e-5)
    assert next(batches, None) is None


def test_without_batch_normalisation_warm_up_changes_nothing():
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    before = jax.tree.map(jnp.copy, nnx.to_pure_dict(nnx.state(model)))
    nnx_bridge.warm_up_batch_stats(model, [INPUTS])
    chex.assert_trees_all_equal(nnx.to_pure_dict(nnx.state(model)), before)
    module = nn.Dense(3)
    variables = module.init(jax.random.key(0), INPUTS)
    chex.assert_trees_all_equal(linen_bridge.warm_up_batch_stats(module, variables, [INPUTS]), variables)
    assert wj.warm_up_batch_stats(lambda params, stats, x: stats, None, {}, [INPUTS]) == {}


def test_a_function_of_a_model_stays_as_the_model_was():
    model = nnx.BatchNorm(2, rngs=nnx.Rngs(0))
    model.eval()
    apply_fn, params = nnx_bridge.functional(model)
    before = apply_fn(params, INPUTS)
    nnx_bridge.warm_up_batch_stats(model, [INPUTS])
    np.testing.assert_array_equal(apply_fn(params, INPUTS), before)
    after, _ = nnx_bridge.functional(model)
    assert np.abs(after(params, INPUTS) - before).max() > 0.1
