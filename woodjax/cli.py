"""The command line: `woodjax prune` prunes a network one-shot by several methods and compares them."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from woodjax.comparison import Measured, Problem
    from woodjax.curvature.damping import Damping
    from woodjax.records import Run
    from woodjax.report import Page

SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98)
METHODS = ("magnitude", "diagonal", "woodfisher", "joint", "joint-staged", "auto")
OTHERS = ("sum", "woodfisher-staged", "auto-first-order")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Words after the program's name; None reads `sys.argv`.

    Returns:
        Exit code: 0, or 2 for a mistake of the user's, with one line on standard error.
    """
    options = _parser().parse_args(arguments)
    try:
        _prune(options)
    except ModuleNotFoundError as error:
        return _fail(f"{error}: install the extras, pip install 'woodjax[examples,data]'")
    except (ValueError, OSError) as error:
        return _fail(str(error))
    return 0


def _fail(message: str) -> int:
    line = " ".join(message.split())
    print(f"woodjax: error: {line}", file=sys.stderr)
    return 2


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, as every other mistake; `--help` shows the usage."""
        sys.exit(_fail(message))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="woodjax", description="Second-order model compression in JAX.")
    commands = parser.add_subparsers(dest="command", required=True)
    prune = commands.add_parser(
        "prune",
        help="prune a network one-shot by several methods and compare them",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = prune.add_argument
    add("--dataset", default="digits", help="digits (embedded), mnist, cifar10 or cifar10-subset")
    add("--data-dir", type=Path, help="folder with the data; WOODJAX_DATA_DIR serves as well")
    add("--network", help="digits-mlp, mlpnet, resnet20 or resnet20-b; by default what fits the dataset")
    add("--weights", type=Path, help="torch-layout safetensors file; without it the network is trained first")
    add("--epochs", type=int, default=30, help="epochs of that training")
    add("--sparsity", type=float, nargs="+", default=SPARSITIES, help="fractions to prune")
    add("--method", nargs="+", default=METHODS, help="which of: " + ", ".join([*METHODS, *OTHERS]))
    add("--examples", type=int, default=1000, help="examples of the train split for each stage; auto chooses by itself")
    add(
        "--damping",
        default="1%",
        help="a number, a percentage of the mean diagonal of the Fisher, or auto",
    )
    add("--block-size", type=int, default=512, help="block size of woodfisher")
    add("--stages", type=int, default=16, help="stages of the staged methods")
    add("--microbatch-size", type=int, default=64, help="per-example gradients computed at once")
    add("--seed", type=int, default=0, help="seed of initial weights, training and examples")
    add(
        "--out",
        type=Path,
        default=Path("woodjax-out"),
        help="folder for report.html and .json, summary.png and arrays",
    )
    return parser


def _damping(text: str) -> "Damping":
    from woodjax.curvature.damping import Relative

    if text == "auto":
        return "auto"
    try:
        return Relative(float(text[:-1]) / 100) if text.endswith("%") else float(text)
    except ValueError as error:
        raise ValueError(f"--damping is {text!r}: pass a positive number such as 1e-5, 1%, or auto.") from error


def _prune(options: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

    from woodjax.comparison import load_problem, measure
    from woodjax.plots import nearest_level, summary_figure
    from woodjax.recipes import recipes
    from woodjax.records import Run, save_arrays
    from woodjax.sparsities import check_sparsity

    known = recipes(damping=_damping(options.damping), block_size=options.block_size, stages=options.stages)
    for name in options.method:
        if name not in known:
            raise ValueError(f"Unknown method {name!r}: choose among {sorted(known)}.")
    for level in options.sparsity:
        check_sparsity(level)
    if min(options.examples, options.microbatch_size) < 1:
        raise ValueError("--examples and --microbatch-size are at least 1.")

    console = Console()
    columns = (*Progress.get_default_columns()[:-1], MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bars:
        training = bars.add_task("training", total=options.epochs, visible=False)
        problem = load_problem(
            options.dataset,
            data_dir=options.data_dir,
            network=options.network,
            weights=options.weights,
            epochs=options.epochs,
            seed=options.seed,
            on_epoch=lambda: bars.update(training, advance=1, visible=True),
        )
        arrays = options.out / "arrays"
        arrays.mkdir(parents=True, exist_ok=True)
        run = Run(
            network=problem.network,
            dataset=options.dataset,
            seed=options.seed,
            dense_accuracy=problem.accuracy(problem.params),
            config={name: _plain(value) for name, value in vars(options).items()} | {"network": problem.network},
        )
        shown, best = nearest_level(options.sparsity), None
        for name in options.method:
            stages = sum(known[name].stages_to(sparsity) for sparsity in options.sparsity)
            bar = bars.add_task(known[name].title, total=stages)
            for sparsity in options.sparsity:
                measured = measure(
                    problem,
                    name,
                    known[name],
                    sparsity,
                    examples=0 if known[name].curvature == "auto" else options.examples,
                    seed=options.seed,
                    microbatch_size=options.microbatch_size,
                    on_stage=lambda _, bar=bar: bars.advance(bar),
                )
                run.results.append(measured.result)
                save_arrays(arrays / f"{name}-{sparsity:g}.safetensors", measured.params, measured.masks)
                run.save(options.out / "report.json")
                if sparsity == shown and (best is None or measured.result.accuracy > best.result.accuracy):
                    best = measured
    summary_figure(run).savefig(options.out / "summary.png", dpi=150)
    if best is not None:
        page = _page(problem, run, best)
        page.save(options.out / "report.html")
    console.print(run.table())
    console.print(f"Records, picture, weights and masks are in {options.out}/; look at {options.out}/report.html.")


def _page(problem: "Problem", run: "Run", best: "Measured") -> "Page":
    """The page of the best network of a run, beside all others."""
    import numpy as np

    from woodjax.report import report

    result = best.result
    return report(
        problem.params,
        best.params,
        best.masks,
        best.info,
        evaluate=problem.accuracy,
        magnitude=all(r.method != "magnitude" for r in run.results),
        history=run.results,
        apply_fn=problem.apply_fn,
        example=np.asarray(problem.dataset.test_inputs[:1]),
        seconds=result.seconds,
        title=f"{run.network} on {run.dataset}, {100 * result.sparsity:g} % pruned",
        notes=f"{result.title}: the most accurate of {len({r.method for r in run.results})} methods at this sparsity, "
        f"one-shot, seed {run.seed}. Accuracies are those of the test split, by which this network was picked.",
    )


def _plain(value: object) -> object:
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value
