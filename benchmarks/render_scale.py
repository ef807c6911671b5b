"""Tables and the picture of `scale.py`; called by `render.py`."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

Record = dict[str, Any]


def of(records: list[Record], *metrics: str, benchmark: str = "scale") -> list[Record]:
    """Records of some metrics."""
    return [r for r in records if r["benchmark"] == benchmark and r["metric"] in metrics]


def line(*cells: Any) -> str:
    """A row of a table."""
    return "| " + " | ".join(map(str, cells)) + " |"


def equality_table(records: list[Record]) -> str:
    """Largest difference from one device: a row for each layout, a column for each curvature and precision."""
    found = of(records, "max_difference")
    columns = [(method, bits) for method in dict.fromkeys(r["method"] for r in found) for bits in (32, 64)]
    cells = {(r["config"]["layout"], r["method"], 64 if r["config"]["x64"] else 32): r["value"] for r in found}
    heads = [f"{method}, {bits} bits" for method, bits in columns]
    lines = [line("largest difference from one device", *heads, "masks that differ"), "|---" * (len(columns) + 2) + "|"]
    for layout in dict.fromkeys(r["config"]["layout"] for r in found):
        values = [cells.get((layout, *column)) for column in columns]
        masks = sum(r["config"]["masks_that_differ"] for r in found if r["config"]["layout"] == layout)
        lines.append(line(layout, *("" if value is None else f"{value:.0e}" for value in values), masks))
    return "\n".join(lines)


def processes_table(records: list[Record]) -> str:
    """Largest difference of several processes from one device: a row for each layout, a column for each stage."""
    found = of(records, "max_difference", benchmark="multihost")
    stages = list(dict.fromkeys(r["column"] for r in found))
    rows: dict[tuple[str, ...], dict[str, float]] = {}
    for r in found:
        c = r["config"]
        case = f"{c['processes']} processes × {c['devices'] // c['processes']}", c["layout"], r["method"], c["dtype"]
        rows.setdefault(case, {})[r["column"]] = r["value"]
    lines = [line("processes", "layout", "curvature", "precision", *stages), "|---" * (len(stages) + 4) + "|"]
    lines += [line(*case, *(f"{v[x]:.0e}" if x in v else "" for x in stages)) for case, v in rows.items()]
    return "\n".join(lines)


def wire_table(records: list[Record]) -> str:
    """Bytes that a device sends, read from the compiled programs, against the cost model."""
    lines = [line("layout", "curvature", "bytes sent", "cost model", "ratio", "gathers of a kernel"), "|---" * 6 + "|"]
    cases: dict[tuple[str, str], dict[str, Record]] = {}
    for r in of(records, "collective_bytes_ratio", "parameter_gathers"):
        cases.setdefault((r["config"]["layout"], r["method"]), {})[r["metric"]] = r
    for case, found in cases.items():
        sent, gathers = ["", "", ""], "scores and updates, to their replicas"
        if "collective_bytes_ratio" in found:
            ratio = found["collective_bytes_ratio"]
            sent = [f"{ratio['config'][key]:,.0f}" for key in ("wire_bytes", "model_bytes")] + [f"{ratio['value']:.3f}"]
        if "parameter_gathers" in found:
            gathers = found["parameter_gathers"]["value"]
        lines.append(line(*case, *sent, gathers))
    return "\n".join(lines)


def curve_table(records: list[Record]) -> str:
    """Seconds and memory as networks grow."""
    lines = [line("weights", "rows", "seconds", "peak MB"), "|---" * 4 + "|"]
    for r in of(records, "seconds"):
        c = r["config"]
        lines.append(line(f"{c['weights']:,}", c["rows"], f"{r['value']:.3g}", f"{c['peak_bytes'] / 1e6:,.0f}"))
    slopes = [
        f"{r['metric'].split('_')[0]} against {r['config']['axis']} {r['value']:.2f}"
        for r in of(records, "time_exponent", "memory_exponent")
    ]
    return "\n".join(lines) + "\n\nExponents of a power law: " + ", ".join(slopes) + "."


def readme_table(records: list[Record]) -> str:
    """All of it, for the documentation."""
    return "\n\n".join([
        "",
        equality_table(records),
        processes_table(records),
        wire_table(records),
        curve_table(records),
        "",
    ])


def table(records: list[Record]) -> str:
    """The page of the record."""
    env = records[0]["env"]
    head = f"# Pruning on many devices\n\nJAX {env['jax']}, {env['device']}; devices simulated on one CPU."
    return head + readme_table(records)


def picture(records: list[Record]) -> Figure:
    """Seconds and memory against the weights."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    points = [r["config"] for r in of(records, "seconds") if r["config"]["axis"] == "weights"]
    x = np.array([p["weights"] for p in points], float)
    time, memory = figure.subplots(1, 2)
    for axes, label, y in (
        (time, "time [s]", np.array([p["seconds"] for p in points])),
        (memory, "peak memory [MB]", np.array([p["peak_bytes"] for p in points]) / 1e6),
    ):
        axes.loglog(x, y, "o-")
        axes.loglog(x, y[-1] * x / x[-1], ":", color="gray", label="linear")
        axes.set_xlabel("weights")
        axes.set_ylabel(label)
        axes.legend(frameon=False)
    return figure
