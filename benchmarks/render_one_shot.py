"""Table and pictures of one-shot pruning: `benchmarks/one_shot.py`."""

from typing import Any

import numpy as np
import published
from matplotlib.figure import Figure

from woodjax.plots import draw_accuracy
from woodjax.records import Result

Record = dict[str, Any]


def values(records: list[Record], method: str, sparsity: float, metric: str) -> list[float]:
    """Values of one cell, one for each seed."""
    return [r["value"] for r in records if (r["method"], r["sparsity"], r["metric"]) == (method, sparsity, metric)]


def cell(numbers: list[float]) -> str:
    """Mean, and standard deviation where there are several seeds."""
    if not numbers:
        return ""
    spread = f" ± {np.std(numbers, ddof=1):.2f}" if len(numbers) > 1 else ""
    return f"{np.mean(numbers):.2f}{spread}"


def readme_table(records: list[Record]) -> str:
    """Accuracy by method at the four highest sparsities."""
    levels = sorted({r["sparsity"] for r in records if r["sparsity"] is not None})[-4:]
    rows = {r["method"]: r for r in records if r["metric"] == "accuracy" and r["sparsity"] is not None}
    dense = next(r for r in records if r["method"] == "dense")
    head = f"{dense['network']} on {dense['dataset']}, dense {dense['value']:.2f} %"
    lines = [f"| {head} | column | " + " | ".join(f"{100 * s:g} %" for s in levels) + " |"]
    lines += ["|---|---|" + "---|" * len(levels)]
    for method, row in rows.items():
        cells = [cell(values(records, method, s, "accuracy")) for s in levels]
        lines.append("| " + " | ".join([row["config"]["title"], row["column"], *cells]) + " |")
    return "\n".join(lines)


def table(records: list[Record]) -> str:
    """Accuracy by method and sparsity, then the time of each part."""
    rows = {r["method"]: r for r in records if r["metric"] == "accuracy" and r["sparsity"] is not None}
    levels = sorted({r["sparsity"] for r in records if r["sparsity"] is not None})
    dense = next(r for r in records if r["method"] == "dense")
    lines = [
        f"# {dense['benchmark']}: {dense['network']} on {dense['dataset']}",
        "",
        f"Test accuracy in %, mean ± standard deviation over seeds; dense {dense['value']:.2f}. "
        f"JAX {dense['env']['jax']}, {dense['env']['device']}.",
        "",
        "| method | column | examples | damping | seeds | "
        + " | ".join(f"{100 * s:g} %" for s in levels)
        + " | s a run |",
        "|---|---|---|---|---|" + "---|" * (len(levels) + 1),
    ]
    for method, row in rows.items():
        config = row["config"]
        cells = [cell(values(records, method, s, "accuracy")) for s in levels]
        times = [t for s in levels for t in values(records, method, s, "seconds")]
        seeds = max(len(values(records, method, s, "accuracy")) for s in levels)
        damping = "chosen" if config["damping"] is None else f"{config['damping']:g}"
        data = (f"{config['examples']}", damping) if config["examples"] else ("", "")
        head = [config["title"], row["column"], *data, str(seeds)]
        lines.append("| " + " | ".join([*head, *cells, f"{np.median(times):.1f}"]) + " |")
    lines += published.table(dense["network"], dense["value"])
    parts = [r for r in records if r["metric"].startswith("seconds_")]
    if parts:
        examples = parts[0]["config"]["examples"]
        lines += [
            "",
            f"Seconds of each part of one stage of the whole-network Fisher, {examples} examples, compiled before:",
            "",
        ]
        names = [r["metric"].removeprefix("seconds_") for r in parts]
        lines += ["| " + " | ".join(names) + " |", "|" + "---|" * len(parts)]
        lines += ["| " + " | ".join(f"{r['value']:.3g}" for r in parts) + " |"]
    return "\n".join(lines) + "\n"


def picture(records: list[Record]) -> Figure:
    """Mean accuracy against sparsity."""
    dense = next(r for r in records if r["method"] == "dense")
    keys = dict.fromkeys(
        (r["method"], r["sparsity"], r["config"]["title"], r["column"])
        for r in records
        if r["metric"] == "accuracy" and r["sparsity"] is not None
    )
    results = [
        Result(
            method=method,
            title=title,
            column=column,
            sparsity=sparsity,
            reached=sparsity,
            accuracy=float(np.mean(values(records, method, sparsity, "accuracy"))) / 100,
            seconds=0.0,
            predicted_loss_change=None,
            measured_loss_change=None,
            leaf_density={},
        )
        for method, sparsity, title, column in keys
    ]
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    draw_accuracy(axes, results, dense=dense["value"] / 100)
    axes.legend(frameon=False, loc="lower left")
    axes.set_title(f"{dense['network']} on {dense['dataset']}, one-shot")
    return figure
