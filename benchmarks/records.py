"""One measurement, one line of JSON; and the options that every benchmark takes."""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from woodjax.records import environment

RESULTS = Path(__file__).parent / "results"


def parser(description: str) -> argparse.ArgumentParser:
    """Options that every benchmark takes."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--data-dir", type=Path, help="folder with data and checkpoints")
    options.add_argument("--seeds", default="0", help="comma-separated, for example 0,1,2")
    options.add_argument("--json", type=Path, required=True, help="JSON lines are appended here")
    options.add_argument("--quick", action="store_true", help="the same metrics at a small size")
    return options


def seeds(text: str) -> list[int]:
    """Read `0,1,2`."""
    return [int(word) for word in text.split(",")]


def pin_blas() -> None:
    """Start again with OpenBLAS on one thread, unless that was chosen.

    XLA calls its Cholesky on CPU. Its threads wait by spinning, and on a machine with few cores they keep them from
    XLA's own: factors then take many times longer.
    """
    if "OPENBLAS_NUM_THREADS" not in os.environ:
        environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
        os.execve(sys.executable, [sys.executable, *sys.argv], environment)


class Recorder:
    """Appends records of one benchmark to a file of JSON lines."""

    def __init__(self, file: Path, benchmark: str, network: str, dataset: str) -> None:
        """Open nothing yet; every record is written as it comes."""
        self.file = file
        self.common = {"benchmark": benchmark, "network": network, "dataset": dataset}
        self.environment = environment()

    def add(
        self,
        metric: str,
        value: float,
        unit: str,
        *,
        method: str,
        column: str | None,
        sparsity: float | None = None,
        seed: int | None = None,
        config: dict[str, Any] | None = None,
    ) -> None:
        """Append one measurement."""
        record = {
            **self.common,
            "method": method,
            "column": column,
            "sparsity": sparsity,
            "seed": seed,
            "metric": metric,
            "value": value,
            "unit": unit,
            "config": config or {},
            "env": self.environment,
        }
        with self.file.open("a") as out:
            out.write(json.dumps(record) + "\n")


def read(file: Path) -> Iterator[dict[str, Any]]:
    """Records of a file."""
    with file.open() as lines:
        yield from map(json.loads, lines)
