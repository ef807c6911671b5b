"""What pruning large networks costs on many devices, by the cost model: nothing is run.

    python benchmarks/scale_table.py

writes `benchmarks/results/scale_costs.md`. As many rows of gradients are computed at once as is fastest, and what does
not fit is cut into windows.
"""

from pathlib import Path
from typing import NamedTuple

import woodjax as wj

ROWS = 1024
OUT = Path(__file__).with_name("results") / "scale_costs.md"
TEXT = f"""# What pruning large networks costs on many devices

Made by `python benchmarks/scale_table.py`. **A model, not a measurement**: `woodjax.scaling_cost` for {ROWS:,} rows of
gradients, everything in float32, gradients included; the peak rates of the data sheets (`woodjax/scale/hardware.py`
says which figures were looked up and which assumed), communication not overlapped with arithmetic, activations not in
the memory, and not what a model sends while it computes a gradient. Work of one gradient: three times the forward
pass, of an image of 224 × 224 for ResNet-50 (4.1 GMAC) and ViT-L/16 (61.6 GMAC), of 2,048 tokens for the 7B decoder.

*data × others*: devices among which examples are divided, times those among which parameters are. *window*: columns
that a device holds at once where it cannot hold all, of the whole network only; *passes*: how often every gradient is
computed for that. *GB at once*: the peak of one pass, without windows. *gradients travel*: rows go to the owners of
their blocks, which then add them up; without it, sums of outer products do. The first is the cheaper where
`m/D < b`. Seconds and GB are those of one device.

"""


class Network(NamedTuple):
    """A network to prune."""

    name: str
    d: int
    gradient_flops: float
    data_devices: tuple[int, ...]
    """On each machine: all of them where the network fits beside its gradients, so that it is split no further."""


class Machine(NamedTuple):
    """Devices of one kind."""

    devices: int
    hardware: wj.Hardware


NETWORKS = (
    Network("ResNet-50", 25_500_000, 3 * 2 * 4.1e9, (8, 256)),
    Network("ViT-L", 304_000_000, 3 * 2 * 61.6e9, (8, 256)),
    Network("7B decoder", 7_000_000_000, 6 * 7e9 * 2048, (2, 16)),
)
MACHINES = (Machine(8, wj.H100_SXM), Machine(256, wj.TPU_V5E))
CURVATURES = {
    "whole network": (None, "sums"),
    "blocks of 64": (64, "sums"),
    "blocks of 64, gradients travel": (64, "gradients"),
    "blocks of 128": (128, "sums"),
    "blocks of 128, gradients travel": (128, "gradients"),
}


def best(
    network: Network, machine: Machine, data: int, block_size: int | None, exchange: str
) -> tuple[wj.ScalingCost, float]:
    """The fastest number of rows at once, and the peak without windows."""
    found = []
    for microbatch in (1, 4, 16, 64):
        options = {
            "data_devices": data,
            "block_size": block_size,
            "exchange": exchange,
            "gradient_flops": network.gradient_flops,
            "microbatch_size": microbatch,
        }
        whole = wj.scaling_cost(network.d, ROWS, *machine, **options)
        try:
            found.append((wj.fitting_cost(network.d, ROWS, *machine, **options), whole.peak_bytes))
        except ValueError:
            found.append((whole, whole.peak_bytes))
            break  # so many rows are too many
    return min(found, key=lambda pair: (not pair[0].fits, pair[0].seconds))


def main() -> int:
    """Write the table."""
    found = {
        (f"{network.name}, {name}", machine): best(network, machine, data, *curvature)
        for network in NETWORKS
        for machine, data in zip(MACHINES, network.data_devices, strict=True)
        for name, curvature in CURVATURES.items()
    }
    header, rule = wj.cost_table({}).splitlines()
    out = [f"{header} rows at once | GB at once |", f"{rule}---|---|"]
    stages = ["", "Where the time goes, in seconds of one device:", "", "| | devices | stages |", "|---|---|---|"]
    for (name, _), (cost, peak) in found.items():
        row = wj.cost_table({name: cost}).splitlines()[-1]
        out.append(f"{row} {cost.sharding.microbatch_size} | {peak / 1e9:,.1f} |")
        parts = ", ".join(f"{s.name} {s.seconds:,.3f}" for s in cost.stages if s.seconds > 0.01 * cost.seconds)
        stages.append(f"| {name} | {cost.sharding.devices} {cost.hardware.name} | {parts} |")
    OUT.write_text(TEXT + "\n".join([*out, *stages]) + "\n")
    print(OUT.read_text())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
