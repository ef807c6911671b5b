"""Pictures of what a gain costs: accuracy against seconds, with the Pareto front."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter
from records import read

from woodjax.plots.comparison import COLORS

PANELS = (  # record, sparsity, metric, what is good, and what stands above
    ("one_shot_mlpnet", 0.95, "accuracy", 1, "MLPNet on MNIST, one-shot to 95 %"),
    ("one_shot_resnet20", 0.8, "accuracy", 1, "ResNet-20 on CIFAR-10, one-shot to 80 %"),
    ("language_model", 0.6, "bits_per_byte", -1, "language model, layer by layer to 60 %"),
)


def front(points: Sequence[tuple[float, float]], sign: int) -> list[tuple[float, float]]:
    """Those that no other point beats in both: less cost, more gain (`sign` 1) or less loss (-1)."""
    best, kept = -np.inf, []
    for cost, gain in sorted(points, key=lambda point: (point[0], -sign * point[1])):
        if sign * gain > best:
            best = sign * gain
            kept.append((cost, gain))
    return kept


def means(file: Path, sparsity: float, metric: str) -> dict[str, tuple[float, float]]:
    """Median seconds and mean of the metric, by method."""
    found: dict[str, dict[str, list[Any]]] = defaultdict(lambda: defaultdict(list))
    titles = {}
    for one in read(file):
        if one["sparsity"] == sparsity and not one["config"].get("pattern"):
            found[one["method"]][one["metric"]].append(one["value"])
            titles[one["method"]] = one["config"].get("title", one["method"])
    return {
        titles[method]: (float(np.median(values["seconds"])), float(np.mean(values[metric])))
        for method, values in found.items()
    }


def draw(axes: Axes, points: dict[str, tuple[float, float]], sign: int) -> None:
    """Methods as points, the front as steps."""
    line = front(list(points.values()), sign)
    axes.step(*zip(*line, strict=True), where="post", color="0.75", zorder=0)
    for i, (title, (cost, gain)) in enumerate(points.items()):
        axes.plot(cost, gain, "os"[i // len(COLORS)], color=COLORS[i % len(COLORS)], label=title)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.4)))
    axes.set_xlabel("seconds a run")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=7, loc="best")


def picture(folder: Path) -> Figure:
    """All panels."""
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    for axes, (name, sparsity, metric, sign, title) in zip(figure.subplots(1, 3), PANELS, strict=True):
        draw(axes, means(folder / f"{name}.jsonl", sparsity, metric), sign)
        axes.set_title(title, fontsize=10)
        axes.set_ylabel("test accuracy, %" if metric == "accuracy" else "bits a byte, low is good")
    return figure
