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


@pytest.mark.parametrize("name", CASES)
def test_the_whole_network_is_that_of_one_device(x64, name):
    params, gradients = gradients_of(CASES[name], np.float64)
    fisher = wj.low_rank_fisher(gradients, damping=DAMPING)
    check(fisher, params, dense(mc.rows_of(gradients)), 1e-12)


@pytest.mark.parametrize("name", ["data", "last", "mixed"])
def test_blocks_are_cut_inside_shards(x64, name):
    params, gradients = gradients_of(CASES[name], np.float64)
    hessian = oracle.blockwise(dense(mc.rows_of(gradients)), mc.shard_blocks(params, BLOCK))
    check(wj.block_fisher(gradients, block_size=BLOCK, damping=DAMPING), params, hessian, 1e-12)
