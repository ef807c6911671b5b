"""One-shot pruning and refreshes of networks on a mesh, and what their programs send between devices."""

import jax
import jax.numpy as jnp
import mesh_cases as mc
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from mesh_cases import CASES, MeshCase, P, distance, same_place

import woodjax as wj

EXPLICIT, AUTO = AxisType.Explicit, AxisType.Auto
EXAMPLES = 80


def loss(params, example):
    """Cross-entropy of a small network that uses every leaf."""
    x, y = example
    hidden = jnp.tanh(x @ params["a"]["w"] + params["a"]["b"])
    for layer in range(2):
        hidden = hidden + jnp.tanh(hidden[:4] @ params["s"][layer]).sum()
    return -jax.nn.log_softmax(hidden @ params["c"]["w"])[y]


def examples():
    rng = np.random.default_rng(2)
    return rng.normal(size=(EXAMPLES, 8)).astype(np.float32), rng.integers(0, 4, EXAMPLES).astype(np.int32)


def differing(found, expected):
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return sum(int((np.asarray(x) != np.asarray(y)).sum()) for x, y in pairs)


SHOTS = {
    "auto": {},
    "keyed": {"stages": 2, "key": jax.random.key(3), "examples_per_gradient": 2},
    "first order": {"stages": 2, "first_order": True},
    "magnitude": {"curvature": None},
}


@pytest.mark.parametrize("shot", SHOTS)
def test_one_shot_is_that_of_one_device(shot):
    case = CASES["mixed"]
    params, batch = case.params(mc.normal(0)), case.examples(examples())
    expected = wj.prune_one_shot(loss, mc.normal(0), examples(), 0.15, **SHOTS[shot])
    pruned, masks, info = wj.prune_one_shot(loss, params, batch, 0.15, **SHOTS[shot])
    assert same_place(pruned, params)
    assert same_place(masks, params)
    assert differing(masks, expected[1]) == 0
    assert distance(pruned, expected[0]) < 1e-5
    np.testing.assert_allclose(info.loss_after, expected[2].loss_after, rtol=1e-5)


LOOPS = {
    "fsdp": (CASES["fsdp"], AUTO),
    "mixed": (CASES["mixed"], AUTO),
    "explicit": (MeshCase({"data": 4}, a=P("data"), c=P("data"), s=P(None, "data")), EXPLICIT),
    "axis of one": (MeshCase({"data": 1, "block": 4}, a=P("data", "block"), c=P("block", "data")), AUTO),
}


@pytest.mark.parametrize("name", LOOPS)
def test_refresh_in_a_sharded_training(name):
    case, kind = LOOPS[name]
    transform = wj.prune_transform(optax.adam(1e-2))

    def step(params, state, batch):
        # A penalty of weights and data, whose gradient is where the parameters are under any axes.
        pull = jnp.mean(batch[0] ** 2)
        updates, state = transform.update(jax.tree.map(lambda w: pull * w, params), state, params)
        return optax.apply_updates(params, updates), state

    def train(params, batch):
        state = transform.init(params)
        compiled = jax.jit(step, out_shardings=jax.tree.map(lambda x: x.sharding, (params, state)))
        params, state = compiled(params, state, batch)
        before = params, state
        params, state, _ = wj.refresh(params, state, batch, 0.5, loss_fn=loss)
        after, programs = (params, state), compiled._cache_size()
        params, state = compiled(params, state, batch)
        return params, state, before, after, compiled._cache_size() - programs

    here = train(jax.tree.map(jnp.asarray, mc.normal(0)), examples())
    with jax.set_mesh(case.devices(kind)):
        params, state, before, after, more = train(case.params(mc.normal(0), kind), case.examples(examples(), kind))
    assert more == 0
    assert [x.sharding for x in jax.tree.leaves(after)] == [x.sharding for x in jax.tree.leaves(before)]
    masks = wj.get_masks(state)
    assert same_place(masks, params)
    assert differing(masks, wj.get_masks(here[1])) == 0
    assert distance(params, here[0]) < 1e-4
