"""Texts of small programs with known collectives on 8 simulated devices: `python collectives_job.py OUT.json`.

Run by `test_collectives`, which reads them.
"""

import json
import sys
from pathlib import Path

if __name__ == "__main__":  # doctests of this folder are collected by importing it
    import jax

    jax.config.update("jax_num_cpu_devices", 8)
    import jax.numpy as jnp
    from jax import lax
    from jax.sharding import AxisType, PartitionSpec

    P = PartitionSpec
    eight = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    four = jax.make_mesh((4,), ("x",), devices=jax.devices()[:4], axis_types=(AxisType.Auto,))
    square = jax.make_mesh((2, 2), ("data", "block"), devices=jax.devices()[:4], axis_types=(AxisType.Auto,) * 2)
    wide = jax.make_mesh((2, 4), ("data", "block"), axis_types=(AxisType.Auto,) * 2)
    X = jnp.ones((8, 16))  # 512 bytes

    def reduced(x):
        return lax.psum(x, "x") / 8

    def nested(x):
        def outer(c, _):
            return lax.scan(lambda c, _: (reduced(c), None), c, None, length=3)[0] + 1, None

        return reduced(lax.scan(outer, x, None, length=5)[0])

    def inside_the_condition(x):
        step = lambda s: (s[0] + 1, 0.5 * s[1])
        return lax.while_loop(lambda s: (s[0] < 6) & (lax.psum(s[1], "x")[0, 0] < 9), step, (0, x))[1]

    def branches(x):
        few = lambda c: lax.fori_loop(0, 3, lambda i, s: reduced(s[:, :8]).repeat(2, 1), c)
        return lax.cond(x[0, 0] > 0, reduced, few, x)

    def cycle(n):
        return [(i, (i + 1) % n) for i in range(n)]

    def shuffled(x):
        return lax.all_to_all(x, ("data", "block"), 1, 0, tiled=True)

    def dynamic(x, n):
        return lax.fori_loop(0, n, lambda i, c: reduced(c), x)

    CASES = {
        "psum over 8": (eight, lambda x: lax.psum(x, "x"), P("x"), P()),
        "psum over data of 2x2": (square, lambda x: lax.psum(x, "data"), P("data"), P()),
        "psum over block of 2x4": (wide, lambda x: lax.psum(x, "block"), P(None, "block"), P()),
        "psum over both of 2x4": (wide, lambda x: lax.psum(x, ("data", "block")), P("data", "block"), P()),
        "pmax of a few": (four, lambda x: lax.pmax(x[0, :1], "x"), P("x"), P()),
        "psum of a tuple": (
            eight,
            lambda x: lax.psum((x, x[:, :3].astype(jnp.int32), x.astype(jnp.float16)), "x"),
            P("x"),
            P(),
        ),
        "all_gather over data of 2x4": (wide, lambda x: lax.all_gather(x, "data", tiled=True), P("data"), P()),
        "all_gather of bool": (eight, lambda x: lax.all_gather(x > 0, "x", tiled=True), P("x"), P()),
        "psum_scatter over 4": (
            four,
            lambda x: lax.psum_scatter(x, "x", scatter_dimension=1, tiled=True),
            P("x"),
            P(None, "x"),
        ),
        "psum_scatter over block of 2x4": (
            wide,
            lambda x: lax.psum_scatter(x, "block", scatter_dimension=1, tiled=True),
            P("block"),
            P(None, "block"),
        ),
        "all_to_all over block of 2x4": (
            wide,
            lambda x: lax.all_to_all(x, "block", 1, 0, tiled=True),
            P("block"),
            P(None, "block"),
        ),
        "all_to_all over both of 2x4": (wide, shuffled, P(("data", "block")), P(None, ("data", "block"))),
        "ppermute over 8": (eight, lambda x: lax.ppermute(x, "x", cycle(8)), P("x"), P("x")),
        "ppermute over block of 2x2": (square, lambda x: lax.ppermute(x, "block", cycle(2)), P("block"), P("block")),
        "nested scans": (eight, nested, P("x"), P("x")),
        "fori_loop": (eight, lambda x: lax.fori_loop(2, 9, lambda i, c: reduced(c), x), P("x"), P("x")),
        "fori_loop of unknown length": (eight, dynamic, (P("x"), P()), P("x")),
        "in the condition of a loop": (eight, inside_the_condition, P("x"), P("x")),
        "cond": (eight, branches, P("x"), P("x")),
        "nothing": (eight, lambda x: 2 * x, P("x"), P("x")),
    }

    # The communication of a pruning as the cost model has it, without its arithmetic: rows, weights, and a block.
    m, d, b = 8, 256, 4
    both = ("data", "block")
    ROWS, WEIGHTS = jnp.ones((m, d)), jnp.ones(d)

    def reductions(rows, weights):
        gram = lax.psum(rows @ rows.T, both)
        scale = lax.psum(jnp.stack([jnp.vdot(rows, rows), jnp.sum(weights)]), both)
        counts = lambda i, level: lax.psum(jnp.sum(weights > level, dtype=jnp.int32), both).astype(jnp.float32)
        level = lax.fori_loop(0, 65, counts, scale[0])
        return gram, level

    def back(weights, level):
        gather = lambda x: lax.all_gather(x, "data", tiled=True)
        return gather(weights), gather(jnp.where(weights > level, 2 * weights, 0))

    def by_columns(rows, weights):
        owned = lax.all_to_all(rows, "data", 1, 0, tiled=True)
        gram, level = reductions(owned, weights)
        kept = jnp.where(weights > level, owned, 0)
        again = lax.psum(kept @ kept.T, both)
        coefficients = lax.psum(kept @ weights, both)
        return back(weights + coefficients @ gram @ again @ owned, level)

    def by_sums(rows, weights):
        blocks = rows.reshape(rows.shape[0], -1, b)
        sums = lax.psum_scatter(jnp.einsum("mnb,mnc->nbc", blocks, blocks), "data", tiled=True)
        counted = sums.sum(2).reshape(-1)
        _, level = reductions(jnp.zeros((1, 1)), counted + weights)
        return back(counted + weights, level)

    spread = (P("data", "block"), P(("block", "data")))
    CASES["by columns"] = (wide, by_columns, spread, P("block"))
    CASES["by sums"] = (wide, by_sums, spread, P("block"))

    ARGUMENTS = {
        "fori_loop of unknown length": (X, jnp.int32(3)),
        "by columns": (ROWS, WEIGHTS),
        "by sums": (ROWS, WEIGHTS),
    }
    texts = {}
    for name, (mesh, function, inputs, outputs) in CASES.items():
        sharded = jax.shard_map(function, mesh=mesh, in_specs=inputs, out_specs=outputs, check_vma=False)
        arguments = ARGUMENTS.get(name, (X,))
        texts[name] = jax.jit(sharded).lower(*arguments).compile().as_text()

    # Not written by hand: what the partitioner makes of a product whose contraction is sharded.
    sharding = jax.NamedSharding(square, P(None, "data")), jax.NamedSharding(square, P("data", "block"))
    product = jax.jit(jnp.matmul, in_shardings=sharding, out_shardings=jax.NamedSharding(square, P()))
    texts["partitioned matmul"] = product.lower(X, jnp.ones((16, 4))).compile().as_text()
    Path(sys.argv[1]).write_text(json.dumps(texts))
