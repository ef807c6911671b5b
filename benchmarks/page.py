"""`results/README.md`: all records on one page, with their commands, and pictures of what a gain costs."""

from pathlib import Path

import render
import render_pareto
from records import read
from registry import RECORDS, RESULTS, Record

HEAD = """# Records

Every number of the documentation comes from here. `python benchmarks list` says what there is; `python benchmarks run
NAME --data-dir DIR` makes a record again, by the commands under its heading with the data folder and `--json` added.
This page is written by `python benchmarks page`.

## What accuracy costs

Accuracy against the time of a run, compilation included; the line is the Pareto front, what no other method beats in
both. One stage of anything is cheap: what pays is to recompute the curvature.
*First order* descends on the labels as well, which is training: not to be compared with the others blindly.

![Accuracy against seconds, with the Pareto front](pareto.png)
"""


def section(record: Record) -> str:
    """Heading, environment, table, picture and command of one record."""
    file = RESULTS / f"{record.name}.jsonl"
    found = list(read(file))
    renderer = render.renderer(found)
    made = sorted({(one["env"]["woodjax"], one["env"]["jax"], one["env"]["device"]) for one in found})
    made = "; ".join(f"woodjax {woodjax}, JAX {jax}, {device}" for woodjax, jax, device in made)
    lines = [f"## {record.title}", "", f"{len(found):,} measurements, {made}. [All tables]({record.name}.md),"]
    lines += [f"[measurements]({record.name}.jsonl), [what they say](../../docs/{record.page}.md).", ""]
    if hasattr(renderer, "readme_table") and (table := renderer.readme_table(found)):
        lines += [table, ""]
    if file.with_suffix(".png").exists():
        lines += [f"![{record.title}]({record.name}.png)", ""]
    return "\n".join([*lines, "```sh", *(f"python benchmarks/{command}" for command in record.commands), "```"])


def write() -> int:
    """Write the page and its picture."""
    render_pareto.picture(RESULTS).savefig(RESULTS / "pareto.png", dpi=120)
    costs = "## What many devices cost\n\nA model, nothing run: [table](scale_costs.md), by `scale_table.py`."
    page = Path(RESULTS / "README.md")
    page.write_text("\n\n".join([HEAD.rstrip(), *map(section, RECORDS), costs]) + "\n")
    print(f"Wrote {page.relative_to(RESULTS.parent.parent)}.")
    return 0
