r"""Pruning at initialization: what each criterion leaves of each layer, and what trains to how much.

    python benchmarks/pai.py --dataset cifar10 --network vgg16-bn --criterion synflow --sparsity 0.98 \
        --seeds 0,1,2 --data-dir DIR --checkpoints RUNS --json OUT.jsonl
    python benchmarks/render.py OUT.jsonl

One command is one row of a table; several criteria and sparsities make several. What OUT holds already is not done
again, and a training that was stopped goes on from its checkpoint. `--masks-only` scores without training: layer
densities, collapsed layers, effective sparsity, overlaps of the criteria. `--shuffled` trains the control as well: as
many weights in every layer, but random ones. Without `--epochs` and the like the recipe is that of the study:
160 epochs of SGD, momentum 0.9, learning rate 0.03, batches of 512, weight decay 5e-4.

`--quick` does all of it on the embedded digits with a slim VGG and needs no folder.
"""

import sys
from collections.abc import Iterator
from functools import cached_property
from itertools import combinations, product
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from diagonals import Network, record_diagonals
from flax import nnx
from pai_start import Start, load, one_pass, start
from records import Recorder, parser, pin_blas, read, seeds
from rich.progress import Progress

import woodjax as wj
from woodjax.adapters import nnx as bridge
from woodjax.datasets import READERS, augment
from woodjax.models import NETWORKS
from woodjax.training import evaluate_model, fit, sgd_recipe
from woodjax.typing import Masks, Scores

QUICK = {
    "dataset": "digits",
    "network": "vgg-slim",
    "criterion": ["random", "magnitude", "synflow", "hutchinson-diagonal"],
    "sparsity": [0.98],
    "image_size": 16,
    "epochs": 3,
    "learning_rate": 0.05,
    "decay": "cosine",
    "batch_size": 64,
    "per_class": 2,
}
SCORING = ("examples", "image_size", "per_class")  # options that masks depend on
TRAINING = ("epochs", "batch_size", "learning_rate", "weight_decay", "decay", "augment")  # and accuracies


class Cell(NamedTuple):
    """One network, pruned and trained."""

    method: str  # a criterion, "-shuffled" behind it for the control, or "dense"
    sparsity: float | None
    seed: int
    warm: bool

    @property
    def title(self) -> str:
        """For tables."""
        known = wj.INIT_CRITERIA.get(self.method.removesuffix("-shuffled"))
        return known.title if known else "Dense"


class Study:
    """All cells of one command."""

    def __init__(self, args: Any) -> None:
        """Read the data; find out what is done."""
        self.args = args
        self.data = load(args.dataset, args.data_dir, image_size=args.image_size, examples=args.examples)
        self.record = Recorder(args.json, "pai", args.network, args.dataset)
        self.scores: dict[tuple[Any, ...], Scores] = {}

    @cached_property
    def finished(self) -> set[tuple[Any, ...]]:
        """Cells and metrics that the file holds already."""
        if not self.args.json.exists():
            return set()
        found = [r for r in read(self.args.json) if "warm_up" in r["config"]]
        for r in found:
            differing = [
                k for k in (*SCORING, *TRAINING) if r["config"].get(k, getattr(self.args, k)) != getattr(self.args, k)
            ]
            if differing or (r["network"], r["dataset"]) != (self.args.network, self.args.dataset):
                raise SystemExit(f"{self.args.json} holds records of another study ({differing}): pass another file.")
        return {(r["method"], r["sparsity"], r["seed"], r["config"]["warm_up"], r["metric"]) for r in found}

    def add(self, cell: Cell, metric: str, value: float, unit: str = "", **config: Any) -> None:
        """Record one number of a cell."""
        column = {"accuracy": None if cell.sparsity is None else "trained"}.get(metric, "mask")
        scoring = {name: getattr(self.args, name) for name in SCORING}
        config = {"title": cell.title, "warm_up": cell.warm} | scoring | config
        place = {"method": cell.method, "sparsity": cell.sparsity, "seed": cell.seed}
        self.record.add(metric, value, unit, column=column, config=config, **place)

    def masks(self, begin: Start, cell: Cell) -> Masks:
        """Prune, and record what is left; scores of one round serve every sparsity."""
        criterion, key = wj.INIT_CRITERIA[cell.method], (cell.method, cell.seed, cell.warm)
        if key in self.scores:
            masks = wj.make_masks(self.scores[key], cell.sparsity)
        else:
            masks, info = wj.prune_at_init(
                begin.apply_fn if criterion.data else begin.cold_fn,
                begin.params,
                begin.batch,
                cell.sparsity,
                jax.random.key(cell.seed),
                criterion=cell.method,
                select=begin.select,
            )
            if criterion.rounds == 1:
                self.scores[key] = info.scores
        if (*cell, "collapsed_layers") in self.finished:
            return masks
        report = wj.layer_collapse_report(masks, select=begin.select)
        for path, density in report.density.items():
            self.add(cell, "density", float(density), layer=path)
        # Layer normalisation lets no positive flow through.
        if not self.args.quick and not self.args.network.startswith("vit"):
            effective = wj.effective_masks(begin.cold_fn, begin.params, masks, begin.batch, select=begin.select)
            left = wj.layer_collapse_report(effective, select=begin.select)
            self.add(cell, "effective_sparsity", float(left.sparsity))
        self.add(cell, "lowest_density", float(report.lowest_density))
        self.add(cell, "collapsed_layers", int(report.collapsed), "layers")
        return masks

    def trained(self, begin: Start, cell: Cell, masks: Masks | None) -> None:
        """Train under masks and record the test accuracy, unless that is done."""
        if (*cell, "accuracy") in self.finished:
            return
        args = self.args
        steps = args.epochs * (self.data.num_train // args.batch_size)
        optimizer = sgd_recipe(args.learning_rate, steps=steps, decay=args.decay, weight_decay=args.weight_decay)
        graph, state = nnx.split(begin.model)
        model = nnx.merge(graph, jax.tree.map(jnp.copy, state))
        recipe = {name: getattr(args, name) for name in TRAINING}
        everything = args.dataset, args.network, *cell, *recipe.values(), *(getattr(args, name) for name in SCORING)
        diverged = False
        try:
            fit(
                model,
                self.data,
                epochs=args.epochs,
                optimizer=optimizer,
                seed=cell.seed,
                batch_size=args.batch_size,
                masks=masks,
                augment=augment if args.augment else None,
                checkpoint_dir=args.checkpoints and args.checkpoints / "-".join(map(str, everything)),
            )
        except FloatingPointError:  # the model is that of the last whole epoch
            diverged = True
        # The running average of a short training is not the statistics of the network that came out.
        bridge.reestimate_batch_stats(model, one_pass(self.data, cell.seed))
        value = 100 * evaluate_model(model, self.data)
        self.add(cell, "accuracy", value, "%", diverged=diverged, **recipe)

    def overlaps(self, begin: Start, found: dict[Cell, Masks]) -> None:
        """Share of the kept weights that two criteria have in common."""
        kept = {cell: _flat(masks, begin) for cell, masks in found.items()}
        for one, other in combinations(kept, 2):
            both = one._replace(method=f"{one.method} & {other.method}")
            if (*both, "overlap") not in self.finished:
                share = float((kept[one] & kept[other]).sum() / max(kept[one].sum(), 1))
                self.add(both, "overlap", share, criteria=[one.method, other.method])

    def run(self) -> None:
        """Every cell."""
        args = self.args
        warmths = {"on": (True,), "off": (False,), "both": (False, True)}[args.warm_up]
        groups = list(product(seeds(args.seeds), warmths))
        with Progress() as bars:
            task = bars.add_task("", total=len(groups) * len(args.sparsity) * len(args.criterion))
            for seed, warm in groups:
                begin = start(args.network, self.data, seed, warm=warm, per_class=args.per_class)
                if args.dense:
                    self.trained(begin, Cell("dense", None, seed, warm), None)
                for sparsity in args.sparsity:
                    found = {}
                    for cell in (Cell(criterion, sparsity, seed, warm) for criterion in args.criterion):
                        bars.update(task, description=f"{cell.method} {sparsity} seed {seed}{' warm' if warm else ''}")
                        found[cell] = self.masks(begin, cell)
                        if not args.masks_only:
                            for variant, masks in self.variants(begin, cell, found[cell]):
                                self.trained(begin, variant, masks)
                        bars.advance(task)
                    self.overlaps(begin, found)

    def variants(self, begin: Start, cell: Cell, masks: Masks) -> Iterator[tuple[Cell, Masks]]:
        """The masks, and the control where it is asked for; random masks are their own."""
        yield cell, masks
        if self.args.shuffled and cell.method != "random":
            shuffled = wj.shuffle_masks(masks, jax.random.key(cell.seed), select=begin.select)
            yield cell._replace(method=f"{cell.method}-shuffled"), shuffled


def _flat(masks: Masks, begin: Start) -> np.ndarray:
    layout = wj.make_layout(begin.params, select=begin.select)
    leaves = zip(layout.leaves, jax.tree.leaves(masks), strict=True)
    return np.concatenate([np.asarray(mask).ravel() for spec, mask in leaves if spec.selected])


def diagonals(study: Study) -> None:
    """How far the diagonals of the scores are from the truth, on the network of the study."""
    begin = start(study.args.network, study.data, 0, warm=True, per_class=2)
    network = Network(begin.apply_fn, begin.params, begin.batch)
    record_diagonals(study.record, network, seed=0, probes=(10,), temperatures=(1.0,), kinds=("batch",))


def main() -> int:
    """Run the cells that are asked for."""
    pin_blas()
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--dataset", default="cifar10", choices=[*READERS, "imagenet"])
    options.add_argument("--network", default="vgg16-bn", choices=sorted(NETWORKS))
    options.add_argument("--criterion", nargs="*", default=list(wj.INIT_CRITERIA), choices=list(wj.INIT_CRITERIA))
    options.add_argument("--sparsity", nargs="*", type=float, default=[0.9, 0.95, 0.98, 0.99])
    options.add_argument("--warm-up", default="on", choices=["on", "off", "both"])
    options.add_argument("--per-class", type=int, default=10, help="examples of each class to score with")
    options.add_argument("--masks-only", action="store_true")
    options.add_argument("--shuffled", action="store_true", help="train the control as well")
    options.add_argument("--dense", action="store_true", help="train the whole network as well")
    options.add_argument("--image-size", type=int, help="resize to this; None leaves images as they are")
    options.add_argument("--examples", type=int, help="of the train split; None for all")
    options.add_argument("--epochs", type=int, default=160)
    options.add_argument("--batch-size", type=int, default=512)
    options.add_argument("--learning-rate", type=float, default=0.03)
    options.add_argument("--weight-decay", type=float, default=5e-4)
    options.add_argument("--decay", default="steps", choices=["steps", "cosine", "constant"])
    options.add_argument("--augment", action="store_true", help="random crops and flips")
    options.add_argument("--checkpoints", type=Path, help="folder; stopped trainings go on from it")
    args = options.parse_args()
    if args.quick:
        vars(args).update(QUICK)
    if args.dataset != "digits" and args.data_dir is None:
        options.error(f"--dataset {args.dataset} needs --data-dir")
    study = Study(args)
    if args.quick:
        diagonals(study)
    study.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
