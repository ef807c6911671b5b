"""A training that prunes and saves as it goes: `python resume_job.py ROUTE FOLDER STEP` is killed after that step.

Started again it goes on from its last checkpoint.
"""

import hashlib
import os
import signal
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp

import woodjax as wj

SCHEDULE = wj.cubic_schedule(begin=2, end=14, every=4, target=0.8)
STEPS = 18


def loss_fn(params, example):
    x, y = example
    return (jnp.tanh(x @ params["w"]) @ params["v"] - y) ** 2


def examples(step):
    x = jax.random.normal(jax.random.fold_in(jax.random.key(1), step), (8, 6))
    return x, jnp.sin(x.sum(1))


def transform(route):
    window = wj.gradient_window(6, dtype=jnp.bfloat16, memory_budget=3 * 2 * 24) if route == "D" else None
    return wj.prune_transform(optax.adamw(1e-2), schedule=SCHEDULE, fisher=window)


def train(route, folder, kill=None):
    """Returns a digest of everything at the end, how much of `w` is pruned, and where it went on from."""
    tx = transform(route)
    params = {"w": jax.random.normal(jax.random.key(0), (6, 4)), "v": jnp.ones(4)}
    network = {"params": params, "opt_state": tx.init(params)}

    @jax.jit
    def step(network, batch):
        mean = lambda p: jnp.mean(jax.vmap(loss_fn, in_axes=(None, 0))(p, batch))
        updates, state = tx.update(jax.grad(mean)(network["params"]), network["opt_state"], network["params"])
        return {"params": optax.apply_updates(network["params"], updates), "opt_state": state}

    with ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(save_interval_steps=3)) as manager:
        last = manager.latest_step()
        if last is not None:
            network = manager.restore(last, args=ocp.args.StandardRestore(network))
        for number in range(0 if last is None else last + 1, STEPS):
            network = step(network, examples(number))
            if route == "A" and SCHEDULE.due(number):
                pruned, state, _ = wj.refresh(
                    network["params"], network["opt_state"], examples(number), SCHEDULE(number), loss_fn=loss_fn
                )
                network = {"params": pruned, "opt_state": state}
            manager.save(number, args=ocp.args.StandardSave(network))
            manager.wait_until_finished()
            if number == kill:
                os.kill(os.getpid(), signal.SIGKILL)
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(network):
        digest.update(jnp.asarray(leaf).tobytes())
    masks = wj.get_masks(network["opt_state"])
    return digest.hexdigest(), int((~masks["w"]).sum()), last


if __name__ == "__main__":
    train(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
