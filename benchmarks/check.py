"""Accuracies at small size, on embedded data, against those of `expected.json`: has a change made pruning worse?"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from records import read
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
EXPECTED = HERE / "expected.json"
# Points of accuracy: the standard error is two on 450 test images where half are right, and networks are trained anew,
# with other rounding on another machine.
TOLERANCE = 4.0
RUNS = {
    "one-shot": "one_shot.py --quick --network digits-mlp --methods magnitude joint-staged --sparsities 0.9",
    "gradual": "gradual.py --quick --methods magnitude woodfisher --sparsities 0.9",
}
METRICS = {"accuracy", "final_accuracy"}


def named(record: dict[str, Any]) -> str:
    """What is compared."""
    return record["method"] if record["sparsity"] is None else f"{record['method']} {record['sparsity']:g}"


def measure(command: str) -> dict[str, float]:
    """Accuracies in % of one run, by method and sparsity."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.jsonl"
        words = [sys.executable, str(HERE / command.split()[0]), *command.split()[1:], "--json", str(out)]
        environment = {"OPENBLAS_NUM_THREADS": "1", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"} | os.environ
        done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{command}\n{done.stdout}{done.stderr}")
        records = [one for one in read(out) if one["metric"] in METRICS]
    return {named(one): round(one["value"], 2) for one in records}


def main(*, update: bool) -> int:
    """Compare all runs, or write what is found."""
    found = {name: measure(command) for name, command in RUNS.items()}
    if update:
        EXPECTED.write_text(json.dumps(found, indent=1) + "\n")
        return 0
    expected = json.loads(EXPECTED.read_text())
    table = Table(
        "run", "method", "expected, %", "found, %", "", title=f"worse by more than {TOLERANCE} points is an error"
    )
    worse = False
    for name, values in expected.items():
        for method, value in values.items():
            here = found[name].get(method, float("nan"))
            bad = not here >= value - TOLERANCE
            worse |= bad
            better = here > value + TOLERANCE
            table.add_row(name, method, f"{value:.2f}", f"{here:.2f}", "WORSE" if bad else "better" if better else "")
    Console().print(table)
    return int(worse)
