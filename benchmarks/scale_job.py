"""One measurement of `scale.py` in a process of its own: one line of JSON.

    python scale_job.py wire LAYOUT CURVATURE WIDTH EXAMPLES FOLDER
    python scale_job.py curve WIDTH EXAMPLES

The first reads every program that was compiled from XLA's own dumps (`XLA_FLAGS=--xla_dump_to=FOLDER`).
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
from peak import peak
from scale_cases import CURVATURES, LAYOUTS, network, place, prune

import woodjax as wj

OWN = "jit__vmap_rows"  # the gradients: what the model sends is its own


def wire(layout_name: str, curvature: str, width: int, examples: int, folder: Path) -> dict[str, Any]:
    """Bytes that every program sends, as compiled, and whether it gathers something as large as a kernel."""
    layout = LAYOUTS[layout_name]
    placed = place(layout, *network(width, examples))
    before = set(folder.iterdir())
    result = prune(*placed, CURVATURES[curvature])
    jax.block_until_ready(result)
    sent, gathers, own, largest = 0.0, 0, 0.0, 0
    smallest = min(4 * leaf.size for leaf in jax.tree.leaves(placed[0]))
    for file in sorted(set(folder.iterdir()) - before):
        if not file.name.endswith("cpu_after_optimizations.txt"):
            continue
        found = wj.collectives(file.read_text())
        total = sum(map(wj.wire_bytes, found))
        of_model = f".{OWN}." in file.name
        own, sent = (own + total, sent) if of_model else (own, sent + total)
        if of_model and layout.axes == ("data",):
            continue  # FSDP: the model gathers its weights to compute a gradient
        for one in found:
            if one.kind in ("all-gather", "all-reduce", "collective-broadcast"):
                largest = max(largest, one.result_bytes)
                gathers += one.result_bytes >= smallest
    return {"wire_bytes": sent, "gathers": gathers, "largest_gather": largest, "gradient_bytes": own}


def curve(width: int, examples: int) -> dict[str, Any]:
    """Seconds and peak memory of one pruning, from gradients to update, on one device."""
    params, batch = network(width, examples)

    def run() -> Any:
        result = prune(params, batch, CURVATURES["whole network"])
        return result["masks"], result["updates"]

    memory = peak(run)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return {"weights": sum(w.size for w in jax.tree.leaves(params)), "peak_bytes": memory, "seconds": min(times)}


def main() -> int:
    """Measure."""
    job, *rest = sys.argv[1:]
    if job == "wire":
        layout, curvature, width, examples, folder = rest
        jax.config.update("jax_num_cpu_devices", LAYOUTS[layout].devices)
        jax.config.update("jax_cpu_enable_async_dispatch", False)
        print(json.dumps(wire(layout, curvature, int(width), int(examples), Path(folder))))
    else:
        print(json.dumps(curve(*map(int, rest))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
