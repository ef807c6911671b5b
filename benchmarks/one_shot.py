"""One-shot pruning against published accuracies, and the time of each part.

    python benchmarks/one_shot.py --network mlpnet --data-dir DIR --seeds 0,1,2,3,4 --json OUT.jsonl
    python benchmarks/render.py OUT.jsonl

`DIR` holds the TFDS directories, `cifar10_exact_subset.npz` and `checkpoints/`. `--quick` prunes MLPNet to three
sparsities with fewer gradients, or, without a folder, a small network trained on the embedded digits.
"""

import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
from records import Recorder, parser, seeds
from rich.progress import Progress

from woodjax import (
    compensate,
    contract,
    low_rank_fisher,
    make_masks,
    obs_scores,
    per_example_gradients,
)
from woodjax.comparison import Problem, load_problem, measure
from woodjax.one_shot import OneShotInfo, Stage
from woodjax.recipes import Recipe, recipes


class Row(NamedTuple):
    """One row of the table."""

    recipe: Recipe
    examples: int
    damping: float | None  # None: the method chooses


class Setting(NamedTuple):
    """One table."""

    dataset: str
    weights: str | None
    sparsities: tuple[float, ...]
    rows: dict[str, Row]


def row(name: str, examples: int = 0, damping: float = 1e-5, **options: Any) -> Row:
    """A recipe by name, with its damping and number of examples."""
    return Row(recipes(damping=damping, **options)[name], examples, damping if examples else None)


def setting(network: str, *, quick: bool) -> Setting:
    """What is measured for a network, and how."""
    automatic = {"auto": row("auto"), "auto-first-order": row("auto-first-order")}
    if network == "mlpnet" and quick:
        rows = {
            "magnitude": row("magnitude"),
            "auto": Row(recipes()["auto"], 400, None),
        }
        return Setting("mnist", "checkpoints/mlpnet_mnist.safetensors", (0.9, 0.95, 0.98), rows)
    if network == "mlpnet":
        return Setting(
            "mnist",
            "checkpoints/mlpnet_mnist.safetensors",
            (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98),
            {
                "magnitude": row("magnitude"),
                "diagonal": row("diagonal", 4000, 1e-5),
                "woodfisher": row("woodfisher", 1000, 1e-5),
                "sum": row("sum", 4000, 1e-3),
                "joint": row("joint", 1000, 1e-5),
                "joint-staged": row("joint-staged", 1000, 1e-5, stages=16),
                **automatic,
            },
        )
    if network == "resnet20":
        return Setting(
            "cifar10-subset",
            "checkpoints/resnet20_cifar10.safetensors",
            (0.5, 0.6, 0.7, 0.8, 0.9),
            {
                "magnitude": row("magnitude"),
                "diagonal": row("diagonal", 500, 1e-5),
                "woodfisher": row("woodfisher", 500, 1e-4),
                "woodfisher-staged": row("woodfisher-staged", 500, 1e-4, stages=8),
                "joint": row("joint", 500, 1e-4),
                "joint-staged": row("joint-staged", 500, 1e-4, stages=8),
                **automatic,
            },
        )
    rows = {
        "magnitude": row("magnitude"),
        "joint": row("joint", 500),
        "joint-staged": row("joint-staged", 500, stages=4),
        **automatic,
    }
    return Setting("digits", None, (0.5, 0.9), rows)


def published_count(sparsity: float, size: int) -> float:
    """Sparsity of the published tables, which keep `int(n·(1 − s))` weights in float arithmetic.

    That is one weight fewer than `n − round(s·n)` at some levels: enough to change the second digit of a
    test accuracy on 10,000 images.
    """
    return 1 - int(size * (1 - sparsity)) / size


def seconds(function: Callable[[], Any]) -> tuple[Any, float]:
    """Result and time of the second of two calls."""
    jax.block_until_ready(function())
    start = time.perf_counter()
    result = jax.block_until_ready(function())
    return result, time.perf_counter() - start


def time_parts(problem: Problem, examples: int, damping: float | None, sparsity: float) -> dict[str, float]:
    """Seconds of each part of one stage with the whole-network Fisher, compiled before."""
    params = problem.params
    batch = jax.tree.map(lambda x: x[:examples], problem.pool)
    build = jax.jit(partial(low_rank_fisher, damping=damping))
    score = jax.jit(obs_scores)
    select = jax.jit(make_masks)
    move = jax.jit(compensate)
    gram = jax.jit(lambda g: contract("ib,jb->ij", g, g))
    gradients, gradient_time = seconds(
        lambda: per_example_gradients(problem.loss_fn, params, batch, microbatch_size=64)
    )
    fisher, build_time = seconds(lambda: build(gradients))
    scores, score_time = seconds(lambda: score(params, fisher))
    masks, mask_time = seconds(lambda: select(scores, sparsity))
    _, update_time = seconds(lambda: move(params, masks, fisher))
    _, floor = seconds(lambda: gram(fisher.gradients[:, 0]))
    return {
        "one product G·Gᵀ": floor,
        "gradients": gradient_time,
        "curvature": build_time,
        "scores": score_time,
        "masks": mask_time,
        "update": update_time,
    }


def main() -> int:
    """Run one table."""
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--network", default="mlpnet", choices=["mlpnet", "resnet20", "digits-mlp"])
    options.add_argument("--sparsities", help="only these of the table, comma-separated")
    options.add_argument("--methods", nargs="*", help="only these rows; none for the times of the parts alone")
    args = options.parse_args()
    network = "digits-mlp" if args.quick and not args.data_dir else "mlpnet" if args.quick else args.network
    plan = setting(network, quick=args.quick)
    weights = None if plan.weights is None else args.data_dir and args.data_dir / plan.weights
    if plan.weights and not weights:
        options.error(f"--network {network} needs --data-dir with {plan.weights}")
    problem = load_problem(plan.dataset, data_dir=args.data_dir, network=network, weights=weights)
    record = Recorder(args.json, "one_shot", network, plan.dataset)
    record.add("accuracy", 100 * problem.accuracy(problem.params), "%", method="dense", column=None)

    rows = plan.rows if args.methods is None else {name: plan.rows[name] for name in args.methods}
    levels = tuple(map(float, args.sparsities.split(","))) if args.sparsities else plan.sparsities
    todo = [
        (name, seed, sparsity)
        for name, entry in rows.items()
        for seed in (seeds(args.seeds) if entry.recipe.curvature else [0])
        for sparsity in levels
    ]
    with Progress() as bars:
        bar = bars.add_task(network, total=len(todo))
        for name, seed, sparsity in todo:
            recipe, examples, damping = rows[name]
            target = published_count(sparsity, problem.num_weights)
            infos: list[OneShotInfo | None] = []

            def on_stage(stage: Stage, infos: list[OneShotInfo | None] = infos) -> None:
                infos.append(stage.info)

            result = measure(problem, name, recipe, target, examples=examples, seed=seed, on_stage=on_stage).result
            config = {"title": recipe.title, "examples": examples, "damping": damping, "stages": len(infos)}
            info = infos[-1]
            if recipe.curvature == "auto" and info is not None:
                config["examples"] = int(info.rows * info.examples_per_gradient)
                config |= {"rows": int(info.rows), "held_out": int(info.held_out)}
            add = partial(record.add, method=name, column=recipe.column, sparsity=sparsity, seed=seed, config=config)
            add("accuracy", 100 * result.accuracy, "%")
            add("seconds", result.seconds, "s")
            if result.predicted_loss_change is not None:
                add("predicted_loss_change", result.predicted_loss_change, "nats")
                add("measured_loss_change", result.measured_loss_change, "nats")
            bars.advance(bar)
            bars.console.print(f"{name} seed {seed} sparsity {sparsity}: {100 * result.accuracy:.2f} %")
    if "joint" not in plan.rows:
        return 0
    timed = plan.rows["joint"]
    for part, value in time_parts(problem, timed.examples, timed.damping, 0.9).items():
        config = {"examples": timed.examples}
        record.add(f"seconds_{part}", value, "s", method="joint", column=None, config=config)
    return 0


if __name__ == "__main__":
    sys.exit(main())
