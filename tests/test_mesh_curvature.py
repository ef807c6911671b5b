"""Curvatures of parameters on a mesh of devices: as on one device, and as dense float64."""

from functools import partial

import jax
import jax.numpy as jnp
import mesh_cases as mc
import numpy as np
import oracle
import pytest
from jax.sharding import AxisType
from mesh_cases import CASES, P, distance, flat, normal, same_place

import woodjax as wj

DAMPING = wj.Relative(1.0)
BLOCK = 6  # does not divide any shard


def gradients_of(case, dtype=np.float32, kind=AxisType.Auto, **options):
    params, batch = case.params(normal(0, dtype=dtype), kind), case.examples(normal(1, (mc.ROWS,), dtype), kind)
    return params, wj.per_example_gradients(mc.linear_loss, params, batch, **options)


@jax.jit
def answers(curvature, params, masks, gradient):
    return {
        "inverse_diagonal": curvature.inverse_diagonal(),
        "solve": curvature.solve(params),
        "matvec": curvature.matvec(params),
        "compensate": curvature.compensate(params, masks, gradient),
    }


def dense_answers(hessian, params, masks, gradient):
    w, pruned, g = flat(params), ~flat(masks).astype(bool), flat(gradient)
    return {
        "inverse_diagonal": np.diag(np.linalg.inv(hessian)),
        "solve": np.linalg.solve(hessian, w),
        "matvec": hessian @ w,
        "compensate": oracle.constrained_minimiser(hessian, w, pruned, g),
    }


def asked_of(params):
    """Masks, and a gradient, where the parameters are."""
    masks = jax.tree.map(lambda w: (np.abs(w) > 0.5) | (w.ndim < 2), jax.device_get(params))
    others = masks, jax.tree.map(lambda w: 0.1 * np.asarray(w), params)
    return [jax.tree.map(lambda x, w: jax.device_put(x, w.sharding), tree, params) for tree in others]


def check(curvature, params, hessian, tolerance, ask=answers):
    asked = asked_of(params)
    expected = dense_answers(hessian, params, *asked)
    for name, tree in ask(curvature, params, *asked).items():
        assert same_place(tree, params), name
        assert distance(flat(tree), expected[name]) < tolerance, name
        assert not np.asarray(tree["a"]["b"]).any()


def dense(rows, damping=1.0):
    return oracle.fisher(rows, damping * np.mean(rows**2))


@pytest.mark.parametrize("name", ["data", "last", "fsdp", "mixed", "rows", "alone"])
def test_the_whole_network_is_that_of_one_device(x64, name):
    params, gradients = gradients_of(CASES[name], np.float64)
    fisher = wj.low_rank_fisher(gradients, damping=DAMPING)
    check(fisher, params, dense(mc.rows_of(gradients)), 1e-12)


@pytest.mark.parametrize("name", ["data", "last", "mixed"])
def test_blocks_are_cut_inside_shards(x64, name):
    params, gradients = gradients_of(CASES[name], np.float64)
    hessian = oracle.blockwise(dense(mc.rows_of(gradients)), mc.shard_blocks(params, BLOCK))
    check(wj.block_fisher(gradients, block_size=BLOCK, damping=DAMPING), params, hessian, 1e-12)


def some_answers(curvature, params, masks, gradient):
    found = curvature.inverse_diagonal(), curvature.compensate(params, masks, gradient)
    return dict(zip(("inverse_diagonal", "compensate"), found, strict=True))


KINDS = {
    "dual": partial(wj.block_fisher, engine="dual", block_size=BLOCK),
    "scan": partial(wj.block_fisher, engine="scan", block_size=BLOCK),
    "rank_k": partial(wj.block_fisher, engine="rank_k", block_size=BLOCK),
    "low rank": partial(wj.low_rank_fisher, block_size=BLOCK),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_engine_sees_the_same_blocks(x64, kind):
    params, gradients = gradients_of(CASES["mixed"], np.float64)
    hessian = oracle.blockwise(dense(mc.rows_of(gradients)), mc.shard_blocks(params, BLOCK))
    check(KINDS[kind](gradients, damping=DAMPING), params, hessian, 1e-12, some_answers)


def test_diagonal(x64):
    params, gradients = gradients_of(CASES["mixed"], np.float64)
    fisher = wj.diagonal_fisher(gradients, damping=DAMPING)
    check(fisher, params, np.diag(np.diag(dense(mc.rows_of(gradients)))), 1e-13)
    diagonal = fisher.diagonal()
    assert same_place(diagonal, params)
    assert distance(flat(diagonal), np.diag(dense(mc.rows_of(gradients)))) < 1e-13


def one_device(tree):
    return jax.tree.map(np.asarray, tree)


def stream_of(case, dtype, kind=AxisType.Auto, **options):
    params, batch = case.params(normal(0, dtype=dtype), kind), case.examples(normal(1, (mc.ROWS,), dtype), kind)
    return params, wj.stream_gradients(mc.linear_loss, params, batch, microbatch_size=8, **options)


@pytest.mark.parametrize("name", ["mixed"])
def test_streams_in_windows_of_each_device(x64, name):
    params, stream = stream_of(CASES[name], np.float64)
    gradients = stream.collect()
    assert distance(flat(gradients), flat(stream.batch)) == 0
    fisher = wj.streamed_fisher(stream, window_size=7, damping=DAMPING)
    check(fisher, params, dense(mc.rows_of(gradients)), 1e-12, answers.__wrapped__)


def test_streams_are_summed_up(x64):
    params, stream = stream_of(CASES["first"], np.float64)
    hessian = oracle.blockwise(dense(mc.rows_of(stream.batch)), mc.shard_blocks(params, BLOCK))
    check(wj.block_fisher(stream, block_size=BLOCK, damping=DAMPING), params, hessian, 1e-12, some_answers)


@pytest.mark.parametrize("block_size", [2, 20])  # sums travel, or rows
def test_sums_of_several_days(x64, block_size):
    params, gradients = gradients_of(CASES["rows"], np.float64)
    days = [jax.tree.map(lambda g, i=i: g[8 * i : 8 * i + 8], gradients) for i in range(3)]
    empty = wj.BlockSums.init(params, block_size=block_size)
    first, second = empty.add(days[0]).add(days[1]), empty.add(days[2])
    hessian = oracle.blockwise(dense(mc.rows_of(gradients)), mc.shard_blocks(params, block_size))
    check(first.merge(second).finalize(DAMPING), params, hessian, 1e-12, some_answers)


def test_rows_of_several_days(x64):
    params, gradients = gradients_of(CASES["rows"], np.float64)
    days = [jax.tree.map(lambda g, i=i: g[8 * i : 8 * i + 8], gradients) for i in range(3)]
    first = wj.GradientRows.init(params, capacity=20).add(days[0])
    second = wj.GradientRows.init(params, capacity=16).add(days[1]).add(days[2])
    check(first.merge(second).finalize(DAMPING), params, dense(mc.rows_of(gradients)), 1e-12, some_answers)
    diagonal = wj.DiagonalSums.init(params).add(gradients).finalize(DAMPING).diagonal()
    assert distance(flat(diagonal), np.diag(dense(mc.rows_of(gradients)))) < 1e-13


@pytest.mark.parametrize("make", [wj.low_rank_fisher, wj.diagonal_fisher])
def test_damping_that_held_out_gradients_ask_for(make):
    _, gradients = gradients_of(CASES["mixed"])
    here, there = make(one_device(gradients), damping="auto"), make(gradients, damping="auto")
    np.testing.assert_allclose(there.damping, here.damping, rtol=1e-5)


def test_stacked_layers(x64):
    params, gradients = gradients_of(CASES["last"], np.float64)
    options = {"block_size": 5, "batch_axes": 1, "select": lambda path, leaf: path == "s"}
    fisher = wj.block_fisher(gradients, damping=0.5, **options)
    blocks = [block for block in mc.shard_blocks(params, 5, layers=1) if min(block) >= 8 * 16 + 16 * 4]
    hessian = oracle.blockwise(oracle.fisher(mc.rows_of(gradients), 0.5), blocks)[8 * 16 + 16 * 4 :, 8 * 16 + 16 * 4 :]
    found = fisher.inverse_diagonal()["s"]
    assert distance(np.asarray(found).reshape(-1), np.diag(np.linalg.inv(hessian))) < 1e-12


def test_explicit_axes():
    case = CASES["mixed"]
    one = wj.low_rank_fisher(one_device(normal(1, (mc.ROWS,))), damping=DAMPING)
    expected = some_answers(one, normal(0), *map(one_device, asked_of(case.params(normal(0)))))
    with jax.set_mesh(case.devices(AxisType.Explicit)):
        params, gradients = gradients_of(case, kind=AxisType.Explicit)
        assert gradients["c"]["w"].sharding.spec == P(None, ("block", "data"))
        found = some_answers(wj.low_rank_fisher(gradients, damping=DAMPING), params, *asked_of(params))
        change = wj.predicted_loss_change(found["compensate"], wj.diagonal_fisher(gradients))
    for name, tree in found.items():
        assert same_place(tree, params), name
        assert distance(tree, expected[name]) < 1e-6, name
    assert np.isfinite(change)


def test_bfloat16_parameters_have_float32_curvature():
    params, gradients = gradients_of(CASES["mixed"], jnp.bfloat16)
    fisher = wj.low_rank_fisher(gradients, damping=DAMPING)
    assert fisher.gradients.dtype == jnp.float32
    check(fisher, params, dense(mc.rows_of(gradients)), 1e-6, some_answers)


def test_micro_batches_of_every_device():
    case = CASES["rows"]
    params, batch = case.params(normal(0)), case.examples(normal(1, (48,)))
    found = wj.per_example_gradients(mc.linear_loss, params, batch, microbatch_size=17)  # two rows on each device
    assert distance(found, batch) == 0
    assert {shard.data.shape for shard in found["a"]["w"].addressable_shards} == {(24, 2, 16)}


def test_parameters_that_are_not_placed():
    batch = CASES["data"].examples(normal(1, (mc.ROWS,)))
    gradients = wj.per_example_gradients(mc.linear_loss, normal(0), batch)
    found = wj.low_rank_fisher(gradients, damping=DAMPING).inverse_diagonal()
    expected = np.diag(np.linalg.inv(dense(mc.rows_of(gradients))))
    assert distance(flat(found), expected) < 1e-6


def test_errors_name_what_to_do():
    case = CASES["mixed"]
    params, gradients = gradients_of(case)
    other = CASES["data"].params(normal(0))
    with pytest.raises(ValueError, match=r"different meshes.*Place all of them on one"):
        wj.per_example_gradients(mc.linear_loss, other, case.examples(normal(1, (mc.ROWS,))))
    with pytest.raises(ValueError, match="blocks on several devices"):
        wj.block_fisher(gradients, damping="auto")
    fisher = wj.low_rank_fisher(gradients)
    with pytest.raises(ValueError, match=r"Groups of weights .* layer by layer"):
        wj.pattern_masks(params, fisher, wj.NM(2, 4))
    batch = case.examples(normal(1, (mc.ROWS,)))
    batch["s"] = jax.device_put(batch["s"], jax.NamedSharding(case.devices(), P("block")))
    with pytest.raises(ValueError, match="Examples are split along"):
        wj.per_example_gradients(mc.linear_loss, params, batch)


def test_held_out_rows_of_a_stream_are_those_of_one_device():
    case = CASES["mixed"]
    params, batch = case.params(normal(0)), normal(1, (mc.ROWS,))
    streams = (
        wj.stream_gradients(mc.linear_loss, one_device(params), batch, microbatch_size=8),
        wj.stream_gradients(mc.linear_loss, params, case.examples(batch), microbatch_size=8),
    )
    here, there = (wj.low_rank_fisher(stream, damping="auto") for stream in streams)
    np.testing.assert_allclose(there.damping, here.damping, rtol=1e-5)


@pytest.mark.parametrize(("shape", "spec"), [((32,), P("block")), ((8, 16), P(None, "block"))])
def test_parameters_that_are_one_array(shape, spec):
    mesh = CASES["first"].devices()
    rng = np.random.default_rng(0)
    w, x = rng.normal(size=shape).astype(np.float32), rng.normal(size=(12, *shape)).astype(np.float32)
    masks = np.abs(w) > 0.5
    place = lambda array, to: jax.device_put(array, jax.NamedSharding(mesh, to))

    def steps(w, x, masks):
        gradients = wj.per_example_gradients(jnp.vdot, w, x)
        fisher = wj.low_rank_fisher(gradients, damping=1.0, select=lambda path, leaf: True)
        return fisher.compensate_at(w, masks, jnp.array([1.0, 10.0, 100.0, 1000.0]))

    here, there = steps(w, x, masks), steps(place(w, spec), place(x, P("data")), place(masks, spec))
    assert there.shape == here.shape
    np.testing.assert_allclose(there, here, atol=1e-5)


def test_sums_that_travel_in_64_bits(x64):
    case = CASES["data"]
    params, batch = case.params(normal(0, dtype=np.float64)), normal(1, (96,), np.float64)
    stream = wj.stream_gradients(mc.linear_loss, params, case.examples(batch), microbatch_size=96)
    alone = wj.stream_gradients(mc.linear_loss, one_device(params), batch)
    there, here = (wj.block_fisher(rows, block_size=4, damping=1.0).inverse_diagonal() for rows in (stream, alone))
    assert distance(flat(there), flat(here)) < 1e-12
