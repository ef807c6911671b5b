"""The table and the picture of the inverses' record; called by `render.py`."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

Record = dict[str, Any]
COLORS = {
    "none": "0.5",
    "diagonal": "#e69f00",
    "empirical": "#56b4e9",
    "true": "#009e73",
    "factored": "#cc79a7",
    "dense": "#000000",
}
FAMILIES = {
    "diagonal": "diagonal of the Hessian",
    "empirical": "empirical Fisher",
    "true": "Fisher of the model's labels",
    "factored": "factored by layer",
    "dense": "reference",
}
LINES = ("gauss-newton-diagonal", "diagonal", "block-32", "layer", "network", "all-class-layer", "all-class-network")
LINES += ("kronecker-sampled", "layer-inputs", "hessian")
MARKS = {"layer": "s", "network": "^", "all-class-network": "^", "layer-inputs": "v", "block-32": "D"}
SHOWN = (0.5, 0.75, 0.9)
FROM = 0.2  # below, increases of the objective are rounding
HEAD = ("curvature", "cosine, unit", "cosine, random", "error, unit", "error, random", "rank", "rank of `1/[H⁻¹]_qq`")
HEAD += ("predicted / measured", "increase / reference's")
EXPLANATION = """Cosine and relative error of `H⁻¹v`, for unit vectors and for random ones. Single weights: rank
correlation of the scores, and of their part `1/[H⁻¹]_qq` over the larger half of the weights, with the measured
increase after the reference's step; then for steps of the method's own: predicted over measured increase, and
measured over that of the reference's steps, sums over all weights. Paths: masks by magnitude, joint steps of the
method's own: measured increase of the objective (predicted over measured), and the correlation of the logarithms."""


def mean(records: list[Record], method: str, metric: str, sparsity: float | None = None) -> float:
    """Over seeds; NaN where there is none."""
    found = [r["value"] for r in records if (r["method"], r["metric"], r["sparsity"]) == (method, metric, sparsity)]
    return float(np.mean(found)) if found else float("nan")


def titles(records: list[Record]) -> dict[str, Record]:
    """Titles and families by method, in order."""
    return {r["method"]: r["config"] for r in records if "title" in r["config"]}


def named(config: Record) -> str:
    """A title that says which Fisher it is."""
    return f"{config['title']}, empirical" if config["family"] == "empirical" else config["title"]


def table(records: list[Record]) -> str:
    """One row for each curvature."""
    env, spectra = records[0]["env"], {r["seed"]: r["config"] for r in records if r["method"] == "spectrum"}
    first = next(iter(spectra.values()))
    lines = [
        f"# Inverses against the dense Hessian: {records[0]['network']} on {records[0]['dataset']}",
        "",
        f"{first['weights']:,} weights, {first['examples']:,} examples, weight decay and damping {first['damping']:g}, "
        f"means over seeds {', '.join(map(str, spectra))}. JAX {env['jax']}, {env['device']}.",
        "",
        "| seed | mean diagonal | largest eigenvalue | smallest | gradient norm |",
        "|---|---|---|---|---|",
    ]
    for seed, c in spectra.items():
        values = (c["mean_diagonal"], c["largest_eigenvalue"], c["smallest_eigenvalue"], c["gradient_norm"])
        lines.append(f"| {seed} | " + " | ".join(f"{value:.2g}" for value in values) + " |")
    lines += [
        "",
        EXPLANATION,
        "",
        "| " + " | ".join([*HEAD, *(f"{100 * level:g} %" for level in SHOWN), "path"]) + " |",
        "|---|" + "---|" * (len(HEAD) + len(SHOWN)),
    ]
    for method, config in titles(records).items():
        names = ("cosine_columns", "cosine_random", "error_columns", "error_random", "single_spearman")
        names += ("stiffness_spearman",)
        cells = [_number(mean(records, method, name)) for name in names]
        cells += [_number(mean(records, method, name)) for name in ("single_ratio", "single_increase")]
        for level in SHOWN:
            measured = mean(records, method, "path_increase", level)
            ratio = mean(records, method, "path_prediction", level) / measured
            cells.append("" if np.isnan(measured) else f"{measured:.3g} ({ratio:.2g})")
        cells.append(_number(mean(records, method, "path_correlation")))
        lines.append("| " + " | ".join([named(config), *cells]) + " |")
    return "\n".join(lines) + "\n"


def _number(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.2f}" if abs(value) < 100 else f"{value:.3g}"


def picture(records: list[Record]) -> Figure:
    """Products, ranking, and what a path of masks costs after compensation."""
    known = titles(records)
    figure = Figure(figsize=(11, 9), layout="constrained")
    grid = figure.subplots(2, 2, height_ratios=(1, 0.9))
    order = [method for method in known if method != "magnitude"]
    rows = np.arange(len(order))
    colors = [COLORS[known[method]["family"]] for method in order]
    panels = (
        (grid[0, 0], {"cosine_random": "white", "cosine_columns": colors}, (0.78, 1.01)),
        (grid[0, 1], {"stiffness_spearman": colors}, (0, 1)),
    )
    for axes, metrics, limits in panels:
        axes.hlines(rows, *limits, color="0.92", zorder=0)
        for metric, faces in metrics.items():
            values = [mean(records, method, metric) for method in order]
            axes.scatter(values, rows, s=45, c=faces, edgecolors=colors, linewidths=1.5)
        axes.set_yticks(rows, [known[method]["title"] for method in order] if axes is grid[0, 0] else [""] * len(order))
        axes.set_xlim(*limits)
        axes.invert_yaxis()
    grid[0, 0].set_xlabel("cosine with the reference's H⁻¹v")
    grid[0, 1].set_xlabel("rank correlation of 1/[H⁻¹]qq with measured increase / w²")
    handles = [Line2D([], [], color="0.3", marker="o", linestyle="", markerfacecolor=c) for c in ("white", "0.3")]
    grid[0, 0].legend(handles, ["random v", "unit v: a column of H⁻¹"], loc="center left", frameon=False)
    levels = sorted({r["sparsity"] for r in records if r["sparsity"] is not None and r["sparsity"] >= FROM})
    percent = [100 * level for level in levels]
    reference = np.array([mean(records, "hessian", "path_increase", level) for level in levels])
    for method in LINES:
        config = known[method]
        style = {"color": COLORS[config["family"]], "marker": MARKS.get(method, "o"), "markersize": 4, "linewidth": 1.3}
        measured = np.array([mean(records, method, "path_increase", level) for level in levels])
        predicted = np.array([mean(records, method, "path_prediction", level) for level in levels])
        grid[1, 0].plot(percent, measured / reference, label=named(config), **style)
        grid[1, 1].plot(percent, predicted / measured, **style)
    grid[1, 0].set(yscale="log", ylabel="increase after compensation / reference's")
    grid[1, 1].set(yscale="log", ylabel="predicted / measured increase")
    for axes in grid[1]:
        axes.axhline(1, color="0.7", linewidth=1, zorder=0)
        axes.set_xlabel("sparsity, %: the same masks for all")
        axes.grid(alpha=0.3)
    families = [Line2D([], [], color=COLORS[name], marker="o", linestyle="") for name in FAMILIES]
    figure.legend(families, list(FAMILIES.values()), loc="outside upper center", ncols=len(FAMILIES), frameon=False)
    lines, names = grid[1, 0].get_legend_handles_labels()
    figure.legend(lines, names, loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    return figure
