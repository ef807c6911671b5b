"""Every configuration of `prune_transform` behaves as an Optax transformation has to.

Modelled on the properties that Optax asks of its own optimizers: constant state, no second compilation, extra
arguments passed on, dtypes kept, wrappers that wrap, and the promise of this one: pruned weights are exactly zero.
"""

import subprocess
import sys
from functools import cache, partial
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import woodjax as wj

EVERY, LAST, TARGET = 2, 8, 0.75
SCHEDULE = wj.cubic_schedule(begin=2, end=LAST, every=EVERY, target=TARGET)
LEAVES = wj.linear_schedule(begin=2, end=LAST, every=EVERY, target={"*": 0.5, "out": 0.75})
STEPS = 10


def parameters(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 2)
    tree = {
        "dense": {"kernel": jax.random.normal(keys[0], (6, 4)), "bias": jnp.ones(4)},
        "out": jax.random.normal(keys[1], (4, 4)),
    }
    return jax.tree.map(lambda x: x.astype(dtype), tree)


INPUTS = jax.random.normal(jax.random.key(1), (16, 6))
LABELS = jnp.arange(16) % 4


def loss_fn(params, example):
    x, label = example
    hidden = jnp.tanh(x.astype(params["out"].dtype) @ params["dense"]["kernel"] + params["dense"]["bias"])
    return optax.softmax_cross_entropy_with_integer_labels((hidden @ params["out"]).astype(jnp.float32), label)


@jax.jit
def gradient(params, step=0):
    rows = (jnp.arange(4) + 4 * step) % 16
    mean = lambda p: jnp.mean(jax.vmap(loss_fn, in_axes=(None, 0))(p, (INPUTS[rows], LABELS[rows])))
    return jax.grad(mean)(params)


def in_update(**options):
    return lambda inner: wj.prune_transform(inner, **{"schedule": SCHEDULE} | options)


def window(size=4, **options):
    return wj.gradient_window(size, **options)


REFRESH = partial(wj.refresh_masks, loss_fn=loss_fn, batch=(INPUTS, LABELS), curvature=wj.diagonal_fisher)
MAGNITUDE = {"criterion": wj.magnitude_scores}
BLOCKS = partial(wj.block_fisher, block_size=5, damping=1e-2)

# name: (from an inner optimizer to a transformation, keywords of the update)
CONFIGURATIONS = {
    "route A": (in_update(), {}),
    "route A in a chain": (lambda inner: optax.chain(inner, wj.prune_transform(schedule=SCHEDULE)), {}),
    "route B": (in_update(), {"refresh_fn": REFRESH}),
    "route B recomputed": (in_update(), {"refresh_fn": partial(REFRESH, recomputations=2)}),
    "route D": (in_update(fisher=window()), {}),
    "route D in bfloat16": (in_update(fisher=window(dtype=jnp.bfloat16)), {}),
    "route D sketched": (in_update(fisher=window(6, memory_budget=3 * 40 * 4)), {}),
    "route D blocks, sum": (in_update(fisher=window(curvature=BLOCKS), method="sum"), {}),
    "route D WoodTaylor": (in_update(fisher=window(), first_order=True, method=None), {}),
    "route D recomputed": (in_update(fisher=window(), recomputations=3), {}),
    "magnitude": (in_update(**MAGNITUDE), {}),
    "magnitude in a chain": (
        lambda inner: optax.chain(inner, wj.prune_transform(schedule=SCHEDULE, **MAGNITUDE)),
        {},
    ),
    "magnitude by leaf": (in_update(schedule=LEAVES, scope="leaf", **MAGNITUDE), {}),
    "magnitude by group": (in_update(schedule=LEAVES, **MAGNITUDE), {}),
    "Erdős–Rényi": (in_update(scope="erdos_renyi", **MAGNITUDE), {}),
}
VARIANTS = {  # of a route that is there without them
    "route A",
    "route B recomputed",
    "route D in bfloat16",
    "route D WoodTaylor",
    "route D recomputed",
    "magnitude in a chain",
    "magnitude by leaf",
    "Erdős–Rényi",
}
for_each = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.newest] * (name in VARIANTS)) for name in CONFIGURATIONS]
)
# Wrappers of other people see an opaque transformation: criteria and curvatures are all the same to them. What can
# differ is what prunes (nobody, a function passed on, recorded gradients, a criterion), and the element of a chain.
for_each_way = pytest.mark.parametrize("name", ["route A in a chain", "route B", "route D", "magnitude"])
# An optimizer inside is called in one place, whatever prunes after it: by arguments of the update, and without.
for_an_inner_one = pytest.mark.parametrize("name", ["route B", "magnitude"])
ADAMW = optax.adamw(1e-2, weight_decay=0.1)


def stepper(tx, keywords, **jit_options):
    @partial(jax.jit, **jit_options)
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params, **keywords)
        return optax.apply_updates(params, updates), state

    return step


def train(tx, keywords, steps=STEPS, dtype=jnp.float32, refresh=False, **jit_options):
    params = parameters(dtype)
    state, step = tx.init(params), stepper(tx, keywords, **jit_options)
    for number in range(steps):
        params, state = step(params, state, gradient(params, number))
        if refresh and SCHEDULE.due(number):
            params, state, _ = wj.refresh(params, state, None, SCHEDULE(number), curvature=None)
    return params, state, step


def is_route_a(name):
    return name.startswith("route A")


def trained(name, inner=ADAMW, **options):
    make, keywords = CONFIGURATIONS[name]
    return train(make(inner), keywords, refresh=is_route_a(name), **options)


@cache
def with_adamw(name):
    """The run that most tests look at or compare with.

    With donation: a buffer that is used twice, or one that comes back in another type, would raise or warn.
    """
    return trained(name, donate_argnums=(0, 1))


def counted(masks):
    return sum(int((~mask).sum()) for mask in jax.tree.leaves(masks))


@for_each
def test_target_met_and_zeros_held(name):
    params, state, _ = with_adamw(name)
    masks, info = wj.get_masks(state), wj.get_info(state)
    for w, mask in zip(jax.tree.leaves(params), jax.tree.leaves(masks), strict=True):
        assert not np.asarray(w)[~np.asarray(mask)].any()
        assert np.asarray(w)[np.asarray(mask)].all()
    assert masks["dense"]["bias"].all()
    if "by" in name:
        assert [int((~masks["dense"]["kernel"]).sum()), int((~masks["out"]).sum())] == [12, 12]
    else:
        assert counted(masks) == 30
        np.testing.assert_allclose(info.sparsity, TARGET)
    assert int(info.step) == LAST + 1
    assert not info.nonfinite.any()
    np.testing.assert_allclose(info.density, [1.0, masks["dense"]["kernel"].mean(), masks["out"].mean()])


@for_each
def test_one_compilation(name):
    _, _, step = with_adamw(name)
    assert step._cache_size() == 1


@for_each
def test_state_keeps_its_types(name):
    make, _ = CONFIGURATIONS[name]
    tx, params = make(ADAMW), parameters()
    before = tx.init(params)
    _, after, _ = with_adamw(name)
    chex.assert_trees_all_equal_shapes_and_dtypes(before, after)
    assert [jax.typeof(x) for x in jax.tree.leaves(before)] == [jax.typeof(x) for x in jax.tree.leaves(after)]
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(before))
    chex.assert_trees_all_equal_shapes_and_dtypes(before, jax.eval_shape(tx.init, params))


@pytest.mark.parametrize("name", ["route B", "route D", "magnitude"])  # route A prunes on the host
def test_scan_is_the_loop(name):
    make, keywords = CONFIGURATIONS[name]
    tx, params = make(ADAMW), parameters()

    def body(carry, number):
        params, state = carry
        updates, state = tx.update(gradient(params, number), state, params, **keywords)
        return (optax.apply_updates(params, updates), state), None

    (scanned, state), _ = jax.jit(lambda carry: jax.lax.scan(body, carry, jnp.arange(STEPS)))((params, tx.init(params)))
    expected, looped, _ = with_adamw(name)
    chex.assert_trees_all_equal(wj.get_masks(state), wj.get_masks(looped))
    chex.assert_trees_all_close(scanned, expected, rtol=1e-3, atol=1e-4)


@for_each
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_updates_keep_the_dtype(name, dtype):
    make, keywords = CONFIGURATIONS[name]
    tx, params = make(optax.sgd(0.1, momentum=0.9)), parameters(dtype)
    updates, _ = jax.eval_shape(partial(tx.update, **keywords), gradient(params), tx.init(params), params)
    assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}


@for_each_way
def test_zeros_are_exact_in_bfloat16(name):
    params, state, _ = trained(name, optax.sgd(0.1, momentum=0.9), dtype=jnp.bfloat16)
    assert params["out"].dtype == jnp.bfloat16
    assert not np.asarray(params["out"])[~np.asarray(wj.get_masks(state)["out"])].any()


@for_each
def test_map_params_finds_the_masks_and_changes_nothing(name):
    tx = CONFIGURATIONS[name][0](ADAMW)
    state = tx.init(parameters())
    seen = []
    chex.assert_trees_all_equal(optax.tree.map_params(tx, lambda x: seen.append(x.dtype) or x, state), state)
    assert seen.count(jnp.dtype(bool)) == 3  # one mask for each leaf; rows of gradients are not parameters


@for_each
def test_unknown_keywords_reach_the_inner_optimizer(name):
    seen = []

    def update(updates, state, params=None, **extra):
        seen.append(extra.get("value"))
        return updates, state

    spy = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    make, keywords = CONFIGURATIONS[name]
    tx, params = make(spy), parameters()
    jax.eval_shape(partial(tx.update, value=3, **keywords), gradient(params), tx.init(params), params)
    assert seen == [3]


@pytest.mark.newest
@for_each_way
def test_inject_hyperparams(name):
    make, keywords = CONFIGURATIONS[name]
    build = lambda learning_rate: make(optax.adamw(learning_rate, weight_decay=0.1))
    params, state, _ = train(optax.inject_hyperparams(build)(learning_rate=1e-2), keywords, refresh=is_route_a(name))
    expected, other, _ = with_adamw(name)
    chex.assert_trees_all_close((params, wj.get_masks(state)), (expected, wj.get_masks(other)), rtol=1e-4, atol=1e-5)


@pytest.mark.newest
@for_each_way
def test_inside_multi_steps_only_real_steps_count(name):
    make, keywords = CONFIGURATIONS[name]
    tx = optax.MultiSteps(make(ADAMW), 2)
    params = parameters()
    state, step = tx.init(params), stepper(tx, keywords)
    refresh = is_route_a(name)
    for number in range(2 * STEPS):
        params, state = step(params, state, gradient(params, number))
        if refresh and number % 2 and SCHEDULE.due(number // 2):
            params, state, _ = wj.refresh(params, state, None, SCHEDULE(number // 2), curvature=None)
    assert int(wj.get_info(state).step) == LAST + 1
    assert counted(wj.get_masks(state)) in {24, 30}
    assert step._cache_size() == 1
    assert not np.asarray(params["out"])[~np.asarray(wj.get_masks(state)["out"])].any()


@pytest.mark.newest
@for_an_inner_one
def test_around_multi_steps_zeros_hold(name):
    params, state, _ = trained(name, optax.MultiSteps(ADAMW, 2).gradient_transformation())
    assert not np.asarray(params["out"])[~np.asarray(wj.get_masks(state)["out"])].any()
    assert counted(wj.get_masks(state)) in {24, 30}


@pytest.mark.newest
@for_each_way
def test_apply_if_finite_outside_skips_the_step_whole(name):
    make, keywords = CONFIGURATIONS[name]
    tx = optax.apply_if_finite(make(ADAMW), 3)
    params = parameters()
    state = tx.init(params)
    update = jax.jit(partial(tx.update, **keywords))
    updates, after = update(jax.tree.map(lambda x: x * jnp.nan, params), state, params)
    chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, params))
    chex.assert_trees_all_equal(after.inner_state, state.inner_state)


@pytest.mark.newest
@for_an_inner_one
def test_around_partition(name):
    labels = {"dense": {"kernel": "slow", "bias": "fast"}, "out": "fast"}
    inner = optax.partition({"slow": optax.adam(1e-3), "fast": optax.adam(1e-2)}, labels)
    params, state, _ = trained(name, inner)
    masks = wj.get_masks(state)
    assert not np.asarray(params["dense"]["kernel"])[~np.asarray(masks["dense"]["kernel"])].any()
    assert counted(masks) in {24, 30}


@for_each
def test_an_empty_tree(name):
    make, keywords = CONFIGURATIONS[name]
    tx = make(ADAMW)
    updates, _ = tx.update({}, tx.init({}), {}, **keywords)
    assert updates == {}


@pytest.mark.parametrize("name", ["route A in a chain", "magnitude"])  # the others on two devices, below
def test_explicit_sharding_is_kept(name):
    make, keywords = CONFIGURATIONS[name]
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        place = lambda x: jax.device_put(x, jax.NamedSharding(mesh, jax.P("x")))
        tx, params = make(ADAMW), jax.tree.map(place, parameters())
        state, step = tx.init(params), stepper(tx, keywords)
        kinds = [jax.typeof(x) for x in jax.tree.leaves((params, state))]
        grads = jax.tree.map(place, gradient(parameters()))
        for _ in range(STEPS):
            params, state = step(params, state, grads)
        assert [jax.typeof(x) for x in jax.tree.leaves((params, state))] == kinds
        assert jax.typeof(params["out"]).sharding.spec[0] == "x"


TWO_DEVICES = ("route A", "route B", "route D", "magnitude by group")


def placed(name, place=lambda x: x):
    """Parameters and masks of a training, and of a refresh for route A, with all arrays placed by a function."""
    make, keywords = CONFIGURATIONS[name]
    tx, params = make(ADAMW), jax.tree.map(place, parameters())
    state, step = tx.init(params), stepper(tx, keywords)
    kinds = [jax.typeof(x) for x in jax.tree.leaves((params, state))]
    for number in range(STEPS):
        grads = jax.tree.map(place, jax.device_get(gradient(jax.device_get(params), number)))
        params, state = step(params, state, grads)
    if name == "route A":
        bound = jax.tree_util.Partial(lambda scale, *example: scale.mean() * loss_fn(*example), place(jnp.ones(2)))
        options = {"key": jax.random.key(0), "examples_per_stage": 12, "measure_loss": True, "recomputations": 2}
        params, state, _ = wj.refresh(params, state, (INPUTS, LABELS), 0.5, loss_fn=bound, **options)
    assert [jax.typeof(x) for x in jax.tree.leaves((params, state))] == kinds, name
    return jax.device_get((params, wj.get_masks(state)))


@pytest.mark.parametrize("name", TWO_DEVICES)
def test_two_devices_with_explicit_axes_are_one_device(name, two_devices):
    if name == "route A":
        expected = placed(name)
    else:
        params, state, _ = with_adamw(name)
        expected = params, wj.get_masks(state)
    with np.load(two_devices / f"{name}.npz") as file:
        found = jax.tree.unflatten(jax.tree.structure(expected), [file[key] for key in file.files])
    chex.assert_trees_all_equal(found[1], expected[1])
    chex.assert_trees_all_close(found[0], expected[0], rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def two_devices(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two_devices")
    command = [sys.executable, str(Path(__file__).with_name("explicit_job.py")), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return folder
