"""Curvature engines: speed against the paper's scan, distance to the floors, memory, and errors against float64.

Ratios are medians over repetitions in one run, the two sides of a ratio in turn.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from records import Recorder, parser, pin_blas
from rich.progress import Progress
from workloads import Workload, workload

import woodjax as wj
from woodjax import linalg

DAMPINGS = [10.0**-power for power in range(1, 9)]
ENGINES = ("scan", "rank_k", "primal", "dual", "factored")


def seconds(function: Callable[..., Any], *arguments: Any) -> float:
    """Time of one call."""
    start = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    return time.perf_counter() - start


def times(calls: list[tuple[Any, ...]], repeats: int) -> np.ndarray:
    """`[repeats, calls]` seconds of `(function, *arguments)`, in turn, after a call of each that compiles."""
    for call in calls:
        seconds(*call)
    return np.array([[seconds(*call) for call in calls] for _ in range(repeats)])


def matmul_rate(size: int = 2048) -> float:
    """Flops a second of a float32 product of the machine, the best of ten."""
    a = jax.random.normal(jax.random.key(0), (size, size))
    product = jax.jit(lambda x: linalg.contract("ij,jk->ik", x, x))
    return 2 * size**3 / times([(product, a)], 10).min()


def write_rate(size: int) -> float:
    """Bytes a second that the machine writes to a new array of that many bytes, the best of ten."""
    fill = jax.jit(lambda x: jnp.full(size // 4, x))
    return size / times([(fill, 1.0)], 10).min()


def build(engine: str, block_size: int) -> Callable[[Any], wj.Curvature]:
    """Compiled engine."""
    return jax.jit(partial(wj.empirical_fisher, block_size=block_size, damping=0.1, engine=engine))


def answers(engine: str, block_size: int) -> Callable[[Any, Any], Any]:
    """Compiled engine with the diagonal and one product."""

    def run(gradients: Any, vector: Any) -> Any:
        fisher = build(engine, block_size)(gradients)
        return fisher.inverse_diagonal(), fisher.solve(vector)

    return jax.jit(run)


def flops(engine: str, m: int, b: int) -> float:
    """Of one block; the last one with the diagonal and one product."""
    return {
        "scan": 4 * m * b * b,
        "rank_k": 4 * m * b * b + 2 * m * 32 * (b + 32),
        "primal": 2 * m * b * b + 2 * b**3,
        "dual": 3 * m * m * b + 2 * m**3 / 3 + 2 * m * b * b,
        "factored": 2.5 * m * m * b + 2 * m**3 / 3 + 4 * m * b,
    }[engine]


def against_scan(record: Recorder, engine: str, form: str, m: int, b: int, blocks: int, repeats: int) -> None:
    """Two ratios: the time of the scan, one block after another and all blocks by `vmap`, over the engine's."""
    gradients = {"w": jax.random.normal(jax.random.key(0), (m, blocks, b))}
    plain = (jax.jit(jax.vmap(partial(linalg.woodbury_scan, damping=0.1), in_axes=1)), gradients["w"])
    if form == "inverse":
        calls = [plain, *((build(name, b), gradients) for name in ("scan", engine))]
    else:
        calls = [plain, *((answers(name, b), gradients, {"w": jnp.ones((blocks, b))}) for name in ("scan", engine))]
    found = times(calls, repeats)
    config = {
        "form": form,
        "b": b,
        "m": m,
        "blocks": blocks,
        "flops": blocks * flops(engine, m, b),
        "scan_flops": blocks * flops("scan", m, b),
        "bytes": 4 * blocks * (m * b + (b * b if form == "inverse" else 3 * m * b)),
        "seconds": float(np.median(found[:, 2])),
    }
    for column, scan in enumerate(("vmap", "one block at a time")):
        ratio = float(np.median(found[:, column] / found[:, 2]))
        config |= {"scan": scan, "scan_seconds": float(np.median(found[:, column]))}
        record.add("speedup_vs_scan", ratio, "ratio", method=engine, column=None, config=dict(config))


def speed(record: Recorder, quick: bool) -> None:
    """Every engine against the rank-1 scan: the full inverse, and the diagonal with one product."""
    for b, m, blocks in [(64, 256, 64), (512, 100, 2)] if quick else [(64, 1024, 512), (2048, 400, 4), (2048, 400, 1)]:
        for engine in ("rank_k", "primal", *(["dual"] if m < b else [])):
            against_scan(record, engine, "inverse", m, b, blocks, 3 if quick else 5)
        if m < b:
            against_scan(record, "factored", "diagonal_and_product", m, b, blocks, 3 if quick else 5)


def crossovers(record: Recorder, quick: bool) -> None:
    """Seconds of the curvature, its diagonal and one product, over a grid of rows and block sizes."""
    for b in (64, 256) if quick else (32, 128, 512, 2048):
        blocks = max(1, (2**12 if quick else 2**13) // b)
        for part in (0.125, 0.25, 0.5, 0.75, 1, 1.5, 3):
            m = max(4, int(part * b))
            rows = jax.random.normal(jax.random.key(0), (m, blocks, b))
            engines = ("scan", "primal", "dual", "factored")
            found = times([(answers(engine, b), {"w": rows}, {"w": rows[0]}) for engine in engines], 3)
            for engine, value in zip(engines, found.min(axis=0), strict=True):
                config = {"b": b, "m": m, "blocks": blocks}
                record.add("seconds_with_answers", float(value), "s", method=engine, column=None, config=config)


def gradients(record: Recorder, work: Workload, quick: bool) -> float:
    """Per-example gradients against one batch gradient, and against the rate at which memory is written."""
    params, loss_fn = work.params, work.loss_fn
    batch = jax.tree.map(lambda x: x[: work.examples], work.batch)
    mean = jax.jit(jax.grad(lambda p, chunk: jnp.mean(jax.vmap(loss_fn, in_axes=(None, 0))(p, chunk))))
    k = work.microbatch_size
    chunks = [jax.tree.map(lambda x, i=i: x[i : i + k], batch) for i in range(0, work.examples - k + 1, k)]
    whole = jax.tree.map(lambda x: x[: k * len(chunks)], batch)
    rows = partial(wj.per_example_gradients, loss_fn, microbatch_size=k, check=False)
    found = times([(rows, params, whole), (lambda p: [mean(p, chunk) for chunk in chunks], params)], 3 if quick else 5)
    layout = wj.make_layout(params)
    size = 4 * k * len(chunks) * sum(leaf.size for leaf in layout.leaves)
    config = {
        "network": work.name,
        "examples": k * len(chunks),
        "microbatch_size": k,
        "bytes": size,
        "seconds": float(np.median(found[:, 0])),
    }
    ratio = float(np.median(found[:, 0] / found[:, 1]))
    record.add("per_example_over_batch_gradient", ratio, "ratio", method=work.name, column=None, config=config)
    fraction = size / found[:, 0].min() / write_rate(size)
    record.add("write_rate_fraction", float(fraction), "ratio", method=work.name, column=None, config=config)
    return float(np.median(found[:, 0]))


def stage(record: Recorder, work: Workload, gradient_seconds: float, quick: bool) -> None:
    """Whole-network curvature, scores and joint update against the gradients that they are made from."""
    batch = jax.tree.map(lambda x: x[: work.examples], work.batch)
    rows = wj.per_example_gradients(work.loss_fn, work.params, batch, microbatch_size=work.microbatch_size)
    make = jax.jit(partial(wj.low_rank_fisher, damping=1e-5))
    score, update = jax.jit(wj.obs_scores), jax.jit(wj.compensate)
    fisher = make(rows)
    scores = score(work.params, fisher)
    masks = wj.make_masks(scores, 0.9)
    calls = [(make, rows), (score, work.params, fisher), (update, work.params, masks, fisher)]
    found = times(calls, 3 if quick else 5)
    parts = np.median(found, axis=0)
    m, d = work.examples, fisher.layout.num_weights
    names = ("curvature", "scores", "update")
    config = {"network": work.name, "examples": m, "weights": d} | dict(zip(names, map(float, parts), strict=True))
    config |= {"gradients": gradient_seconds, "flops": 3.75 * m * m * d + 2 * m**3, "bytes": 12 * m * d}
    value = float(np.median(found.sum(axis=1)) / gradient_seconds)
    record.add("curvature_over_gradient_time", value, "ratio", method=work.name, column=None, config=config)

    rate, matrix = matmul_rate(), fisher.gradients[:, 0]
    products = {
        "gram": (jax.jit(linalg.gram), (matrix,)),
        "leverage": (
            jax.jit(linalg.dual_inverse_diagonal),
            (matrix, jax.tree.map(lambda x: x[0], fisher.whitener)),
        ),
    }
    for name, (function, arguments) in products.items():
        best = times([(function, *arguments)], 3 if quick else 5).min()
        flops = 1.25 * m * m * d  # the panels of a triangle
        config = {"m": m, "d": d, "flops": flops, "bytes": 4 * m * d, "seconds": best, "flops_a_second": rate}
        record.add("matmul_rate_fraction", flops / best / rate, "ratio", method=name, column=None, config=config)


def path(record: Recorder, work: Workload) -> None:
    """A hundred nested masks with predictions against a hundred joint updates."""
    batch = jax.tree.map(lambda x: x[: work.examples], work.batch)
    rows = wj.per_example_gradients(work.loss_fn, work.params, batch, microbatch_size=work.microbatch_size)
    fisher = wj.low_rank_fisher(rows)
    masks = wj.make_masks(wj.obs_scores(work.params, fisher), 0.9)
    update = jax.jit(lambda p, k, f: wj.predicted_loss_change(wj.compensate(p, k, f), f))
    found = times([(wj.sparsity_path, work.params, fisher), (update, work.params, masks, fisher)], 3)
    config = {"network": work.name, "examples": work.examples, "levels": 100, "seconds": float(found[:, 0].min())}
    value = float(np.median(found[:, 0] / found[:, 1]))
    record.add("path_over_one_update", value, "ratio", method="sparsity_path", column=None, config=config)


def memory(record: Recorder, options: Any, quick: bool) -> None:
    """Peak memory against the estimate, each in a process of its own; and a run with a quarter of it."""
    command = [sys.executable, str(Path(__file__).with_name("peak.py"))]
    command += ["--quick"] if quick else ["--data-dir", str(options.data_dir)]
    for engine in ("factored", "quarter", "primal"):
        # glibc gives every array its own pages, and these back at once: what stands is what is alive.
        exact = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
        done = subprocess.run([*command, engine], capture_output=True, text=True, check=True, env=exact)
        found = json.loads(done.stdout.splitlines()[-1])
        record.add("peak_over_estimate", found.pop("ratio"), "ratio", method=engine, column=None, config=found)


def errors(record: Recorder, work: Workload, quick: bool) -> None:
    """Largest relative error of diagonal and solve against float64, by engine and damping."""
    b, m = (64, 100) if quick else (512, 1000)
    rng = np.random.default_rng(0)
    random = rng.standard_normal((m, b)) * rng.lognormal(0, 2, (m, 1)) * 1e-2  # a few large gradients, as real ones
    batch = jax.tree.map(lambda x: x[:m], work.batch)
    real = wj.per_example_gradients(work.loss_fn, work.params, batch, microbatch_size=64, check=False)
    blocks = wj.make_layout(work.params, block_size=b).to_blocks(real)
    busiest = int(jnp.argmax(jnp.sum(blocks**2, axis=(0, 2))))
    for kind, rows in (("random", random.astype(np.float32)), ("real", np.asarray(blocks[:, busiest]))):
        exact, vector = rows.astype(np.float64), rng.standard_normal(b)
        tree = {"w": jnp.asarray(rows)[:, None]}
        largest = np.linalg.eigvalsh(exact.T @ exact / len(exact))[-1]
        for damping in DAMPINGS[::3] if quick else DAMPINGS:
            inverse = np.linalg.inv(damping * np.eye(b) + exact.T @ exact / len(exact))
            for engine in ENGINES:
                fisher = wj.empirical_fisher(tree, block_size=b, engine=engine, damping=damping)
                diagonal = np.asarray(fisher.inverse_diagonal()["w"])[0]
                solved = np.asarray(fisher.solve({"w": jnp.asarray(vector, jnp.float32)[None]})["w"])[0]
                config = {"b": b, "m": m, "gradients": kind, "damping": damping, "largest_eigenvalue": largest}
                config["raised_to"] = float(fisher.damping.max())
                for metric, ours, expected in (
                    ("diagonal_error", diagonal, np.diag(inverse)),
                    ("solve_error", solved, inverse @ vector),
                ):
                    scale = np.abs(expected) if metric == "diagonal_error" else np.abs(expected).max()
                    value = float(np.max(np.abs(ours - expected) / scale))
                    record.add(metric, value, "relative", method=engine, column=None, config=config)


def main() -> int:
    """Run all parts."""
    options = parser(__doc__.splitlines()[0])
    parts = ("speed", "crossovers", "gradients", "memory", "path", "errors")
    options.add_argument("--only", nargs="+", choices=parts, default=parts, help="parts to run")
    args = options.parse_args()
    pin_blas()
    if not args.quick and args.data_dir is None:
        options.error("--data-dir with MNIST, CIFAR-10 and checkpoints is needed without --quick")
    record = Recorder(args.json, "engines", "mlpnet, resnet20", "random" if args.quick else "mnist, cifar10-subset")
    mlp = workload("mlpnet", args.data_dir, args.quick)
    with Progress() as bars:
        bar = bars.add_task("engines", total=len(args.only))
        for part in args.only:
            bars.update(bar, description=part)
            if part == "speed":
                speed(record, args.quick)
            elif part == "crossovers":
                crossovers(record, args.quick)
            elif part == "gradients":
                gradients(record, mlp, args.quick)
                residual = workload("resnet20", args.data_dir, args.quick)
                if not args.quick:
                    gradients(record, residual._replace(examples=512), args.quick)
                stage(record, residual, gradients(record, residual, args.quick), args.quick)
            elif part == "memory":
                memory(record, args, args.quick)
            elif part == "path":
                path(record, mlp)
            else:
                errors(record, mlp, args.quick)
            bars.advance(bar)
    return 0


if __name__ == "__main__":
    sys.exit(main())
