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


FIXED = {"stages": 2, "method": "joint", "damping_multiples": (1.0,), "step": 1.0}
SHOTS = {
    "search": {"stages": 1, "damping_multiples": (1.0, 10.0), "step": 1.0, "method": "joint"},
    "keyed": {**FIXED, "key": jax.random.key(3), "examples_per_gradient": 2},
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


def derived(params, batch):
    """What else is made from gradients and curvatures; blocks of 16 are the same on one device and on two."""
    gradients = wj.per_example_gradients(mc.linear_loss, params, batch)
    blocks = wj.block_fisher(gradients, block_size=16, damping=wj.Relative(1.0))
    masks, updates, info = wj.exact_obs(params, blocks, 0.4)
    path = wj.sparsity_path(params, wj.low_rank_fisher(gradients, damping=wj.Relative(1.0)), [0.2, 0.6])
    labelled = wj.sampled_label_gradients(logits, params, batch["a"]["w"][:, :, 0], jax.random.key(0))
    return (masks, path.level), (updates, path.predicted_loss_change, info.predicted_loss_change, labelled)


def logits(params, inputs):
    return jnp.tanh(inputs @ params["a"]["w"]) @ params["c"]["w"] + 0 * params["a"]["b"].sum() + 0 * params["s"].sum()


@pytest.mark.newest
def test_paths_exact_obs_and_drawn_labels():
    case = CASES["first"]
    params, batch = case.params(mc.normal(0)), case.examples(mc.normal(1, (mc.ROWS,)))
    exact, close = derived(jax.tree.map(jnp.asarray, mc.normal(0)), mc.normal(1, (mc.ROWS,)))
    same, near = derived(params, batch)
    assert same_place(same[0], params)
    assert differing(same, exact) == 0
    for found, expected in zip(jax.tree.leaves(near), jax.tree.leaves(close), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("placed", [False, True])
def test_everything_takes_explicit_axes(placed):
    case = LOOPS["explicit"][0]
    params, batch = mc.normal(0), mc.normal(1, (mc.ROWS,))
    with jax.set_mesh(case.devices(EXPLICIT)):
        if placed:
            params, batch = case.params(params, EXPLICIT), case.examples(batch, EXPLICIT)
        diagonal = wj.gauss_newton_diagonal(logits, params, batch["a"]["w"][:, :, 0])
        scores = wj.obs_scores(params, wj.diagonal_curvature(diagonal))
        masks = wj.budget_masks(scores, jax.tree.map(lambda s: s.ndim - 1, scores), 0.5)
        stream = wj.stream_gradients(mc.linear_loss, params, batch)
        row = wj.row_fisher(stream, damping=1.0).inverse_diagonal()
    kept = sum(int(np.sum(mask)) * (mask.ndim - 1) for mask in jax.tree.leaves(masks))
    assert 0 < kept <= 0.5 * (8 * 16 + 16 * 4 + 2 * 2 * 4 * 8)
    here = wj.row_fisher(wj.stream_gradients(mc.linear_loss, mc.normal(0), mc.normal(1, (mc.ROWS,))), damping=1.0)
    assert distance(row, here.inverse_diagonal()) < 1e-5


@pytest.mark.newest
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


def test_examples_that_devices_do_not_divide():
    case = CASES["fsdp"]
    params, batch = case.params(mc.normal(0)), case.examples(examples())
    with pytest.raises(ValueError, match="cannot be split evenly over 4 devices"):
        wj.prune_one_shot(loss, params, batch, 0.5, held_out=10)
