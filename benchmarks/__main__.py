"""All benchmarks by one command: `python benchmarks list`, `run`, `render`, `page`, `check`.

    python benchmarks list                                 # records, and whether they need data
    python benchmarks run one_shot_mlpnet --data-dir DIR   # makes a record again in `out/`, and its table
    python benchmarks render one_shot_mlpnet               # tables and pictures of records here; without a name of all
    python benchmarks page                                 # results/README.md: all tables and pictures on one page
    python benchmarks check                                # small runs on embedded data against `expected.json`

Options behind `--` go to the scripts: `python benchmarks run gradual_lenet --data-dir DIR -- --methods magnitude`.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import check
import page
import render
from registry import BY_NAME, RECORDS, RESULTS
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent


def show() -> int:
    """Say what there is."""
    table = Table("record", "what", "data folder", "measurements", title="benchmarks/results")
    for record in RECORDS:
        file = RESULTS / f"{record.name}.jsonl"
        count = sum(1 for _ in file.open()) if file.exists() else 0
        table.add_row(record.name, record.title, "needed" if record.folder else "", f"{count:,}")
    Console().print(table)
    return 0


def run(name: str, data_dir: str | None, out: Path, further: list[str]) -> int:
    """Make one record again, command after command, and its table."""
    record = BY_NAME[name]
    if record.folder and not data_dir:
        sys.exit(f"{name} reads real data: give --data-dir, or set WOODJAX_DATA_DIR.")
    out.mkdir(parents=True, exist_ok=True)
    file = out / f"{name}.jsonl"
    # Several threads of OpenBLAS spin, and keep the cores from XLA.
    environment = {"OPENBLAS_NUM_THREADS": "1"} | os.environ
    for words in record.lines(str(data_dir), str(file)):
        command = [sys.executable, str(HERE / words[0]), *words[1:], *further]
        print("+", *command[1:], flush=True)
        done = subprocess.run(command, env=environment, check=False)
        if done.returncode:
            return done.returncode
    render.write(file, marks=False)
    print(f"Wrote {file} and {file.with_suffix('.md')}.")
    return 0


def main() -> int:
    """Read the command."""
    words, further = sys.argv[1:], []
    if "--" in words:
        words, further = words[: words.index("--")], words[words.index("--") + 1 :]
    options = argparse.ArgumentParser(
        prog="python benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = options.add_subparsers(dest="command", required=True)
    commands.add_parser("list")
    one = commands.add_parser("run")
    one.add_argument("record", choices=sorted(BY_NAME), metavar="RECORD")
    one.add_argument("--data-dir", default=os.environ.get("WOODJAX_DATA_DIR"), help="folder with data and checkpoints")
    one.add_argument("--out", type=Path, default=Path("out"), help="folder that the record goes to")
    some = commands.add_parser("render")
    some.add_argument("records", nargs="*", choices=[*sorted(BY_NAME), []], metavar="RECORD")
    commands.add_parser("page")
    commands.add_parser("check").add_argument("--update", action="store_true", help="write what is found")
    chosen = options.parse_args(words)
    if chosen.command == "list":
        return show()
    if chosen.command == "run":
        return run(chosen.record, chosen.data_dir, chosen.out, further)
    if chosen.command == "render":
        for name in chosen.records or BY_NAME:
            render.write(RESULTS / f"{name}.jsonl", marks=True)
        return page.write()
    if chosen.command == "page":
        return page.write()
    return check.main(update=chosen.update)


if __name__ == "__main__":
    sys.exit(main())
