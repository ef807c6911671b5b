"""One call for all engines: the same matrix, the engine that suits, a budget that holds or a refusal that helps."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import woodjax as wj
from woodjax.curvature._blocked import WORKSPACE, blocks_at_once


def loss_fn(params, example):
    """Its gradient is the example itself."""
    return jnp.vdot(params["w"], example["w"])


def draw(m, shape=(6, 5)):
    return {"w": jnp.asarray(np.random.default_rng(0).standard_normal((m, *shape)), jnp.float32)}


def stream(m, shape=(6, 5), microbatch_size=2):
    params = {"w": jnp.ones(shape)}
    return wj.stream_gradients(loss_fn, params, draw(m, shape), microbatch_size=microbatch_size)


@pytest.mark.parametrize("source", [draw, stream])
@pytest.mark.parametrize(
    ("m", "block_size", "expected"),
    [
        (40, 8, "primal"),
        (8, 8, "primal"),
        (7, 8, "factored"),
        (2, 8, "factored"),
        (40, None, "factored"),
        (2, None, "factored"),
    ],
)
def test_auto_chooses_by_rows_and_block_size(source, m, block_size, expected):
    assert wj.estimate(source(m), block_size=block_size).engine == expected
    found = wj.empirical_fisher(source(m), block_size=block_size, damping=0.1)
    reference = wj.block_fisher(draw(m), block_size=block_size or 30, damping=0.1, engine="scan")
    np.testing.assert_allclose(found.inverse_diagonal()["w"], reference.inverse_diagonal()["w"], rtol=1e-3)


@pytest.mark.parametrize("engine", ["scan", "rank_k", "primal", "dual", "factored", "streamed"])
def test_every_engine_by_name_stands_for_the_same_matrix(engine):
    found = wj.empirical_fisher(stream(7), engine=engine, damping=0.1)
    reference, vector = wj.low_rank_fisher(draw(7), damping=0.1), {"w": draw(1)["w"][0]}
    for ours, theirs in (
        (found.inverse_diagonal(), reference.inverse_diagonal()),
        (found.solve(vector), reference.solve(vector)),
    ):
        np.testing.assert_allclose(ours["w"], theirs["w"], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("engine", ["scan", "rank_k", "primal", "dual", "factored", "streamed"])
def test_the_whole_network_is_one_block_for_every_engine(engine):
    rng = np.random.default_rng(0)
    rows = {"a": rng.standard_normal((7, 4, 3)), "b": rng.standard_normal((7, 3, 2))}
    rows = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), rows)
    params = jax.tree.map(lambda g: jnp.ones_like(g[0]), rows)
    two_leaves = lambda p, e: jnp.vdot(p["a"], e["a"]) + jnp.vdot(p["b"], e["b"])
    found = wj.empirical_fisher(wj.stream_gradients(two_leaves, params, rows), engine=engine, damping=0.1)
    flat = np.concatenate([np.asarray(rows["a"]).reshape(7, -1), np.asarray(rows["b"]).reshape(7, -1)], axis=1)
    expected = np.diag(np.linalg.inv(oracle.fisher(flat, 0.1)))
    diagonal = found.inverse_diagonal()
    np.testing.assert_allclose(np.concatenate([diagonal["a"].ravel(), diagonal["b"].ravel()]), expected, rtol=1e-3)


def test_a_budget_fits_windows_also_when_the_engine_is_named():
    whole = wj.estimate(stream(50, (40, 1000)), engine="streamed")
    plan = wj.estimate(stream(50, (40, 1000)), engine="streamed", memory_budget=whole.peak_bytes // 3)
    assert plan.window_size < whole.window_size == 40_000


def test_automatic_damping_takes_more_memory():
    gradients = {"w": jax.ShapeDtypeStruct((200, 512, 512), jnp.float32)}
    plain, auto = (wj.estimate(gradients, block_size=128, damping=damping) for damping in (0.1, "auto"))
    assert auto.peak_bytes > 1.5 * plain.peak_bytes


def test_nothing_is_compiled_again():
    gradients, vector = draw(20), {"w": draw(1)["w"][0]}

    def everything():
        for damping in (0.1, wj.Relative(0.1), "auto"):
            for options in ({"block_size": 8}, {"block_size": 8, "engine": "dual"}, {"block_size": None}):
                fisher = wj.empirical_fisher(gradients, damping=damping, **options)
                fisher.inverse_diagonal(), fisher.solve(vector), fisher.compensate(vector, {"w": vector["w"] > 0})

    everything()
    with jax.log_compiles(), pytest.MonkeyPatch.context() as patch:
        compiled = []
        patch.setattr(logging.getLogger("jax._src.interpreters.pxla"), "handlers", [_Collect(compiled)])
        everything()
    assert not compiled


class _Collect(logging.Handler):
    def __init__(self, messages):
        super().__init__(logging.WARNING)
        self.messages = messages

    def emit(self, record):
        self.messages.append(record.getMessage())


def test_a_quarter_of_the_memory_gives_the_same_curvature():
    rows, shape = 50, (40, 1000)
    source = stream(rows, shape)
    whole = wj.estimate(source)
    plan = wj.estimate(source, memory_budget=whole.peak_bytes // 4)
    assert (whole.engine, plan.engine) == ("factored", "streamed")
    assert plan.peak_bytes <= whole.peak_bytes // 4
    assert plan.passes > whole.passes
    assert 0 < plan.window_size < 40_000
    small = wj.empirical_fisher(source, memory_budget=whole.peak_bytes // 4, damping=0.1)
    assert isinstance(small, wj.StreamedFisher)
    held = wj.empirical_fisher(source, damping=0.1)
    np.testing.assert_allclose(small.inverse_diagonal()["w"], held.inverse_diagonal()["w"], rtol=1e-5)


def test_estimates_grow_as_the_arrays_do():
    shapes = [{"w": jax.ShapeDtypeStruct((m, 512, 512), jnp.float32)} for m in (100, 200)]
    small, large = (wj.estimate(gradients) for gradients in shapes)
    assert small.result_bytes == 4 * (100 * 512 * 512 + 100**2)
    assert 1.9 < large.peak_bytes / small.peak_bytes < 2.1
    assert 3.5 < large.flops / small.flops < 4.1
    dense = wj.estimate(shapes[1], block_size=128)
    assert dense.result_bytes == 4 * 512 * 512 * 128
    assert dense.flops == 2 * 512 * 512 * (200 * 128 + 128**2)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (draw, {"memory_budget": 100}, "pass a stream of gradients"),
        (draw, {"memory_budget": 100, "block_size": 8}, "take a smaller block_size, or fewer examples"),
        (draw, {"memory_budget": 100, "block_size": 30, "engine": "dual"}, "'factored', which holds no inverse"),
        (stream, {"memory_budget": 100}, "Take fewer examples, or a smaller microbatch_size"),
        (stream, {"memory_budget": 100, "block_size": 30, "engine": "factored"}, "leave the engine to 'auto'"),
        (draw, {"engine": "fast"}, "engine is 'fast': choose one of"),
        (draw, {"engine": "streamed"}, "needs a stream of gradients and the whole network"),
        (stream, {"engine": "streamed", "block_size": 8}, "needs a stream of gradients and the whole network"),
    ],
)
def test_refusals_say_what_would_help(source, options, message):
    with pytest.raises(ValueError, match=message):
        wj.empirical_fisher(source(20), **options)


def test_blocks_in_work_are_bounded(monkeypatch):
    assert blocks_at_once(1) == 1  # on CPU
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert blocks_at_once(WORKSPACE // 3) == 3
    assert blocks_at_once(10 * WORKSPACE) == 1
