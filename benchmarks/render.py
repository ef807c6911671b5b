"""Tables and pictures from records: `python benchmarks/render.py RECORDS.jsonl ...`.

Writes `NAME.md` and `NAME.png` beside each file of records, and the table between the marks
`<!-- NAME -->` and `<!-- end NAME -->` of the README and the pages of `docs/`, where they have them.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import published
import render_at_init_cost
import render_diagonals
import render_engines
import render_gradual
import render_inverse_quality
import render_language_model
import render_limited_data
import render_overhead
import render_pai
import render_robustness
import render_scale
import render_structured
from matplotlib.figure import Figure
from records import read

from woodjax.plots import draw_accuracy
from woodjax.report import Result

Record = dict[str, Any]
OTHERS = {
    "at_init_cost": render_at_init_cost,
    "diagonals": render_diagonals,
    "engines": render_engines,
    "gradual": render_gradual,
    "inverse_quality": render_inverse_quality,
    "language_model": render_language_model,
    "limited_data": render_limited_data,
    "pai": render_pai,
    "robustness": render_robustness,
    "scale": render_scale,
    "structured": render_structured,
    "transform_overhead": render_overhead,
}
ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def values(records: list[Record], method: str, sparsity: float, metric: str) -> list[float]:
    """Values of one cell, one for each seed."""
    return [r["value"] for r in records if (r["method"], r["sparsity"], r["metric"]) == (method, sparsity, metric)]


def cell(numbers: list[float]) -> str:
    """Mean, and standard deviation where there are several seeds."""
    if not numbers:
        return ""
    spread = f" ± {np.std(numbers, ddof=1):.2f}" if len(numbers) > 1 else ""
    return f"{np.mean(numbers):.2f}{spread}"


def readme_table(records: list[Record], levels: list[float]) -> str:
    """Accuracy by method at a few sparsities."""
    rows = {r["method"]: r for r in records if r["metric"] == "accuracy" and r["sparsity"] is not None}
    dense = next(r for r in records if r["method"] == "dense")
    head = f"{dense['network']} on {dense['dataset']}, dense {dense['value']:.2f} %"
    lines = [f"| {head} | column | " + " | ".join(f"{100 * s:g} %" for s in levels) + " |"]
    lines += ["|---|---|" + "---|" * len(levels)]
    for method, row in rows.items():
        cells = [cell(values(records, method, s, "accuracy")) for s in levels]
        lines.append("| " + " | ".join([row["config"]["title"], row["column"], *cells]) + " |")
    return "\n".join(lines)


def update_marks(name: str, text: str) -> None:
    """Put a table between its marks, in the README and in the documentation."""
    start, end = f"<!-- {name} -->", f"<!-- end {name} -->"
    for page in PAGES:
        found = page.read_text()
        if start in found:
            before, rest = found.split(start)
            page.write_text(f"{before}{start}\n{text}\n{end}{rest.split(end)[1]}")


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


def main() -> int:
    """Render every file that is named."""
    for name in sys.argv[1:]:
        file = Path(name)
        records = list(read(file))
        if records[0]["benchmark"] in OTHERS:
            other = OTHERS[records[0]["benchmark"]]
            file.with_suffix(".md").write_text(other.table(records))
            if hasattr(other, "picture"):
                other.picture(records).savefig(file.with_suffix(".png"), dpi=120)
            if hasattr(other, "readme_table"):
                update_marks(file.stem, other.readme_table(records))
            continue
        file.with_suffix(".md").write_text(table(records))
        picture(records).savefig(file.with_suffix(".png"), dpi=120)
        levels = sorted({r["sparsity"] for r in records if r["sparsity"] is not None})
        update_marks(file.stem, readme_table(records, levels[-4:]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
