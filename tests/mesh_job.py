"""Every program of a pruning of fully sharded parameters, written out by XLA: `python mesh_job.py FOLDER`.

Run by `test_mesh_pruning`, which reads what they send between devices.
"""

import os
import sys

if __name__ == "__main__":  # doctests of this folder are collected by importing it
    os.environ["XLA_FLAGS"] = f"--xla_dump_to={sys.argv[1]} --xla_dump_hlo_as_text --xla_dump_hlo_module_re=.*"
    os.environ["JAX_NUM_CPU_DEVICES"] = "8"
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    os.environ["JAX_CPU_ENABLE_ASYNC_DISPATCH"] = "false"

    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    import woodjax as wj

    P = PartitionSpec
    mesh = jax.make_mesh((2, 4), ("data", "block"), axis_types=(AxisType.Auto,) * 2)
    rng = np.random.default_rng(0)

    def put(array, *spec):
        return jax.device_put(array.astype(np.float32), NamedSharding(mesh, P(*spec)))

    # Gradients are the examples: nothing of a model's own is sent.
    params = {
        "a": put(rng.normal(size=(64, 256)), "data", "block"),
        "c": put(rng.normal(size=(256, 64)), "block", "data"),
    }
    batch = {name: put(rng.normal(size=(16, *w.shape)), "data") for name, w in params.items()}

    def loss(params, example):
        return sum(jnp.sum(params[name] * example[name]) for name in params)

    gradients = wj.per_example_gradients(loss, params, batch, microbatch_size=8)
    for curvature in (
        wj.low_rank_fisher(gradients, damping="auto"),
        wj.block_fisher(gradients, block_size=16),
        wj.diagonal_curvature(params),
    ):
        masks = wj.make_masks(wj.obs_scores(params, curvature), 0.5, floor=0.1)
        updates = wj.compensate(params, masks, curvature, gradient=params)
        wj.compensate(params, masks, curvature, method="sum")
        wj.predicted_loss_change(updates, curvature)
    wj.sparsity_path(params, wj.low_rank_fisher(gradients), [0.5])
    wj.exact_obs(params, wj.block_fisher(gradients, block_size=16), 0.5)
    stream = wj.stream_gradients(loss, params, batch, microbatch_size=8)
    wj.obs_scores(params, wj.streamed_fisher(stream, window_size=1024))
    wj.BlockSums.init(params, block_size=2).add(gradients).finalize()
    wj.prune_one_shot(loss, params, batch, 0.5, **wj.FIXED)
