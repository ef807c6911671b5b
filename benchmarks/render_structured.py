"""Tables and picture of `structured.py`."""

from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Record = dict[str, Any]

TITLES = {
    "random": "random",
    "bn-scale": "batch-norm scale",
    "l2": "L2 norm",
    "taylor": "Taylor, first order",
    "hap-fisher": "HAP, empirical Fisher",
    "hap-exact": "HAP, exact trace",
    "gate": "Gauss–Newton along the channel",
    "joint-gate": "the same, channels together",
    "obs": "group OBS score, nothing moved",
    "obs+compensation": "group OBS, all survivors moved",
    "hap-exact+least-squares": "HAP, exact trace, readers refitted",
    "obs+least-squares": "group OBS, readers refitted",
}
NAMES = {"exact": "exact test images", "jpeg": "recompressed test images", "digits": "test images"}
TUNED = {
    "before": "at once",
    "re-estimated": "statistics re-estimated",
    "after": "after {epochs} epochs of {examples:,} images",
}
DRAWN = ("random", "bn-scale", "l2", "hap-10", "hap-300", "hap-exact", "gate", "obs+compensation", "obs+least-squares")


def _of(records: list[Record], metric: str, **wanted: Any) -> list[Record]:
    def value(r: Record, key: str) -> Any:
        return r[key] if key in r else r["config"].get(key)

    return [r for r in records if r["metric"] == metric and all(value(r, k) == v for k, v in wanted.items())]


def _mean(records: list[Record], metric: str, **wanted: Any) -> float:
    values = [r["value"] for r in _of(records, metric, **wanted)]
    return float(np.mean(values)) if values else float("nan")


def _title(method: str) -> str:
    if method in TITLES:
        return TITLES[method]
    return f"HAP, {method.removeprefix('hap-')} probes" if method.startswith("hap-") else method


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def table(records: list[Record]) -> str:
    """Every part that was recorded."""
    env = records[0]["env"]
    lines = ["# Structured pruning", "", f"JAX {env['jax']}, {env['device']}."]
    return "\n".join([*lines, *_zoo(records), *_scores(records), *_tuned(records), *_latency(records)]) + "\n"


def _zoo(records: list[Record]) -> list[str]:
    found = _of(records, "masked_vs_shrunk_max_error")
    if not found:
        return []
    lines = ["", "## Masked against smaller", ""]
    lines += ["Largest difference of outputs over the largest output, random plans with implants, float32.", ""]
    lines += [_row(["network", "groups", "channels", "joint", "union"]), "|---|---|---|---|---|"]
    for kind in dict.fromkeys(r["config"]["kind"] for r in found):
        own = [r["config"] for r in found if r["config"]["kind"] == kind]
        errors = [
            max((r["value"] for r in _of(found, "masked_vs_shrunk_max_error", kind=kind, streams=s)), default=None)
            for s in ("joint", "union")
        ]
        cells = [kind, str(own[0]["groups"]), str(own[0]["channels"])]
        lines.append(_row([*cells, *("" if e is None else f"{e:.1e}" for e in errors)]))
    return lines


def _scores(records: list[Record]) -> list[str]:
    found = [r for r in _of(records, "accuracy", channels="in blocks") if r["sparsity"]]
    lines = []
    for test in dict.fromkeys(r["config"]["test"] for r in found):
        dense = _mean(records, "accuracy", method="dense", test=test, sparsity=0.0)
        seeds = len({r["seed"] for r in found})
        ratios = sorted({r["sparsity"] for r in found})
        lines += ["", f"## One-shot, {found[0]['network']}, {NAMES[test]}", ""]
        lines += [
            "Accuracy in % against the fraction of channels removed, of groups inside blocks; "
            f"dense {100 * dense:.1f}; {seeds} seed{'s' if seeds > 1 else ''}.",
            "",
            _row(["score", *(f"{100 * r:g} %" for r in ratios)]),
            "|---|" + "---|" * len(ratios),
        ]
        for method in dict.fromkeys(r["method"] for r in found):
            means = [_mean(found, "accuracy", method=method, test=test, sparsity=r) for r in ratios]
            lines.append(_row([_title(method), *(f"{100 * m:.1f}" for m in means)]))
    return lines


def _tuned(records: list[Record]) -> list[str]:
    found = [r for r in records if r["metric"] == "accuracy" and "when" in r["config"]]
    lines = []
    for test in dict.fromkeys(r["config"]["test"] for r in found):
        own = [r for r in found if r["config"]["test"] == test]
        heads = [title.format(**own[0]["config"]) for title in TUNED.values()]
        lines += ["", f"## Half of the multiply-adds, {own[0]['network']}, {NAMES[test]}", ""]
        lines += [
            _row(["network", "parameters", "multiply-adds", *heads]),
            "|---|---|---|" + "---|" * len(heads),
        ]
        for method in dict.fromkeys(r["method"] for r in own):
            sizes = [_mean(records, metric, method=method, part="tune") for metric in ("parameters", "macs")]
            values = [100 * _mean(own, "accuracy", method=method, when=when) for when in TUNED]
            lines.append(_row([method, *(f"{n:,.0f}" for n in sizes), *(f"{v:.1f}" for v in values)]))
    return lines


def _latency(records: list[Record]) -> list[str]:
    found = _of(records, "latency")
    lines = []
    for network, batch in dict.fromkeys((r["network"], r["config"]["batch"]) for r in found):
        here = [r for r in records if r["network"] == network]
        lines += ["", f"## Latency, {network}, batch {batch}", ""]
        heads = ["network", "parameters", "bytes", "multiply-adds an image", "of dense", "ms", "of dense"]
        lines += [_row([*heads, "latency ÷ multiply-adds"]), "|---|---|---|---|---|---|---|---|"]
        for method in dict.fromkeys(r["method"] for r in _of(here, "latency", batch=batch)):
            one = partial(_mean, here, method=method, batch=batch)
            cells = [f"{one(metric):,.0f}" for metric in ("parameters", "bytes_on_disk", "macs")]
            times = [f"{1000 * one('latency'):.2f}", f"{one('latency_ratio'):.2f}"]
            both = f"{one('latency_ratio') / one('macs_ratio'):.2f}"
            lines.append(_row([method, *cells, f"{one('macs_ratio'):.2f}", *times, both]))
    return lines


def picture(records: list[Record]) -> Figure:
    """Accuracy against the fraction of channels removed, on each test set."""
    found = [r for r in _of(records, "accuracy", channels="in blocks") if r["sparsity"]]
    tests = list(dict.fromkeys(r["config"]["test"] for r in found))
    figure = Figure(figsize=(5.5 * max(1, len(tests)), 4.5), layout="constrained")
    for axes, test in zip(figure.subplots(1, max(1, len(tests)), squeeze=False)[0], tests, strict=False):
        _draw(axes, records, found, test)
    figure.axes[0].legend(frameon=False, fontsize=7)
    return figure


def _draw(axes: Axes, records: list[Record], found: list[Record], test: str) -> None:
    ratios = sorted({r["sparsity"] for r in found})
    dense = _mean(records, "accuracy", method="dense", test=test, sparsity=0.0)
    axes.axhline(100 * dense, color="0.6", linewidth=1)
    for method in DRAWN:
        means = [100 * _mean(found, "accuracy", method=method, test=test, sparsity=r) for r in ratios]
        if not np.isnan(means).all():
            style = "--" if method in ("random", "bn-scale", "l2") else "-"
            axes.plot([100 * r for r in ratios], means, style, marker="o", markersize=3, label=_title(method))
    axes.set(xlabel="% of channels removed", ylabel="accuracy, %", title=NAMES[test], ylim=(0, 100))


def readme_table(records: list[Record]) -> str:
    """A few scores on the first test set."""
    found = [r for r in _of(records, "accuracy", channels="in blocks") if r["sparsity"]]
    if not found:
        return ""
    test = found[0]["config"]["test"]
    own = [r for r in found if r["config"]["test"] == test]
    ratios = sorted({r["sparsity"] for r in own})
    dense = _mean(records, "accuracy", method="dense", test=test, sparsity=0.0)
    head = f"{own[0]['network']}, {NAMES[test]}, dense {100 * dense:.1f} %"
    lines = [_row([head, *(f"{100 * r:g} %" for r in ratios)]), "|---|" + "---|" * len(ratios)]
    for method in (method for method in DRAWN if _of(own, "accuracy", method=method)):
        means = [_mean(own, "accuracy", method=method, sparsity=r) for r in ratios]
        lines.append(_row([_title(method), *(f"{100 * m:.1f}" for m in means)]))
    return "\n".join(lines)
