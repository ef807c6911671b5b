"""All routes on two devices with an explicit mesh, against one device: run by `test_transform_conformance`."""

import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"

import chex
import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType
from test_transform_conformance import CONFIGURATIONS, INPUTS, LABELS, STEPS, gradient, loss_fn, parameters, stepper

import woodjax as wj


def train(name, place):
    make, keywords = CONFIGURATIONS[name]
    tx, params = make(optax.adamw(1e-2)), jax.tree.map(place, parameters())
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


for name in ("route A", "route B", "route D", "magnitude by group"):
    expected = train(name, lambda x: x)
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        found = train(name, lambda x, mesh=mesh: jax.device_put(x, jax.NamedSharding(mesh, jax.P("x"))))
    chex.assert_trees_all_equal(found[1], expected[1])
    chex.assert_trees_all_close(found[0], expected[0], rtol=1e-3, atol=1e-4)
    print(name)
