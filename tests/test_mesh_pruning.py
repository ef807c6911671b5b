"""One-shot pruning and refreshes of networks on a mesh, and what their programs send between devices."""

import os
import subprocess
import sys
from pathlib import Path

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
    """Its gradient is a multiple of the example."""
    return jnp.square(mc.linear_loss(params, example) - 1) / 100


def examples():
    return mc.normal(2, (EXAMPLES,))


def differing(found, expected):
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return sum(int((np.asarray(x) != np.asarray(y)).sum()) for x, y in pairs)


SHOTS = {
    "auto": {"stages": 1},
    "keyed": {
        "stages": 2,
        "damping_multiples": (1.0,),
        "method": "joint",
        "step": 1.0,
        "key": jax.random.key(3),
        "examples_per_gradient": 2,
    },
    "first order": {"stages": 1, "first_order": True},
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
    "explicit": (MeshCase({"data": 4}, a=P("data"), c=P("data"), s=P(None, "data")), EXPLICIT),
    "axis of one": (MeshCase({"data": 1, "block": 4}, a=P("data", "block"), c=P("block", "data")), AUTO),
}


@pytest.mark.parametrize("name", LOOPS)
def test_refresh_in_a_sharded_training(name):
    case, kind = LOOPS[name]
    transform = wj.prune_transform(optax.adam(1e-2))

    def step(params, state, batch):
        # A penalty of weights and data, whose gradient is where the parameters are under any axes.
        pull = jnp.mean(batch["s"] ** 2)
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


def test_no_program_gathers_parameters(tmp_path):
    job = Path(__file__).with_name("mesh_job.py")
    subprocess.run([sys.executable, job, tmp_path], check=True, timeout=300, env=os.environ | {"XLA_FLAGS": ""})
    sent = {}
    for file in tmp_path.glob("*after_optimizations.txt"):
        if "jit__take" not in file.name:  # examples travel
            sent[file.name] = wj.largest_gather(
                file.read_text(), ("all-gather", "all-reduce", "collective-permute", "collective-broadcast")
            )
    assert len(sent) > 50
    assert any(bytes_sent for bytes_sent in sent.values())
    leaf = 4 * 64 * 256
    assert {name: n for name, n in sent.items() if n > leaf // 4} == {}
