"""Tables and pictures of `pai.py`."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Record = dict[str, Any]

WARMTH = {False: "statistics as they begin", True: "after warm-up"}
SHUFFLED = "-shuffled"
LEVEL = 0.98  # of the budgets and the overlaps in the picture


def _of(records: list[Record], metric: str, **wanted: Any) -> list[Record]:
    def fits(r: Record) -> bool:
        return all(r["config"].get(k) == v if k in ("warm_up", "layer") else r[k] == v for k, v in wanted.items())

    return [r for r in records if r["metric"] == metric and fits(r)]


def _values(records: list[Record], metric: str, **wanted: Any) -> np.ndarray:
    return np.array([r["value"] for r in _of(records, metric, **wanted)])


def _mean(records: list[Record], metric: str, **wanted: Any) -> float:
    values = _values(records, metric, **wanted)
    return float(values.mean()) if len(values) else float("nan")


def _unique(records: list[Record], metric: str, key: str) -> list[Any]:
    return list(dict.fromkeys(r["config"][key] if key in r["config"] else r[key] for r in _of(records, metric)))


def _text(values: np.ndarray, form: str = ".1f") -> str:
    if not len(values):
        return ""
    spread = f" ± {np.std(values, ddof=1):{form}}" if len(values) > 1 else ""
    return f"{np.mean(values):{form}}{spread}"


def _title(records: list[Record], method: str) -> str:
    return next(r["config"]["title"] for r in records if r["method"] == method and "title" in r["config"])


def _levels(records: list[Record], metric: str) -> list[float]:
    return sorted({r["sparsity"] for r in _of(records, metric) if r["sparsity"] is not None})


def table(records: list[Record]) -> str:
    """Accuracies, then what the masks leave."""
    env = records[0]["env"]
    lines = [f"# Pruning at initialization: {records[0]['network']} on {records[0]['dataset']}", ""]
    if trained := _of(records, "accuracy"):
        lines += _accuracies(records, trained, env)
    if _of(records, "collapsed_layers"):
        lines += _collapse(records)
    for metric in ("diagonal_relative_error", "hutchinson_relative_error"):
        for r in _of(records, metric):
            lines += ["", f"`{metric}` {r['config'] or ''}: {r['value']:.2g}"]
    return "\n".join(lines) + "\n"


def _accuracies(records: list[Record], trained: list[Record], env: dict[str, Any]) -> list[str]:
    c = trained[0]["config"]
    seeds = sorted({r["seed"] for r in trained})
    images = f", images {c['image_size']}×{c['image_size']}" if c["image_size"] else ""
    count = f", the first {c['examples']:,} train images" if c["examples"] else ""
    lines = [
        f"Test accuracy in % after {c['epochs']} epochs of SGD under the masks (learning rate {c['learning_rate']:g}, "
        f"{c['decay']}, batches of {c['batch_size']}, weight decay {c['weight_decay']:g}{images}{count}), mean ± "
        f"standard deviation over seeds {', '.join(map(str, seeds))}. JAX {env['jax']}, {env['device']}. "
        "In brackets: as many weights in every layer, but random ones.",
    ]
    for warm in _unique(records, "accuracy", "warm_up"):
        dense = _values(records, "accuracy", method="dense", warm_up=warm)
        lines += ["", f"**{WARMTH[warm].capitalize()}.**" + (f" Dense {_text(dense)}." if len(dense) else ""), ""]
        lines += _accuracy_rows(records, warm, "criterion")
    return lines


def _accuracy_rows(records: list[Record], warm: bool, corner: str) -> list[str]:
    levels = _levels(records, "accuracy")
    lines = _head(levels, corner)
    for method in _unique(records, "accuracy", "method"):
        if method.endswith(SHUFFLED) or method == "dense":
            continue
        cells = []
        for s in levels:
            cell = _text(_values(records, "accuracy", method=method, sparsity=s, warm_up=warm))
            control = _values(records, "accuracy", method=method + SHUFFLED, sparsity=s, warm_up=warm)
            cells.append(f"{cell} ({_text(control)})" if len(control) else cell)
        lines.append(f"| {_title(records, method)} | " + " | ".join(cells) + " |")
    return lines


def readme_table(records: list[Record]) -> str:
    """Accuracies, after warm-up where there are any; nothing where masks alone were made."""
    if not _of(records, "accuracy"):
        return ""
    warm = max(_unique(records, "accuracy", "warm_up"), default=False)
    dense = _values(records, "accuracy", method="dense", warm_up=warm)
    return "\n".join(
        _accuracy_rows(records, warm, f"{records[0]['network']} on {records[0]['dataset']}, dense {_text(dense)} %")
    )


def _head(levels: list[float], corner: str = "criterion") -> list[str]:
    return [f"| {corner} | " + " | ".join(f"{100 * s:g} %" for s in levels) + " |", "|---|" + "---|" * len(levels)]


def _collapse(records: list[Record]) -> list[str]:
    levels = _levels(records, "collapsed_layers")
    total = len(_unique(records, "density", "layer"))
    seeds = sorted({r["seed"] for r in _of(records, "collapsed_layers")})
    lines = [
        "",
        f"Collapsed layers of {total}, lowest density of a layer in %, and effective sparsity in % (weights that lie "
        f"on no path count as pruned); means over seeds {', '.join(map(str, seeds))}.",
    ]
    for warm in _unique(records, "collapsed_layers", "warm_up"):
        lines += ["", f"**{WARMTH[warm].capitalize()}.**", ""]
        lines += [
            "| criterion | " + " | ".join(f"{100 * s:g} %" for s in levels) + " |",
            "|---|" + "---|" * len(levels),
        ]
        for method in _unique(records, "collapsed_layers", "method"):
            cells = []
            for s in levels:
                where = {"method": method, "sparsity": s, "warm_up": warm}
                collapsed = _values(records, "collapsed_layers", **where)
                if not len(collapsed):
                    cells.append("")
                    continue
                effective = _values(records, "effective_sparsity", **where)
                lowest = 100 * _values(records, "lowest_density", **where).mean()
                text = f"{collapsed.mean():.2g} / {lowest:.2g}"
                cells.append(text + (f" / {100 * effective.mean():.2f}" if len(effective) else ""))
            lines.append(f"| {_title(records, method)} | " + " | ".join(cells) + " |")
    return lines


def picture(records: list[Record]) -> Figure:
    """Layer budgets, collapse, overlaps and accuracies: those that were recorded."""
    warmths = _unique(records, "density", "warm_up")
    trained = _unique(records, "accuracy", "warm_up")
    panels = [("budget", warm) for warm in warmths] + [("collapse", warm) for warm in warmths]
    panels += [("overlap", warm) for warm in warmths if _of(records, "overlap", warm_up=warm)]
    panels += [("accuracy", warm) for warm in trained]
    columns = 1 if len(panels) < 2 else 2
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(7.5 * columns, 5.2 * rows), layout="constrained")
    grid = np.ravel(figure.subplots(rows, columns, squeeze=False))
    for axes, (kind, warm) in zip(grid, panels, strict=False):
        {"budget": _budget, "collapse": _draw_collapse, "overlap": _overlap, "accuracy": _draw_accuracy}[kind](
            axes, records, warm
        )
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    figure.suptitle(f"{records[0]['network']} on {records[0]['dataset']}, pruned at initialization")
    return figure


def _level(records: list[Record], metric: str) -> float:
    return min(_levels(records, metric), key=lambda s: abs(s - LEVEL))


def _heat(
    axes: Axes, values: np.ndarray, rows: list[str], columns: list[str], texts: list[list[str]], **style: Any
) -> None:
    axes.imshow(values, aspect="auto", **style)
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    axes.set_xticks(range(len(columns)), columns, fontsize=8, rotation=0 if max(map(len, columns)) < 6 else 90)
    low, high = np.nanmin(values), np.nanmax(values)
    for i, row in enumerate(texts):
        for j, text in enumerate(row):
            if np.isnan(values[i, j]):  # not measured
                continue
            bright = values[i, j] < low + 0.6 * (high - low)
            axes.text(j, i, text, ha="center", va="center", fontsize=6.5, color="white" if bright else "black")


def _budget(axes: Axes, records: list[Record], warm: bool) -> None:
    level = _level(records, "density")
    layers = _unique(records, "density", "layer")
    methods = _unique(records, "density", "method")
    density = np.array([
        [_mean(records, "density", method=m, sparsity=level, warm_up=warm, layer=n) for n in layers] for m in methods
    ])
    texts = [["0" if x == 0 else f"{100 * x:.2g}" for x in row] for row in density.tolist()]
    names = [layer.removesuffix("/kernel") for layer in layers]
    titles = [_title(records, m) for m in methods]
    _heat(axes, np.log10(np.maximum(density, 1e-5)), titles, names, texts, cmap="viridis")
    axes.set_title(f"density of each layer in %, {100 * level:g} % pruned, {WARMTH[warm]}", fontsize=10)


def _draw_collapse(axes: Axes, records: list[Record], warm: bool) -> None:
    methods, levels = _unique(records, "collapsed_layers", "method"), _levels(records, "collapsed_layers")
    counts = np.array([
        [_mean(records, "collapsed_layers", method=m, sparsity=s, warm_up=warm) for s in levels] for m in methods
    ])
    texts = [[f"{x:.2g}" for x in row] for row in counts]
    titles = [_title(records, m) for m in methods]
    _heat(axes, -counts, titles, [f"{100 * s:g} %" for s in levels], texts, cmap="inferno")
    total = len(_unique(records, "density", "layer"))
    axes.set_title(f"collapsed layers of {total}, {WARMTH[warm]}", fontsize=10)


def _overlap(axes: Axes, records: list[Record], warm: bool) -> None:
    level = _level(records, "overlap")
    found = _of(records, "overlap", sparsity=level, warm_up=warm)
    methods = list(dict.fromkeys(name for r in found for name in r["config"]["criteria"]))
    shares = np.eye(len(methods))
    for i, one in enumerate(methods):
        for j, other in enumerate(methods):
            pair = [r["value"] for r in found if set(r["config"]["criteria"]) == {one, other} and one != other]
            if pair:
                shares[i, j] = np.mean(pair)
    titles = [_title(records, m) for m in methods]
    texts = [[f"{100 * x:.0f}" for x in row] for row in shares]
    _heat(axes, shares, titles, titles, texts, cmap="viridis", vmin=0, vmax=1)
    axes.set_title(f"kept weights in common, %, {100 * level:g} % pruned, {WARMTH[warm]}", fontsize=10)


def _draw_accuracy(axes: Axes, records: list[Record], warm: bool) -> None:
    levels = _levels(records, "accuracy")
    methods = [m for m in _unique(records, "accuracy", "method") if m != "dense"]
    plain = [m for m in methods if not m.endswith(SHUFFLED)]
    for i, method in enumerate(plain):
        for name, style in ((method, "-"), (method + SHUFFLED, ":")):
            cells = [_values(records, "accuracy", method=name, sparsity=s, warm_up=warm) for s in levels]
            if not any(len(cell) for cell in cells):
                continue
            means = [cell.mean() if len(cell) else np.nan for cell in cells]
            spread = [cell.std() if len(cell) else 0 for cell in cells]
            label = _title(records, method) if name == method else None
            axes.errorbar(
                range(len(levels)),
                means,
                yerr=spread,
                linestyle=style,
                marker="o",
                markersize=3,
                capsize=2,
                color=f"C{i}" if i < 10 else "0.5",
                label=label,
            )
    dense = _values(records, "accuracy", method="dense", warm_up=warm)
    if len(dense):
        axes.axhline(dense.mean(), color="0.7", linewidth=1, label="dense")
    axes.set_xticks(range(len(levels)), [f"{100 * s:g} %" for s in levels])
    axes.set_ylabel("test accuracy, %")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    axes.set_title(f"trained, {WARMTH[warm]}; dotted: masks shuffled within layers", fontsize=10)
