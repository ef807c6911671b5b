"""Pruning on many devices: the same numbers as on one, bytes sent, nothing gathered; and how the cost grows.

    python benchmarks/scale.py --json OUT.jsonl

Devices are simulated on this CPU, so times say nothing about them: what is measured of them is what they compute and
what they send, read from the compiled programs. Time and memory are those of one device. `--quick` takes smaller
networks. Two processes are those of `multihost.py`, which is started here and adds records of its own.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from records import Recorder, parser, pin_blas, seeds
from scale_cases import CURVATURES, LAYOUTS, SPARSITY, network, place, prune

import woodjax as wj

HERE = Path(__file__).parent
EXAMPLES, FEW = 128, 8
THREADS = "64"  # of XLA, so that devices on one CPU do not wait for each other's
WIRE_WIDTH = 64
ROWS = 16  # of the curve over sizes


def difference(ours: Any, theirs: Any) -> float:
    """Largest difference between two trees, relative to the largest entry of each leaf."""
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    return max(float(np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(np.asarray(b)).max()) for a, b in pairs)


def equality(record: Recorder, width: int, seed: int, quick: bool) -> None:
    """Every stage on every layout against one device."""
    for x64 in (False, True):
        jax.config.update("jax_enable_x64", x64)
        params, batch = network(width, EXAMPLES, seed)
        for name, curvature in list(CURVATURES.items())[: 1 if x64 and quick else None]:
            alone = prune(params, batch, curvature)
            for layout_name, layout in LAYOUTS.items():
                found = prune(*place(layout, params, batch), curvature)
                masks = sum(
                    int(np.sum(np.asarray(a) != np.asarray(b)))
                    for a, b in zip(jax.tree.leaves(found["masks"]), jax.tree.leaves(alone["masks"]), strict=True)
                )
                config = {"layout": layout_name, "x64": x64, "masks_that_differ": masks, "width": width}
                config |= {
                    stage: difference(found[stage], alone[stage]) for stage in ("gradients", "scores", "updates")
                }
                largest = max(config["scores"], config["updates"])
                record.add(
                    "max_difference", largest, "ratio", method=name, column="update", sparsity=SPARSITY, seed=seed,
                    config=config,
                )  # fmt: skip
                print(f"{layout_name}, {name}, {'64' if x64 else '32'} bits: {largest:.1e}, masks {masks}", flush=True)
    jax.config.update("jax_enable_x64", False)


def child(*arguments: object, environment: dict[str, str] | None = None) -> dict[str, Any]:
    """A measurement in a process of its own."""
    done = subprocess.run(
        [sys.executable, str(HERE / "scale_job.py"), *map(str, arguments)],
        env={name: value for name, value in os.environ.items() if name != "NPROC"} | (environment or {}),
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def wires(record: Recorder, cases: list[tuple[str, str]]) -> None:
    """Bytes sent against the cost model, and gathers."""
    d = sum(leaf.size for leaf in jax.tree.leaves(network(WIRE_WIDTH, 1)[0]))
    for layout_name, curvature in cases:
        layout = LAYOUTS[layout_name]
        found = compiled(layout_name, curvature, WIRE_WIDTH, EXAMPLES)
        block_size = None if curvature == "whole network" else CURVATURES[curvature].keywords["block_size"]
        split = any(layout.kernels)
        fsdp = split and "block" not in layout.axes
        cost = wj.scaling_cost(
            d, EXAMPLES, layout.devices, wj.TPU_V5E, data_devices=layout.data_devices, block_size=block_size,
            replicas=1 if fsdp else layout.data_devices if split else layout.devices,
        )  # fmt: skip
        config = {"layout": layout_name, "weights": d, "model_bytes": cost.wire_bytes} | found
        # FSDP: the exchange is part of the program of the gradients, beside what the model itself gathers.
        if not fsdp:
            ratio = found["wire_bytes"] / cost.wire_bytes
            record.add("collective_bytes_ratio", ratio, "ratio", method=curvature, column=None, config=config)
            print(f"{layout_name}, {curvature}: {ratio:.3f} of the model's {cost.wire_bytes:,.0f} bytes", flush=True)
        if fsdp or layout.data_devices == 1:  # every parameter on one device only: nothing may be gathered
            few = compiled(layout_name, curvature, 2 * WIRE_WIDTH, FEW)  # Gram matrices are smaller than a kernel
            config = {"layout": layout_name, "rows": FEW, "largest": few["largest_gather"]}
            gathers = few["gathers"]
            record.add("parameter_gathers", gathers, "count", method=curvature, column=None, config=config)
            print(f"{layout_name}, {curvature}: {gathers} gathers", flush=True)


def compiled(layout_name: str, curvature: str, width: int, examples: int) -> dict[str, Any]:
    """What the programs of a pruning send, from XLA's dumps of them."""
    with tempfile.TemporaryDirectory() as folder:
        flags = {"XLA_FLAGS": f"--xla_dump_to={folder} --xla_dump_hlo_as_text", "NPROC": THREADS}
        return child("wire", layout_name, curvature, width, examples, folder, environment=flags)


def curves(record: Recorder, widths: list[int], rows: list[int]) -> None:
    """Time and memory against the weights, and against the rows."""
    for axis, cases in (("weights", [(w, ROWS) for w in widths]), ("rows", [(widths[1], m) for m in rows])):
        found = []
        for width, m in cases:
            one = child("curve", width, m)
            found.append({"rows": m} | one)
            print(f"{one['weights']:,} weights, {m} rows: {one['seconds']:.2f} s, {one['peak_bytes'] / 1e6:,.0f} MB")
            record.add(
                "seconds", one["seconds"], "s", method="whole network", column=None, config={"axis": axis} | found[-1]
            )
        for metric, key in (("time_exponent", "seconds"), ("memory_exponent", "peak_bytes")):
            slope = exponent([(x[axis], x[key]) for x in found])
            config = {"axis": axis, "points": found}
            record.add(metric, slope, "exponent", method="whole network", column=None, config=config)
            print(f"{metric} against {axis}: {slope:.3f}", flush=True)


def exponent(points: list[tuple[float, float]]) -> float:
    """Slope of a straight line through the logarithms."""
    x, y = np.log(np.array(points)).T
    return float(np.polyfit(x, y, 1)[0])


def wire_cases(quick: bool) -> Iterator[tuple[str, str]]:
    """Layouts and curvatures whose programs are read."""
    for layout in ("8 × 1, replicated", "2 × 2, tensor parallel", "8 × 1, FSDP", "1 × 8, tensor parallel"):
        yield from ((layout, name) for name in (list(CURVATURES)[:1] if quick else CURVATURES))


def main() -> int:
    """Measure."""
    pin_blas()
    options = parser(__doc__)
    options.add_argument("--parts", default="equality,processes,wires,curves", help="which of these to measure")
    args = options.parse_args()
    os.environ.setdefault("NPROC", THREADS)
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    record, parts = Recorder(args.json, "scale", "three kernels", "random"), args.parts.split(",")
    for seed in seeds(args.seeds):
        if "equality" in parts:
            equality(record, 32 if args.quick else 64, seed, args.quick)
    for precision in ([], ["--x64"]):
        command = [sys.executable, HERE / "multihost.py", "--processes", "2", "--devices", "2", "--json", args.json]
        if "processes" in parts:
            subprocess.run([*map(str, command), *precision, *["--quick"] * args.quick], timeout=900, check=True)
    if "wires" in parts:
        wires(record, list(wire_cases(args.quick)))
    widths = [224, 448, 896] if args.quick else [224, 448, 896, 1792, 3872]
    if "curves" in parts:
        curves(record, widths, [16, 64] if args.quick else [16, 32, 64, 128, 256])
    return 0


if __name__ == "__main__":
    sys.exit(main())
