"""Pruning over several processes against one device: every stage, in several layouts.

On this machine `python benchmarks/multihost.py --processes 2 --devices 2 --json OUT` starts the processes over
localhost. On a cluster every process runs `python benchmarks/multihost.py --json OUT`: where `jax.distributed` finds
its coordinator by itself (Slurm, Open MPI, Kubernetes, TPU pods), nothing more is needed; elsewhere pass
`--coordinator HOST:PORT`, `--processes` and `--process-id`.

The damping is 1 times the mean diagonal, so that float32 is not amplified; `--x64` shows what is rounding.
"""

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from processes import free_port, run_processes
from records import Recorder

import woodjax as wj

P = PartitionSpec
SPARSITY, CLASSES, HEARTBEAT = 0.5, 4, 30
CURVATURES = {
    "low rank": partial(wj.low_rank_fisher, damping=wj.Relative(1.0)),
    "blocks": partial(wj.block_fisher, block_size=16, damping=wj.Relative(1.0)),
}


class Layout(NamedTuple):
    """Where kernels lie; biases are replicated, examples are split along `data`."""

    axes: tuple[str, ...]
    first: PartitionSpec
    second: PartitionSpec


LAYOUTS = {
    "replicated": Layout(("data",), P(), P()),
    "fsdp": Layout(("data",), P("data"), P("data")),
    "data x model": Layout(("data", "model"), P(None, "model"), P("model")),
}


def loss_fn(params: Any, example: Any) -> jax.Array:
    """Cross-entropy of one example."""
    inputs, label = example
    hidden = jnp.tanh(inputs @ params["first"] + params["bias"])
    return -jax.nn.log_softmax(hidden @ params["second"])[label]


class Problem(NamedTuple):
    """Sizes, in multiples of the number of devices; every example and weight is a function of its index."""

    inputs: int
    hidden: int
    examples: int
    dtype: Any

    def params(self) -> Any:
        """The whole network, on the host."""
        rng = np.random.default_rng(0)
        first = rng.normal(size=(self.inputs, self.hidden)) / np.sqrt(self.inputs)
        second = rng.normal(size=(self.hidden, CLASSES)) / np.sqrt(self.hidden)
        weights = {"first": first, "bias": np.zeros(self.hidden), "second": second}
        return {name: w.astype(self.dtype) for name, w in weights.items()}

    def rows(self, indices: Any) -> Any:
        """Some examples: a process makes its own only."""
        drawn = [np.random.default_rng([1, index]) for index in indices]
        inputs = np.stack([rng.normal(size=self.inputs) for rng in drawn]).astype(self.dtype)
        return inputs, np.array([rng.integers(CLASSES) for rng in drawn], np.int32)


def placed(problem: Problem, layout: Layout) -> tuple[Any, Any]:
    """Parameters and batch on all devices of all processes."""
    shape = (jax.device_count(),) if len(layout.axes) == 1 else (jax.device_count() // 2, 2)
    mesh = jax.make_mesh(shape, layout.axes, axis_types=(AxisType.Auto,) * len(shape))
    specs = {"first": layout.first, "bias": P(), "second": layout.second}
    params = {name: _on(mesh, specs[name], w) for name, w in problem.params().items()}
    split = NamedSharding(mesh, P("data"))
    own = split.addressable_devices_indices_map((problem.examples,)).values()
    indices = np.unique(np.concatenate([np.arange(problem.examples)[index] for index in own]))
    rows = problem.rows(indices)
    batch = jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(split, x, (problem.examples, *x.shape[1:])), rows
    )
    return params, batch


def _on(mesh: Mesh, spec: PartitionSpec, array: np.ndarray) -> jax.Array:
    return jax.make_array_from_callback(array.shape, NamedSharding(mesh, spec), lambda index: array[index])


class Found(NamedTuple):
    """Of every stage that was run."""

    results: dict[str, Any]
    seconds: dict[str, float]  # with compilation

    def run(self, name: str, function: Callable[[], Any]) -> Any:
        """Run a stage."""
        start = time.perf_counter()
        self.results[name] = jax.block_until_ready(function())
        self.seconds[name] = time.perf_counter() - start
        return self.results[name]


def one_by_one(curvature: Callable[[Any], Any], params: Any, batch: Any) -> Found:
    """Gradients, curvature and scores, masks, updates."""
    found = Found({}, {})
    gradients = found.run("gradients", lambda: wj.per_example_gradients(loss_fn, params, batch, microbatch_size=None))
    fisher = curvature(gradients)
    scores = found.run("scores", lambda: wj.obs_scores(params, fisher))
    masks = found.run("masks", lambda: wj.make_masks(scores, SPARSITY))
    found.run("update", lambda: wj.compensate(params, masks, fisher))
    return found


def in_a_row(curvature: Callable[[Any], Any], params: Any, batch: Any) -> Found:
    """All of them by one call, twice: what is pruned first leaves the problem."""
    found, options = Found({}, {}), wj.FIXED | {"stages": 2}
    prune = partial(wj.prune_one_shot, loss_fn, params, batch, SPARSITY, curvature=curvature, **options)
    found.run("one shot", lambda: prune()[:2])
    return found


class Case(NamedTuple):
    """What is run where."""

    curvature: str
    layout: str
    run: Callable[[Callable[[Any], Any], Any, Any], Found]


# Blocks do not cross the shards of a leaf: split along its last axis they are others than those of one device.
ALL = [
    Case(curvature, layout, run)
    for curvature, layouts in (("low rank", LAYOUTS), ("blocks", ("replicated", "fsdp")))
    for layout in layouts
    for run in (one_by_one, in_a_row)
]
QUICK = [Case("low rank", "fsdp", in_a_row), Case("blocks", "replicated", one_by_one)]


def on_host(tree: Any) -> Any:
    """Whole arrays in every process."""

    def whole(x: Any) -> np.ndarray:
        if isinstance(x, jax.Array) and not x.is_fully_replicated:
            return np.asarray(multihost_utils.process_allgather(x, tiled=True))
        return np.asarray(x)

    return jax.tree.map(whole, tree)


def difference(ours: Any, theirs: Any) -> float:
    """Largest difference of any leaf, relative to its largest entry; entries that differ in being finite count as 1."""

    def of_leaf(a: np.ndarray, b: np.ndarray) -> float:
        finite = np.isfinite(b)
        if not np.array_equal(a[~finite], b[~finite]):
            return 1.0
        a, b = a[finite].astype(np.float64), b[finite].astype(np.float64)
        return float(np.max(np.abs(a - b), initial=0) / max(np.max(np.abs(b), initial=0), 1e-30))

    return float(np.max(jax.tree.leaves(jax.tree.map(of_leaf, ours, theirs))))  # NaN stays NaN


def work(args: argparse.Namespace) -> None:
    """One process: all layouts over all devices, and then, in the first process alone, one device."""
    count = jax.device_count()
    scale = count if args.quick else 8 * count
    dtype = np.float64 if args.x64 else np.float32
    problem = Problem(2 * scale, 4 * scale, 16 * count if args.quick else 64 * count, dtype)
    cases = QUICK if args.quick else ALL
    found = [on_host(case.run(CURVATURES[case.curvature], *placed(problem, LAYOUTS[case.layout]))) for case in cases]
    if jax.process_index() > 0:
        return
    recorder = Recorder(args.json, "multihost", "mlp", "noise")
    everything = problem.params(), problem.rows(range(problem.examples))
    alike = dict.fromkeys((case.curvature, case.run) for case in cases)
    one = {(name, run): on_host(run(CURVATURES[name], *everything)) for name, run in alike}
    for case, ours in zip(cases, found, strict=True):
        theirs = one[case.curvature, case.run]
        config = {"layout": case.layout, "processes": jax.process_count(), "devices": count}
        config |= {"weights": sum(w.size for w in problem.params().values()), "examples": problem.examples}
        config |= {"dtype": np.dtype(dtype).name}
        for stage, result in ours.results.items():
            far, seconds = difference(result, theirs.results[stage]), float(ours.seconds[stage])
            add = partial(recorder.add, method=case.curvature, column=stage, sparsity=SPARSITY, config=config)
            add("max_difference", far, "")
            add("wall", seconds, "s")
            print(f"{case.curvature}, {case.layout}, {stage}: {far:.1e}, {seconds:.1f} s", flush=True)


def start(args: argparse.Namespace) -> int:
    """Start the processes of this machine, and show what those that failed have said."""
    where = ["--coordinator", f"127.0.0.1:{free_port()}"]
    commands = [[*sys.argv, *where, "--process-id", str(number)] for number in range(args.processes)]
    ended = run_processes(commands, devices=args.devices or 1, timeout=args.timeout)
    print(ended[0].output, end="")
    failed = [number for number, one in enumerate(ended) if one.returncode]
    for number in failed:
        said = ended[number].output[-4000:]
        print(f"Process {number} ended with {ended[number].returncode}:\n{said}", file=sys.stderr)
    return 1 if failed else 0


def main() -> int:
    """Start processes, or be one."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--json", type=Path, required=True, help="JSON lines are appended here, by process 0")
    options.add_argument("--quick", action="store_true", help="small, and not all layouts")
    options.add_argument("--x64", action="store_true", help="float64")
    options.add_argument("--processes", type=int, help="how many; without --process-id they are started here")
    options.add_argument("--devices", type=int, help="simulated devices of each process, on CPU")
    options.add_argument("--process-id", type=int)
    options.add_argument("--coordinator", help="HOST:PORT of process 0")
    options.add_argument("--timeout", type=float, default=600, help="seconds, for processes that are started here")
    args = options.parse_args()
    if args.processes is not None and args.process_id is None:
        return start(args)
    if args.devices is not None:
        jax.config.update("jax_num_cpu_devices", args.devices)
        jax.config.update("jax_cpu_enable_async_dispatch", False)
    jax.config.update("jax_enable_x64", args.x64)
    jax.distributed.initialize(args.coordinator, args.processes, args.process_id, heartbeat_timeout_seconds=HEARTBEAT)
    with wj.fail_together():
        work(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
