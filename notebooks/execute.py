"""Run the notebooks from their .py sources.

    python notebooks/execute.py                      # all of them in full, and write the .ipynb with outputs
    python notebooks/execute.py 1_one_shot           # one of them
    python notebooks/execute.py --small --check      # what CI does: small sizes, nothing written

Every notebook runs in a temporary directory, so that its files do not stay; the first cell that fails ends the run.
Full runs read MNIST and CIFAR-10 from the folder that `WOODJAX_DATA_DIR` names.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import jupytext
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError
from nbformat import NotebookNode
from rich.progress import Progress

FOLDER = Path(__file__).parent
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
TIMEOUT = 3600  # seconds for a cell; a busy machine takes long


class NotebookError(Exception):
    """A cell failed."""


def names() -> list[str]:
    """All notebooks, in their order."""
    return sorted(path.stem for path in FOLDER.glob("[0-9]_*.py"))


def read(name: str) -> NotebookNode:
    """A notebook without outputs, the same bytes for the same source."""
    notebook = jupytext.read(FOLDER / f"{name}.py", fmt="py:percent")
    notebook.metadata = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    for i, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{i}", {}
    return notebook


def execute(name: str, bars: Progress) -> NotebookNode:
    """Run a notebook; raise `NotebookError` at the first cell that fails."""
    notebook = read(name)
    task = bars.add_task(name, total=len(notebook.cells))
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook,
            kernel_name="python3",
            timeout=TIMEOUT,
            record_timing=False,
            coalesce_streams=True,
            extra_arguments=["--IPKernelApp.log_level=ERROR"],  # it warns that it talks over local sockets
            resources={"metadata": {"path": folder}},
            on_cell_start=lambda cell, cell_index: bars.update(task, completed=cell_index),
        )
        try:
            client.execute()
        except (CellExecutionError, CellTimeoutError, RuntimeError, AssertionError) as error:  # the last: a dead kernel
            number = int(bars.tasks[task].completed)
            first = notebook.cells[number].source.splitlines()[0]
            raise NotebookError(
                f"{name}.py failed in cell {number}, which begins `{first}`:\n{str(error) or repr(error)}"
            ) from error
    bars.update(task, completed=len(notebook.cells))
    # The kernel's own version is no part of the notebook: another patch release would be a change of every file.
    notebook.metadata = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    return notebook


def main() -> int:
    """Run those that are asked for."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(names())}; none for all")
    options.add_argument("--small", action="store_true", help="small sizes: seconds instead of minutes")
    options.add_argument("--check", action="store_true", help="only run, write no .ipynb")
    args = options.parse_args()
    chosen = [Path(name).stem for name in args.names] or names()
    if unknown := sorted(set(chosen) - set(names())):
        options.error(f"no notebook {', '.join(unknown)}: choose of {', '.join(names())}")
    os.environ["WOODJAX_SMALL"] = str(int(args.small))
    if args.small:  # nearly all of a small run is compiling
        os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    with Progress() as bars:
        for name in chosen:
            start = time.perf_counter()
            try:
                notebook = execute(name, bars)
            except NotebookError as error:
                bars.stop()
                print(error, file=sys.stderr)
                return 1
            if not args.check:
                jupytext.write(notebook, FOLDER / f"{name}.ipynb", fmt="ipynb")
            bars.console.print(f"{name}: {time.perf_counter() - start:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
