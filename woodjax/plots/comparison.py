"""Methods side by side: accuracy against sparsity, and what each keeps of every leaf."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from woodjax.records import Result, Run

__all__ = ["draw_accuracy", "draw_leaf_density", "summary_figure"]

COLORS = ("#000000", "#e69f00", "#56b4e9", "#009e73", "#cc79a7", "#d55e00", "#0072b2")  # Okabe & Ito
STYLE = {"mask": ":", "update": "--", "staged": "-", "first_order": "-."}


def summary_figure(run: Run) -> Figure:
    """Accuracy against sparsity beside the density of each leaf, for all methods of a run.

    Args:
        run: At least one result.

    Returns:
        A matplotlib figure: save it by `figure.savefig(file)`.

    Raises:
        ValueError: No results.
    """
    if not run.results:
        raise ValueError("The run has no results to draw.")
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_accuracy(left, run.results, dense=run.dense_accuracy)
    level = nearest_level([result.sparsity for result in run.results])
    draw_leaf_density(right, [result for result in run.results if result.sparsity == level])
    figure.suptitle(f"{run.network} on {run.dataset}, seed {run.seed}")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return figure


def nearest_level(levels: Sequence[float], target: float = 0.9) -> float:
    """The level that pictures of one sparsity show.

    Args:
        levels: Sparsities, at least one.
        target: What to be near to; of two as near, the lower.

    Returns:
        One of the levels.

    Example:
        >>> from woodjax.plots.comparison import nearest_level
        >>> nearest_level([0.5, 0.95, 0.98])
        0.95
    """
    return min(sorted(levels), key=lambda level: abs(level - target))


def draw_accuracy(axes: Axes, results: Sequence[Result], *, dense: float) -> None:
    """Draw test accuracy against sparsity, a line for each method.

    The horizontal axis is logarithmic in the kept fraction, so that high sparsities have room.

    Args:
        axes: Where to.
        results: Any number of methods and sparsities.
        dense: Accuracy of the dense network.
    """
    # A sparsity of 1 has no place on a logarithmic axis of what is kept.
    results = [result for result in results if result.sparsity < 1]
    axes.axhline(100 * dense, color="0.7", linewidth=1, label="dense")
    for color, (title, rows) in zip(_colors(results), _by_method(results).items(), strict=True):
        axes.plot(
            [1 - row.sparsity for row in rows],
            [100 * row.accuracy for row in rows],
            STYLE[rows[0].column],
            color=color,
            marker="o",
            markersize=4,
            label=title,
        )
    kept = sorted({1 - result.sparsity for result in results}, reverse=True)
    axes.set_xscale("log")
    if kept:
        axes.set_xlim(kept[0] * 1.08, kept[-1] / 1.08)
    kept = _apart(kept)
    axes.xaxis.set_major_locator(FixedLocator(kept))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([f"{100 * (1 - k):.4g}" for k in kept])
    axes.set_xlabel("sparsity, %")
    axes.set_ylabel("test accuracy, %")
    axes.grid(alpha=0.3)


def draw_leaf_density(axes: Axes, results: Sequence[Result]) -> None:
    """Draw the kept fraction of each leaf, a line for each method.

    Args:
        axes: Where to.
        results: One sparsity, any number of methods.
    """
    methods = _by_method(results)
    for i, (color, rows) in enumerate(zip(_colors(results), methods.values(), strict=True)):
        density = rows[0].leaf_density
        shift = 0.3 * ((i + 0.5) / len(methods) - 0.5)  # side by side: methods that agree stay visible
        axes.plot(
            [leaf + shift for leaf in range(len(density))],
            [100 * value for value in density.values()],
            STYLE[rows[0].column],
            color=color,
            marker="o",
            markersize=4,
        )
    names = list(results[0].leaf_density)
    axes.set_xticks(range(len(names)), [name.removesuffix("/kernel") for name in names], rotation=90)
    lowest = min(value for result in results for value in result.leaf_density.values())
    if lowest > 0:
        axes.set_yscale("log")
        axes.set_ylim(70 * lowest, 110)
    else:  # a leaf is empty: zero needs a place
        axes.set_yscale("symlog", linthresh=1)
        axes.set_ylim(0, 110)
    ticks = [tick for tick in (0, 1, 2, 5, 10, 20, 50, 100) if tick >= 70 * lowest]
    axes.set_yticks(ticks, [str(tick) for tick in ticks])
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylabel("kept, %")
    axes.set_title(f"kept of each leaf at {100 * results[0].sparsity:g} % sparsity")
    axes.grid(alpha=0.3)


def _apart(kept: Sequence[float]) -> list[float]:
    """Those of falling fractions that have room for a label on a logarithmic axis."""
    apart: list[float] = []
    for fraction in kept:
        if not apart or fraction < apart[-1] / 1.04:
            apart.append(fraction)
    return apart


def _by_method(results: Sequence[Result]) -> dict[str, list[Result]]:
    titles = dict.fromkeys(result.title for result in results)
    return {title: sorted((r for r in results if r.title == title), key=lambda r: r.sparsity) for title in titles}


def _colors(results: Sequence[Result]) -> list[str]:
    count = len({result.title for result in results})
    return [COLORS[i % len(COLORS)] for i in range(count)]
