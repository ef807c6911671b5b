"""Table and picture of `limited_data.py`."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

Record = dict[str, Any]


def _cells(records: list[Record]) -> dict[str, dict[int, list[float]]]:
    cells: dict[str, dict[int, list[float]]] = {}
    for r in records:
        if r["sparsity"] is not None:
            cells.setdefault(r["config"]["title"], {}).setdefault(r["config"]["per_class"], []).append(r["value"])
    return cells


def table(records: list[Record]) -> str:
    """Accuracy against examples of each class."""
    dense = next(r for r in records if r["method"] == "dense")
    cells = _cells(records)
    sizes = sorted({size for row in cells.values() for size in row if size})
    level = next(r["sparsity"] for r in records if r["sparsity"] is not None)
    lines = [
        f"# limited_data: {dense['network']} on {dense['dataset']} at {100 * level:g} %",
        "",
        f"Test accuracy in %, mean ± standard deviation over seeds; dense {dense['value']:.2f}. "
        f"JAX {dense['env']['jax']}, {dense['env']['device']}.",
        "",
        "| examples of each class | " + " | ".join(map(str, sizes)) + " |",
        "|---|" + "---|" * len(sizes),
    ]
    for title, row in cells.items():
        values = [row.get(size, row.get(0, [])) for size in sizes]
        texts = [f"{np.mean(v):.2f}" + (f" ± {np.std(v, ddof=1):.2f}" if len(v) > 1 else "") for v in values]
        lines.append(f"| {title} | " + " | ".join(texts) + " |")
    return "\n".join(lines) + "\n"


def picture(records: list[Record]) -> Figure:
    """Accuracy against examples of each class."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for title, row in _cells(records).items():
        if 0 in row:
            axes.axhline(row[0][0], color="0.4", linestyle=":", label=title)
            continue
        means = [np.mean(values) for values in row.values()]
        spread = [np.std(values) for values in row.values()]
        axes.errorbar(list(row), means, yerr=spread, marker="o", capsize=3, label=title)
    dense = next(r for r in records if r["method"] == "dense")
    axes.axhline(dense["value"], color="0.7", linewidth=1, label="dense")
    axes.set_xscale("log")
    axes.set_xlabel("examples of each class")
    axes.set_ylabel("test accuracy, %")
    axes.set_title(f"{dense['network']} on {dense['dataset']}, one-shot at 90 %")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    return figure
