"""One-shot pruning with few examples, and with examples that have no labels.

    python benchmarks/limited_data.py --data-dir DIR --seeds 0,1,2 --json OUT.jsonl
    python benchmarks/render.py OUT.jsonl

MLPNet on MNIST by the call without knobs, from 1 to 500 examples of each class; without labels they are drawn once from
the dense network. `--quick` takes two sizes.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from records import Recorder, parser, seeds
from rich.progress import track

import woodjax as wj
from woodjax.comparison import Problem, load_problem
from woodjax.tree import apply_masks
from woodjax.typing import Batch

PER_CLASS = (1, 2, 5, 10, 50, 500)
SPARSITY = 0.9
TITLES = {
    "labels": "No knobs, labels",
    "no_labels": "No knobs, no labels",
    "fixed": "Joint, one stage, labels",
    "magnitude": "Magnitude",
}


def few_of_each(problem: Problem, per_class: int, seed: int) -> Batch:
    """That many examples of each class, in random order."""
    inputs, labels = problem.pool
    order = np.random.default_rng(seed).permutation(len(labels))
    found = [order[np.asarray(labels)[order] == label][:per_class] for label in np.unique(np.asarray(labels))]
    chosen = np.random.default_rng(seed).permutation(np.concatenate(found))
    return inputs[chosen], labels[chosen]


def prune(problem: Problem, method: str, per_class: int, seed: int) -> float:
    """Test accuracy in % of one pruning."""
    key = jax.random.key(seed)
    if method == "magnitude":
        masks = wj.make_masks(wj.magnitude_scores(problem.params), SPARSITY)
        return 100 * problem.accuracy(apply_masks(problem.params, masks))
    inputs, labels = few_of_each(problem, per_class, seed)
    if method == "no_labels":
        labels = wj.sample_labels(problem.apply_fn, problem.params, inputs, key)
    fixed = wj.FIXED if method == "fixed" else {}
    pruned, _, _ = wj.prune_one_shot(
        problem.loss_fn, problem.params, (inputs, jnp.asarray(labels)), SPARSITY, key=key, **fixed
    )
    return 100 * problem.accuracy(pruned)


def main() -> int:
    """Measure every size, with and without labels."""
    args = parser(__doc__.splitlines()[0]).parse_args()
    if args.data_dir is None:
        raise SystemExit("--data-dir is missing: the folder with the MNIST TFDS directory and checkpoints/.")
    weights = args.data_dir / "checkpoints/mlpnet_mnist.safetensors"
    problem = load_problem("mnist", data_dir=args.data_dir, network="mlpnet", weights=weights)
    record = Recorder(args.json, "limited_data", "mlpnet", "mnist")
    record.add("accuracy", 100 * problem.accuracy(problem.params), "%", method="dense", column=None)
    sizes = PER_CLASS[1:4:2] if args.quick else PER_CLASS
    todo = [(m, n, s) for m in ("labels", "no_labels", "fixed") for n in sizes for s in seeds(args.seeds)]
    for method, per_class, seed in track([("magnitude", 0, 0), *todo]):
        record.add(
            "accuracy",
            prune(problem, method, per_class, seed),
            "%",
            method=method,
            column={"magnitude": "mask", "fixed": "update"}.get(method, "staged"),
            sparsity=SPARSITY,
            seed=seed,
            config={"title": TITLES[method], "per_class": per_class},
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
