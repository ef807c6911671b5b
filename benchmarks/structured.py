"""Structured pruning: equality over a zoo, scores of channels, fine-tuning with implants, latency.

    python benchmarks/structured.py --data-dir DIR --json OUT.jsonl
    python benchmarks/render.py OUT.jsonl

With `--data-dir` it is ResNet-20 from its checkpoint and CIFAR-10: scores on train images of the recompressed copy,
accuracy on the exact test images and on 2,000 recompressed ones, fine-tuning on recompressed ones. Without, and with
`--quick`, it is a ResNet-8 that is trained on the embedded digits first. `--only` chooses parts.
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from pai_start import load
from records import Recorder, parser, pin_blas, seeds
from rich.progress import track
from structured_latency import WIDE, record_narrow, record_wide
from structured_scores import PROBES, ROW_IMAGES, Case, methods
from structured_tuning import accuracy_of, tune
from structured_zoo import QUICK_ZOO, ZOO, zoo_error

import woodjax as wj
from woodjax.adapters.nnx import functional, functional_variables
from woodjax.datasets import Dataset, load_dataset
from woodjax.models import ResNet, load_torch_layout, resnet20
from woodjax.training import fit, sgd_recipe

PARTS = ("zoo", "scores", "tune", "latency", "wide")
RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5)
QUICK = ("random", "l2", "hap-exact", "hap-3", "obs+compensation", "obs+least-squares")
TEST_IMAGES = 2000
SCORE_IMAGES = 512


class Network(NamedTuple):
    """A trained network and its data."""

    name: str
    model: nnx.Module
    train: Dataset
    tests: dict[str, tuple[np.ndarray, np.ndarray]]  # images and labels by name
    narrow: Callable[[nnx.Rngs], nnx.Module]  # the same with half the widths, untrained


def network_of(data_dir: Path | None, *, quick: bool) -> Network:
    """The network that is pruned."""
    if data_dir is None or quick:
        data = load("digits", None, image_size=8, examples=None)
        model = ResNet(1, widths=(8, 16, 32), rngs=nnx.Rngs(0))
        optimizer = sgd_recipe(0.1, steps=4 * (data.num_train // 64))
        fit(model, data, epochs=4, optimizer=optimizer, seed=0, batch_size=64)
        tests = {"digits": (data.test_inputs, data.test_labels)}
        return Network("resnet8-digits", model, data, tests, lambda rngs: ResNet(1, widths=(4, 8, 16), rngs=rngs))
    model = resnet20(nnx.Rngs(0))
    load_torch_layout(model, data_dir / "checkpoints" / "resnet20_cifar10.safetensors")
    model.eval()
    copy, exact = load_dataset("cifar10", data_dir), load_dataset("cifar10-subset", data_dir)
    order = np.random.default_rng(0).permutation(len(copy.test_labels))[:TEST_IMAGES]
    tests = {
        "exact": (exact.test_inputs, exact.test_labels),
        "jpeg": (copy.test_inputs[order], copy.test_labels[order]),
    }
    return Network("resnet20", model, copy, tests, lambda rngs: ResNet(3, widths=(8, 16, 32), rngs=rngs))


def in_blocks(groups: wj.ChannelGroups) -> frozenset[str]:
    """Groups inside a block: those that one kernel writes."""
    return frozenset(group.name for group in groups.groups if sum(role == "out" for _, _, role in group.places) == 1)


def record_zoo(record: Recorder, *, seed: int, quick: bool) -> None:
    """Every kind of network, masked against smaller."""
    for name in track(QUICK_ZOO if quick else ZOO, "zoo"):
        for streams in ("joint",) if quick else ("joint", "union"):
            error, groups, channels = zoo_error(ZOO[name], streams, seed)
            config = {"kind": name, "streams": streams, "groups": groups, "channels": channels}
            record.add(
                "masked_vs_shrunk_max_error", error, "1", method="random plan", column=None, seed=seed, config=config
            )


def record_scores(
    record: Recorder,
    network: Network,
    *,
    seed: int,
    ratios: tuple[float, ...],
    probes: tuple[int, ...],
    only: frozenset[str] | None,
    row_images: int,
) -> None:
    """Accuracy against the fraction of channels removed, one ranking for all groups inside blocks."""
    apply_fn, params = functional(network.model)
    whole_fn, variables = functional_variables(network.model)
    groups = wj.channel_groups(whole_fn, variables, network.train.test_inputs[:1])
    order = np.random.default_rng(seed).permutation(network.train.num_train)[:SCORE_IMAGES]
    images, labels = (jnp.asarray(x[order]) for x in (network.train.train_inputs, network.train.train_labels))
    names = in_blocks(groups)
    case, jitted = Case(apply_fn, params, groups, images, labels, seed, row_images), jax.jit(apply_fn)
    common = {"column": None, "seed": seed}
    for test, accuracy in accuracies(jitted, params, network).items():
        record.add("accuracy", accuracy, "1", **common, method="dense", sparsity=0.0, config={"test": test})
    chosen = {name: pair for name, pair in methods(probes).items() if only is None or name in only}
    for name, (scores_of, after) in track(chosen.items(), "scores"):
        scores = {group: score for group, score in scores_of(case).items() if group in names}
        for ratio in ratios:
            kept = wj.select_channels(groups, scores, ratio=ratio, max_ratio=1.0).kept
            found = accuracies(jitted, after(case, kept), network)
            for test, accuracy in found.items():
                config = {"test": test, "channels": "in blocks"}
                record.add("accuracy", accuracy, "1", **common, method=name, sparsity=ratio, config=config)


def accuracies(apply_fn: wj.typing.ApplyFn, params: wj.typing.Params, network: Network) -> dict[str, float]:
    """Accuracy on each test set."""
    return {name: accuracy_of(apply_fn, params, *test) for name, test in network.tests.items()}


def main() -> int:
    """Measure the parts that are asked for."""
    pin_blas()
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--methods", help="comma-separated scores; all of them without")
    options.add_argument("--only", help=f"comma-separated, of {', '.join(PARTS)}")
    args = options.parse_args()
    parts = PARTS if args.only is None else tuple(args.only.split(","))
    small = args.quick or args.data_dir is None
    jax.config.update("jax_disable_most_optimizations", args.quick)  # what is not timed is mostly compiled
    if "zoo" in parts:
        for seed in seeds(args.seeds):
            record_zoo(Recorder(args.json, "structured", "zoo", "random"), seed=seed, quick=args.quick)
    if set(parts) - {"zoo", "wide"}:
        network = network_of(args.data_dir, quick=args.quick)
        record = Recorder(args.json, "structured", network.name, "digits 8×8" if small else "cifar10 (recompressed)")
    for seed in seeds(args.seeds):
        if "scores" in parts:
            ratios, probes, rows = (RATIOS[2:3], (3,), 32) if args.quick else (RATIOS, PROBES, ROW_IMAGES)
            chosen = args.methods.split(",") if args.methods else QUICK if args.quick else None
            only = None if chosen is None else frozenset(chosen)
            record_scores(record, network, seed=seed, ratios=ratios, probes=probes, only=only, row_images=rows)
        if "tune" in parts:
            tune(record, network.model, network.train, network.tests, seed=seed, quick=small)
    if "latency" in parts:
        images, narrow = network.train.test_inputs, network.narrow(nnx.Rngs(0))
        repeats, round_to = (10, 4) if small else (50, 8)
        record_narrow(record, network.model, narrow, images, batches=(1, 64), repeats=repeats, round_to=round_to)
    if "wide" in parts:
        names, repeats = (list(WIDE)[-1:], 5) if args.quick else (list(WIDE), 20)
        recorder = partial(Recorder, args.json, "structured", dataset="random")
        record_wide(recorder, names, batches=(1, 64), repeats=repeats, round_to=16)
    return 0


if __name__ == "__main__":
    sys.exit(main())
