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
from itertools import combinations, product
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from diagonals import Network, record_diagonals
from flax import nnx
from records import Recorder, parser, read, seeds
from rich.progress import Progress

import woodjax as wj
from woodjax.adapters import nnx as bridge
from woodjax.datasets import Dataset, augment, load_dataset
from woodjax.models import NETWORKS, torch_init
from woodjax.training import evaluate_model, fit, sgd_recipe
from woodjax.typing import Batch, Masks

WARM_UP_BATCH = 500
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
    "per_class": 5,
}


class Start(NamedTuple):
    """A network before training, and the examples that it is scored with."""

    model: nnx.Module
    apply_fn: Any
    params: Any
    batch: Batch
    select: Any


def prepare(data: Dataset, image_size: int | None, examples: int | None) -> Dataset:
    """Fewer train examples, and images of another size: averaged where smaller, repeated where larger."""
    if examples is not None:
        data = data._replace(train_inputs=data.train_inputs[:examples], train_labels=data.train_labels[:examples])
    if image_size is None:
        return data

    def resize(images: np.ndarray) -> np.ndarray:
        n, size, _, channels = images.shape
        if image_size > size:
            images = images.repeat(image_size // size, axis=1).repeat(image_size // size, axis=2)
            return images.repeat(3 // channels, axis=3)
        k = size // image_size
        return images.reshape(n, image_size, k, image_size, k, channels).mean(axis=(2, 4)).astype(np.float32)

    return data._replace(train_inputs=resize(data.train_inputs), test_inputs=resize(data.test_inputs))


def of_each_class(data: Dataset, count: int, seed: int) -> Batch:
    """That many train examples of each class, in random order."""
    order = np.random.default_rng(seed).permutation(data.num_train)
    chosen = np.concatenate([order[data.train_labels[order] == c][:count] for c in np.unique(data.train_labels)])
    return data.normalise(data.train_inputs[chosen]), jnp.asarray(data.train_labels[chosen])


def one_pass(data: Dataset, seed: int) -> Iterator[Any]:
    """The train split in large batches of one size, for batch statistics."""
    parts = max(1, data.num_train // WARM_UP_BATCH)
    batches = data.train_batches(batch_size=data.num_train // parts, seed=seed, epoch=0)
    return (data.normalise(images) for images, _ in batches)


def start(network: str, data: Dataset, seed: int, *, warm: bool, per_class: int) -> Start:
    """A network with torch's initial weights, its batch statistics warm or as they begin."""
    rngs = nnx.Rngs(seed)
    classes = int(data.train_labels.max()) + 1
    model = NETWORKS[network](rngs) if classes == 10 else NETWORKS[network](rngs, classes=classes)
    torch_init(model, rngs)
    if warm:
        bridge.warm_up_batch_stats(model, one_pass(data, seed))
    model.eval()
    apply_fn, params = bridge.functional(model)
    batch = of_each_class(data, per_class, seed)
    return Start(model, apply_fn, params, batch, wj.hidden_kernels(apply_fn, params, batch[0]))


def finished(file: Any) -> set[tuple[Any, ...]]:
    """What a file holds already."""
    if not file.exists():
        return set()
    return {
        (r["network"], r["dataset"], r["method"], r["sparsity"], r["seed"], r["config"].get("warm_up"), r["metric"])
        for r in read(file)
    }


class Study:
    """All cells of one command."""

    def __init__(self, args: Any) -> None:
        """Read the data; find out what is done."""
        self.args = args
        self.data = prepare(load_dataset(args.dataset, args.data_dir), args.image_size, args.examples)
        self.record = Recorder(args.json, "pai", args.network, args.dataset)
        self.finished = finished(args.json)

    def is_done(self, method: str, sparsity: float | None, seed: int, warm: bool, metric: str) -> bool:
        """Is there a record of it?"""
        key = (self.args.network, self.args.dataset, method, sparsity, seed, warm, metric)
        return key in self.finished

    def masks(self, begin: Start, criterion: str, sparsity: float, seed: int, warm: bool) -> Masks:
        """Prune, and record what is left."""
        key = jax.random.key(seed)
        masks, info = wj.prune_at_init(
            begin.apply_fn, begin.params, begin.batch, sparsity, key, criterion=criterion, select=begin.select
        )
        if self.is_done(criterion, sparsity, seed, warm, "collapsed_layers"):
            return masks
        report, config = info.report, {"title": wj.INIT_CRITERIA[criterion].title, "warm_up": warm}
        place = {"method": criterion, "column": "mask", "sparsity": sparsity, "seed": seed}
        for path, density in report.density.items():
            self.record.add("density", float(density), "", **place, config=config | {"layer": path})
        try:
            effective = wj.effective_masks(begin.apply_fn, begin.params, masks, begin.batch, select=begin.select)
            left = wj.layer_collapse_report(effective, select=begin.select)
            self.record.add("effective_sparsity", float(left.sparsity), "", **place, config=config)
        except ValueError:  # layer normalisation lets no positive flow through
            pass
        self.record.add("lowest_density", float(report.lowest_density), "", **place, config=config)
        self.record.add("collapsed_layers", int(report.collapsed), "layers", **place, config=config)
        return masks

    def train(
        self, begin: Start, masks: Masks | None, method: str, sparsity: float | None, seed: int, warm: bool
    ) -> float:
        """Train under masks; test accuracy in %."""
        args = self.args
        steps = args.epochs * (self.data.num_train // args.batch_size)
        optimizer = sgd_recipe(args.learning_rate, steps=steps, decay=args.decay, weight_decay=args.weight_decay)
        graph, state = nnx.split(begin.model)
        model = nnx.merge(graph, jax.tree.map(jnp.copy, state))
        name = f"{args.dataset}-{args.network}-{method}-{sparsity}-{seed}-{warm}"
        fit(
            model,
            self.data,
            epochs=args.epochs,
            optimizer=optimizer,
            seed=seed,
            batch_size=args.batch_size,
            masks=masks,
            augment=augment if args.augment else None,
            checkpoint_dir=args.checkpoints and args.checkpoints / name,
        )
        # The running average of a short training is not the statistics of the network that came out.
        bridge.reestimate_batch_stats(model, one_pass(self.data, seed))
        return 100 * evaluate_model(model, self.data)

    def trained(
        self, begin: Start, masks: Masks | None, method: str, sparsity: float | None, seed: int, warm: bool
    ) -> None:
        """Train and record, unless that is done."""
        if self.is_done(method, sparsity, seed, warm, "accuracy"):
            return
        try:
            value = self.train(begin, masks, method, sparsity, seed, warm)
        except FloatingPointError:  # a network that is cut can still diverge
            value = float("nan")
        args, criterion = self.args, method.removesuffix("-shuffled")
        title = wj.INIT_CRITERIA[criterion].title if criterion in wj.INIT_CRITERIA else "Dense"
        recipe = ("epochs", "batch_size", "learning_rate", "weight_decay", "decay", "examples", "image_size", "augment")
        config = {"title": title, "warm_up": warm} | {name: getattr(args, name) for name in recipe}
        column = None if masks is None else "trained"
        self.record.add(
            "accuracy", value, "%", method=method, column=column, sparsity=sparsity, seed=seed, config=config
        )

    def overlaps(self, found: dict[str, Masks], begin: Start, sparsity: float, seed: int, warm: bool) -> None:
        """Share of the kept weights that two criteria have in common."""
        kept = {name: _flat(masks, begin) for name, masks in found.items()}
        for one, other in combinations(kept, 2):
            if self.is_done(f"{one} & {other}", sparsity, seed, warm, "overlap"):
                continue
            share = float((kept[one] & kept[other]).sum() / max(kept[one].sum(), 1))
            config = {"warm_up": warm, "criteria": [one, other]}
            self.record.add(
                "overlap",
                share,
                "",
                method=f"{one} & {other}",
                column="mask",
                sparsity=sparsity,
                seed=seed,
                config=config,
            )

    def run(self) -> None:
        """Every cell."""
        args = self.args
        warmths = {"on": (True,), "off": (False,), "both": (False, True)}[args.warm_up]
        cells = list(product(seeds(args.seeds), warmths, args.sparsity))
        with Progress() as bars:
            task = bars.add_task("", total=len(cells) * len(args.criterion))
            for seed, warm, group in _grouped(cells):
                begin = start(args.network, self.data, seed, warm=warm, per_class=args.per_class)
                if args.dense:
                    self.trained(begin, None, "dense", None, seed, warm)
                for sparsity in group:
                    found = {}
                    for criterion in args.criterion:
                        where = f"{criterion} {sparsity} seed {seed}{' warm' if warm else ''}"
                        bars.update(task, description=where)
                        found[criterion] = self.masks(begin, criterion, sparsity, seed, warm)
                        if not args.masks_only:
                            self.trained(begin, found[criterion], criterion, sparsity, seed, warm)
                        if args.shuffled and not args.masks_only and criterion != "random":
                            shuffled = wj.shuffle_masks(found[criterion], jax.random.key(seed), select=begin.select)
                            self.trained(begin, shuffled, f"{criterion}-shuffled", sparsity, seed, warm)
                        bars.advance(task)
                    self.overlaps(found, begin, sparsity, seed, warm)


def _grouped(cells: list[tuple[int, bool, float]]) -> Iterator[tuple[int, bool, list[float]]]:
    for seed, warm in dict.fromkeys(cell[:2] for cell in cells):
        yield seed, warm, [cell[2] for cell in cells if cell[:2] == (seed, warm)]


def _flat(masks: Masks, begin: Start) -> np.ndarray:
    layout = wj.make_layout(begin.params, select=begin.select)
    leaves = zip(layout.leaves, jax.tree.leaves(masks), strict=True)
    return np.concatenate([np.asarray(mask).ravel() for spec, mask in leaves if spec.selected])


def diagonals(study: Study, seed: int) -> None:
    """How far the diagonals of the scores are from the truth, on the network of the study."""
    begin = start(study.args.network, study.data, seed, warm=True, per_class=2)
    network = Network(begin.apply_fn, begin.params, begin.batch)
    record_diagonals(study.record, network, seed=seed, probes=(10,), temperatures=(1.0,), kinds=("batch",))


def main() -> int:
    """Run the cells that are asked for."""
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--dataset", default="cifar10")
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
    study = Study(args)
    if args.quick:
        diagonals(study, 0)
    study.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
