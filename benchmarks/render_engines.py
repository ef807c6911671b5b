"""Tables and the picture of the engines' records; called by `render.py`."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

Record = dict[str, Any]
ENGINES = ("scan", "rank_k", "primal", "dual", "factored")


def of(records: list[Record], *metrics: str) -> list[Record]:
    """Records of some metrics."""
    return [r for r in records if r["metric"] in metrics]


def markdown(head: list[str], rows: list[list[Any]]) -> list[str]:
    """Lines of a table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return [*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows), ""]


def table(records: list[Record]) -> str:
    """All tables."""
    env = records[0]["env"]
    lines = ["# Curvature engines", "", f"JAX {env['jax']}, {env['device']}. Medians of ratios in one run.", ""]
    lines += ["## Against the paper's rank-1 scan", ""]
    rows = []
    for r in of(records, "speedup_vs_scan"):
        c = r["config"]
        rate = c["flops"] / c["seconds"] / 1e9
        cells = [
            c["form"],
            c["b"],
            c["m"],
            c["blocks"],
            r["method"],
            c["scan"],
            f"{r['value']:.1f}",
            f"{c['seconds']:.4f}",
        ]
        rows.append([*cells, f"{c['flops'] / 1e9:.2f}", f"{c['bytes'] / 1e6:.0f}", f"{rate:.0f}"])
    head = ["form", "b", "m", "blocks", "engine", "scan", "times faster", "s", "Gflop", "MB at least", "Gflop/s"]
    lines += markdown(head, rows)
    lines += ["## Ratios", ""]
    names = ("per_example_over_batch_gradient", "write_rate_fraction", "curvature_over_gradient_time")
    names += ("matmul_rate_fraction", "peak_over_estimate", "path_over_one_update")
    rows = [[r["metric"], r["method"], f"{r['value']:.2f}", _plain(r["config"])] for r in of(records, *names)]
    lines += markdown(["metric", "of", "value", "config"], rows)
    for metric, title in (("diagonal_error", "Diagonal"), ("solve_error", "Solve")):
        lines += [f"## {title}: largest relative error against float64", ""]
        lines += [
            "The diagonal entry by entry; the solve relative to its largest entry. `*`: the damping was raised.",
            "",
        ]
        lines += _errors(of(records, metric))
    grid = of(records, "seconds_with_answers")
    lines += ["## Crossovers: seconds for curvature, diagonal and one product", ""]
    keys = dict.fromkeys((r["config"]["b"], r["config"]["m"]) for r in grid)
    rows = []
    for b, m in keys:
        found = {r["method"]: r["value"] for r in grid if (r["config"]["b"], r["config"]["m"]) == (b, m)}
        best = min(found, key=found.__getitem__)
        cells = [f"**{v:.4f}**" if e == best else f"{v:.4f}" for e, v in found.items()]
        rows.append([b, m, f"{m / b:g}", *cells])
    lines += markdown(["b", "m", "m/b", *dict.fromkeys(r["method"] for r in grid)], rows)
    return "\n".join(lines)


def _plain(config: dict[str, Any]) -> str:
    def number(value: Any) -> str:
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    return ", ".join(f"{name} {number(value)}" for name, value in config.items())


def _errors(records: list[Record]) -> list[str]:
    lines = []
    for kind in dict.fromkeys(r["config"]["gradients"] for r in records):
        chosen = [r for r in records if r["config"]["gradients"] == kind]
        first = chosen[0]["config"]
        title = f"{kind.capitalize()} gradients, b {first['b']}, m {first['m']}"
        lines += [f"{title}, largest eigenvalue {first['largest_eigenvalue']:.2g}.", ""]
        rows = []
        for damping in dict.fromkeys(r["config"]["damping"] for r in chosen):
            found = {r["method"]: r for r in chosen if r["config"]["damping"] == damping}
            cells = [
                f"{r['value']:.0e}" + ("*" if r["config"]["raised_to"] > 1.5 * damping else "") for r in found.values()
            ]
            rows.append([f"{damping:.0e}", *cells])
        lines += markdown(["damping", *ENGINES], rows)
    return lines


def picture(records: list[Record]) -> Figure:
    """Error against damping; and speed against the scan."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    errors = [r for r in of(records, "diagonal_error") if r["config"]["gradients"] == "real"]
    for engine in ENGINES:
        chosen = [r for r in errors if r["method"] == engine]
        left.loglog([r["config"]["damping"] for r in chosen], [r["value"] for r in chosen], "o-", label=engine)
    left.set(xlabel="damping", ylabel="largest relative error of the diagonal", title="Real gradients, float32")
    left.invert_xaxis()
    left.legend(frameon=False)
    bars = [r for r in of(records, "speedup_vs_scan") if r["config"]["scan"] == "one block at a time"]
    names = [f"{r['method']}: b {r['config']['b']}, m {r['config']['m']}, {r['config']['blocks']} blocks" for r in bars]
    right.barh(np.arange(len(bars)), [r["value"] for r in bars], color="tab:blue")
    right.set_yticks(np.arange(len(bars)), names)
    right.axvline(1, color="0.4", linewidth=1)
    right.set(xlabel="times faster than the scan, one block at a time", xscale="log")
    right.invert_yaxis()
    return figure
