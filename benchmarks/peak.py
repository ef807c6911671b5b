"""Peak memory of one engine, in a process of its own: one line of JSON. Started by `engines.py`."""

import argparse
import ctypes
import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from workloads import Workload, workload

import woodjax as wj

STATUS = Path("/proc/self/status")


def resident(field: str) -> int:
    """`VmRSS` or `VmHWM`, in bytes."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


def peak(function: Callable[[], Any]) -> int:
    """Bytes that a second call takes at its highest, above what stood before it; the first one compiles."""
    jax.block_until_ready(function())
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins again
    before = resident("VmRSS")
    jax.block_until_ready(function())
    return resident("VmHWM") - before


def answers(work: Workload, **options: Any) -> Callable[[], Any]:
    """Curvature, diagonal and joint update from a stream."""
    batch = jax.tree.map(lambda x: x[: work.examples], work.batch)
    stream = wj.stream_gradients(work.loss_fn, work.params, batch, microbatch_size=work.microbatch_size)
    weights = wj.magnitude_scores(work.params)
    masks = wj.make_masks(weights, 0.5)

    def run() -> Any:
        fisher = wj.empirical_fisher(stream, damping=1e-4, **options)
        return fisher.inverse_diagonal(), wj.compensate(work.params, masks, fisher)

    return run, wj.estimate(stream, **options)


def difference(ours: Any, theirs: Any) -> float:
    """Largest difference between two pairs of trees, relative to the largest entry of each."""
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    return float(np.max([np.abs(a - b).max() / max(np.abs(b).max(), 1e-30) for a, b in pairs]))  # NaN stays NaN


def main() -> int:
    """Measure."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("engine", choices=["factored", "quarter", "primal"])
    options.add_argument("--data-dir", type=Path)
    options.add_argument("--quick", action="store_true")
    args = options.parse_args()
    work = workload("mlpnet", args.data_dir, args.quick)
    work = work._replace(examples=1000, microbatch_size=32)
    if args.engine == "primal":
        run, plan = answers(work, block_size=256 if args.quick else 1024, engine="primal")
        found = peak(run)
        extra = {}
    elif args.engine == "factored":
        run, plan = answers(work)
        found, extra = peak(run), {}
    else:
        whole, full = answers(work)
        run, plan = answers(work, memory_budget=full.peak_bytes // 4)
        found = peak(run)
        extra = {"of_whole": found / full.peak_bytes, "largest_difference": difference(run(), whole())}
        extra |= {"window": plan.window_size}
    result = {"ratio": found / plan.peak_bytes, "peak_bytes": found, "estimate_bytes": plan.peak_bytes, **extra}
    result |= {"engine": plan.engine, "passes": plan.passes, "network": work.name, "examples": work.examples}
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
