"""Tables and pictures from records: `python benchmarks/render.py RECORDS.jsonl ...`.

Writes `NAME.md` and `NAME.png` beside each file of records, and the table between the marks
`<!-- NAME -->` and `<!-- end NAME -->` of the README and the pages of `docs/`, where they have them.
"""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import render_at_init_cost
import render_diagonals
import render_engines
import render_gradual
import render_inverse_quality
import render_language_model
import render_limited_data
import render_one_shot
import render_overhead
import render_pai
import render_robustness
import render_scale
import render_structured
from records import read

OTHERS = {
    "at_init_cost": render_at_init_cost,
    "diagonals": render_diagonals,
    "engines": render_engines,
    "gradual": render_gradual,
    "inverse_quality": render_inverse_quality,
    "language_model": render_language_model,
    "limited_data": render_limited_data,
    "one_shot": render_one_shot,
    "pai": render_pai,
    "robustness": render_robustness,
    "scale": render_scale,
    "structured": render_structured,
    "transform_overhead": render_overhead,
}
ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def update_marks(name: str, text: str) -> None:
    """Put a table between its marks, in the README and in the documentation."""
    start, end = f"<!-- {name} -->", f"<!-- end {name} -->"
    for page in PAGES:
        found = page.read_text()
        if start in found:
            before, rest = found.split(start)
            page.write_text(f"{before}{start}\n{text}\n{end}{rest.split(end)[1]}")


def renderer(records: list[dict[str, Any]]) -> ModuleType:
    """What draws records of this benchmark."""
    return OTHERS[records[0]["benchmark"]]


def write(file: Path, *, marks: bool) -> None:
    """Table and picture beside a file of records, and with `marks` the tables in README and documentation."""
    records = list(read(file))
    other = renderer(records)
    file.with_suffix(".md").write_text(other.table(records))
    if hasattr(other, "picture"):
        other.picture(records).savefig(file.with_suffix(".png"), dpi=120)
    if marks and hasattr(other, "readme_table"):
        update_marks(file.stem, other.readme_table(records))


if __name__ == "__main__":
    for name in sys.argv[1:]:
        write(Path(name), marks=True)
