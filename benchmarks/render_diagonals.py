"""Table and picture of `diagonals.py`."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

Record = dict[str, Any]
COLORS = {1.0: "#0072b2", 200.0: "#d55e00"}
STYLES = {"batch": ("-", "o"), "example": ("--", "s")}


def _cells(records: list[Record]) -> dict[tuple[float, str], dict[int, list[float]]]:
    cells: dict[tuple[float, str], dict[int, list[float]]] = {}
    for r in records:
        if r["metric"] == "hutchinson_relative_error":
            config = r["config"]
            row = cells.setdefault((config["temperature"], config["signs"]), {})
            row.setdefault(config["probes"], []).append(r["value"])
    return cells


def table(records: list[Record]) -> str:
    """Relative error against probes."""
    cells, first = _cells(records), records[0]
    exact = [r["value"] for r in records if r["metric"] == "diagonal_relative_error"]
    counts = sorted({count for row in cells.values() for count in row})
    lines = [
        f"# diagonals: {first['network']} on {first['dataset']}, at initialization",
        "",
        f"Gauss–Newton diagonal against `H eᵢ`: relative error {max(exact):.1e} at most, {len(exact)} seeds.",
        "Hutchinson's diagonal: root-mean-square error over the root mean square of the exact one, mean over seeds;",
        f"at a temperature `T` estimates are multiplied by `T²`. JAX {first['env']['jax']}, {first['env']['device']}.",
        "",
        "| temperature | signs for each | "
        + " | ".join(f"{count} probe{'s' * (count > 1)}" for count in counts)
        + " |",
        "|---|---|" + "---|" * len(counts),
    ]
    for (temperature, signs), row in cells.items():
        values = [f"{np.mean(row[count]):.3g}" if count in row else "" for count in counts]
        lines.append(f"| {temperature:g} | {signs} | " + " | ".join(values) + " |")
    return "\n".join(lines) + "\n"


def picture(records: list[Record]) -> Figure:
    """Relative error against probes, with a guide of slope −½ and the size of the diagonal itself."""
    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axes = figure.subplots()
    for (temperature, signs), row in _cells(records).items():
        counts = sorted(row)
        means = np.array([np.mean(row[count]) for count in counts])
        line, marker = STYLES[signs]
        label = f"T = {temperature:g}, signs for each {signs}"
        axes.plot(counts, means, line, marker=marker, color=COLORS.get(temperature, "0.3"), label=label)
        if signs == "batch":
            axes.plot(counts, means[0] * np.sqrt(counts[0] / np.array(counts)), ":", color="0.6", linewidth=1)
    axes.plot([], [], ":", color="0.6", linewidth=1, label="1/√probes")
    axes.axhline(1, color="0.3", linewidth=1, label="the diagonal itself")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("probes")
    axes.set_ylabel("error of diag(H), relative")
    axes.set_title(f"{records[0]['network']} on {records[0]['dataset']}, at initialization")
    figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=2)
    axes.grid(alpha=0.3)
    return figure
