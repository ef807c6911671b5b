"""A pruning by two processes: `python processes_job.py PORT PROCESS FOLDER KILL`; process 1 is killed after stage KILL.

Started again it goes on from the last stage, and is compared with a run that nothing stopped.
"""

import os
import signal
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import woodjax as wj

HEARTBEAT = 10  # seconds without a sign of life after which a process counts as dead
BLOCKS = partial(wj.block_fisher, block_size=8, damping=wj.Relative(1.0))


def loss_fn(params, example):
    inputs, label = example
    return -jax.nn.log_softmax(jnp.tanh(inputs @ params["w"]) @ params["v"])[label]


def network():
    rng = np.random.default_rng(0)
    return {"w": rng.normal(size=(8, 16)).astype(np.float32), "v": rng.normal(size=(16, 4)).astype(np.float32)}


def examples():
    rng = np.random.default_rng(1)
    return rng.normal(size=(48, 8)).astype(np.float32), rng.integers(0, 4, 48).astype(np.int32)


def prune(params, batch, stages=3, **options):
    fixed = wj.FIXED | {"stages": stages, "curvature": BLOCKS, "examples_per_stage": 32}
    return wj.prune_one_shot(loss_fn, params, batch, 0.6, key=jax.random.key(2), **fixed, **options)


def placed():
    """Kernels and examples over the devices of all processes, each of which holds a part."""
    split = NamedSharding(jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,)), P("data"))
    put = lambda x: jax.make_array_from_process_local_data(split, np.split(x, 2)[jax.process_index()])
    return jax.tree.map(put, (network(), examples()))


def bits(tree):
    """What this process holds of it."""
    shards = [shard for x in jax.tree.leaves(tree) for shard in jnp.asarray(x).addressable_shards]
    return [np.asarray(shard.data).tobytes() for shard in shards]


def main(port, process, folder, kill):
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, process, heartbeat_timeout_seconds=HEARTBEAT)
    params, batch = placed()
    with wj.StageCheckpoints(folder, params) as saved:

        def on_stage(stage):
            saved.save(stage)
            print("saved", len(stage.infos), flush=True)
            if process == 1 and len(stage.infos) == kill:
                os.kill(os.getpid(), signal.SIGKILL)

        last = saved.last()
        print("from", 0 if last is None else len(last.infos), flush=True)
        resumed = prune(params, batch, on_stage=on_stage, resume=last)
    assert bits(resumed) == bits(prune(params, batch))
    print("the same bits", flush=True)


if __name__ == "__main__":
    with wj.fail_together():
        main(sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
