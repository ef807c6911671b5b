"""Gradual pruning while training: magnitude against curvature, with equal budgets of training steps.

    python benchmarks/gradual.py --dataset mnist --data-dir DIR --seeds 0,1,2 --json OUT.jsonl
    python benchmarks/gradual.py --dataset cifar10 --data-dir DIR --json OUT.jsonl
    python benchmarks/render.py OUT.jsonl

`DIR` holds TFDS directories and `checkpoints/`. On MNIST a LeNet-300-100 is trained, then pruned while it trains on,
then trained at the target. On CIFAR-10 (JPEG-recompressed, so that accuracies are not comparable with published ones)
a ResNet-20 starts from its checkpoint. `--quick` does the same on the embedded digits and needs no folder.
"""

import sys
import time
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from records import Recorder, parser, pin_blas, seeds
from rich.console import Group
from rich.live import Live
from rich.progress import Progress
from rich.table import Table

import woodjax as wj
from woodjax.adapters import nnx as bridge
from woodjax.datasets import Dataset, load_dataset
from woodjax.models import NETWORKS, load_torch_layout
from woodjax.training import accuracy, train

METHODS = {
    "magnitude": "Global magnitude",
    "woodfisher": "Whole Fisher, joint (route A)",
    "window": "Window of gradients, joint (route D)",
}


class Setting(NamedTuple):
    """One table: data, network and budget."""

    dataset: str
    network: str
    weights: str | None  # None trains first
    epochs: int  # of that training
    batch_size: int
    learning_rate: float  # of Adam, cosine to zero over both phases
    prune_steps: int
    prunings: int
    tune_steps: int
    examples: int  # of a refresh
    window: int
    test_examples: int


SETTINGS = {
    "mnist": Setting("mnist", "lenet-300-100", None, 4, 128, 1e-3, 1000, 10, 1000, 512, 256, 10_000),
    "cifar10": Setting(
        "cifar10", "resnet20", "checkpoints/resnet20_cifar10.safetensors", 0, 128, 3e-4, 120, 6, 100, 256, 64, 2000
    ),
    "digits": Setting("digits", "digits-mlp", None, 10, 64, 3e-3, 60, 3, 40, 128, 32, 450),
}


def dense(setting: Setting, data: Dataset, data_dir: Any, seed: int) -> nnx.Module:
    """The trained network that all methods start from."""
    model = NETWORKS[setting.network](nnx.Rngs(seed))
    if setting.weights is None:
        train(model, data, epochs=setting.epochs, seed=seed, batch_size=setting.batch_size, learning_rate=1e-3)
    else:
        load_torch_layout(model, data_dir / setting.weights)
    return model


def twin(model: nnx.Module) -> nnx.Module:
    """A copy with arrays of its own."""
    graph, state = nnx.split(model)
    return nnx.merge(graph, jax.tree.map(jnp.copy, state))


def optimizer(setting: Setting, method: str, schedule: wj.Schedule) -> optax.GradientTransformation:
    """Adam, wrapped in the way that the method needs."""
    steps = setting.prune_steps + setting.tune_steps
    adam = optax.adam(optax.cosine_decay_schedule(setting.learning_rate, steps))
    if method == "magnitude":
        return wj.prune_transform(adam, schedule=schedule, criterion=wj.magnitude_scores)
    if method == "window":
        window = wj.gradient_window(setting.window, examples_per_gradient=setting.batch_size)
        return wj.prune_transform(adam, schedule=schedule, fisher=window)
    return wj.prune_transform(adam, schedule=schedule)


@partial(nnx.jit, donate_argnums=(0, 1))
def train_step(model: nnx.Module, tx: nnx.Optimizer, inputs: Any, labels: Any) -> jax.Array:
    """One step on one batch; donated, or all rows of a window of gradients would be copied."""

    def loss_fn(m: nnx.Module) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(m(inputs), labels).mean()

    loss, gradient = nnx.value_and_grad(loss_fn)(model)
    tx.update(model, gradient)
    return loss


@nnx.jit
def correct(model: nnx.Module, inputs: Any, labels: Any) -> jax.Array:
    """Fraction that is right."""
    return accuracy(model(inputs), labels)


def test_accuracy(model: nnx.Module, data: Dataset, count: int) -> float:
    """In %, on the first `count` test images, in eval mode."""
    model.eval()
    parts = np.array_split(np.arange(min(count, len(data.test_labels))), max(1, count // 1000))
    right = [float(correct(model, data.test_inputs[part], data.test_labels[part])) * len(part) for part in parts]
    model.train()
    return 100 * sum(right) / sum(map(len, parts))


def run(
    setting: Setting, data: Dataset, model: nnx.Module, method: str, target: float, seed: int, show: Any
) -> dict[str, Any]:
    """Prune gradually while training, then train on; what was measured on the way."""
    every = setting.prune_steps // setting.prunings
    schedule = wj.cubic_schedule(begin=0, end=setting.prune_steps, every=every, target=target)
    tx = nnx.Optimizer(model, optimizer(setting, method, schedule), wrt=nnx.Param)
    rng = np.random.default_rng(seed)
    order = np.concatenate([rng.permutation(len(data.train_labels)) for _ in range(20)])
    pool = np.random.default_rng(seed + 1).permutation(len(data.train_labels))
    steps, due, refreshing = setting.prune_steps + setting.tune_steps, [], 0.0
    model.train()
    start = time.perf_counter()
    for step in range(steps):
        batch = order[step * setting.batch_size : (step + 1) * setting.batch_size]
        if not schedule.due(step):
            loss = train_step(model, tx, data.train_inputs[batch], data.train_labels[batch])
            show(method, target, step, loss, tx, due)
            continue
        if method == "woodfisher":  # here the step and the pruning can be told apart
            train_step(model, tx, data.train_inputs[batch], data.train_labels[batch])
        before = test_accuracy(model, data, setting.test_examples)
        mark = time.perf_counter()
        if method == "woodfisher":
            chosen = pool[(len(due) * setting.examples + np.arange(setting.examples)) % len(pool)]
            examples = data.train_inputs[chosen], data.train_labels[chosen]
            info = bridge.refresh(model, tx, examples, schedule(step), measure_loss=True)
        else:
            train_step(model, tx, data.train_inputs[batch], data.train_labels[batch])
            info = bridge.info(tx)
        jax.block_until_ready(info)
        refreshing += time.perf_counter() - mark
        after = test_accuracy(model, data, setting.test_examples)
        due.append({"step": step, "sparsity": float(info.sparsity), "before": before, "after": after, "info": info})
    jax.block_until_ready(nnx.state(model))
    seconds = time.perf_counter() - start
    return {
        "due": due,
        "final": test_accuracy(model, data, setting.test_examples),
        "seconds": seconds,
        "refreshing": refreshing,
        "masks": bridge.masks(tx),
    }


class Screen:
    """Progress bars, and the last prunings in a table that is drawn again and again."""

    def __init__(self, runs: int, steps: int) -> None:
        """Nothing shown yet."""
        self.bars = Progress()
        self.runs = self.bars.add_task("runs", total=runs)
        self.steps = self.bars.add_task("steps", total=steps)

    def table(self, method: str, target: float, due: list[dict[str, Any]]) -> Group:
        """The bars and the table."""
        rows = Table(
            "step", "sparsity %", "accuracy before %", "after %", "predicted change", title=f"{method} {target}"
        )
        for entry in due:
            change = float(entry["info"].predicted_loss_change)
            cells = entry["step"], 100 * entry["sparsity"], entry["before"], entry["after"], change
            rows.add_row(str(cells[0]), *(f"{x:.2f}" for x in cells[1:4]), f"{change:.3g}")
        return Group(rows, self.bars)


def main() -> int:
    """Run one table."""
    pin_blas()
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--dataset", default="mnist", choices=["mnist", "cifar10"])
    options.add_argument("--sparsities", nargs="*", type=float, default=[0.9, 0.95, 0.98])
    options.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    args = options.parse_args()
    setting = SETTINGS["digits" if args.quick else args.dataset]
    if setting.dataset != "digits" and args.data_dir is None:
        options.error(f"--dataset {setting.dataset} needs --data-dir")
    data = load_dataset(setting.dataset, args.data_dir)
    record = Recorder(args.json, "gradual", setting.network, setting.dataset)
    todo = [
        (seed, method, target) for seed in seeds(args.seeds) for target in args.sparsities for method in args.methods
    ]
    screen = Screen(len(todo), setting.prune_steps + setting.tune_steps)
    networks: dict[int, nnx.Module] = {}
    with Live(screen.bars, refresh_per_second=4) as live:

        def show(method: str, target: float, step: int, loss: Any, tx: nnx.Optimizer, due: list[Any]) -> None:
            screen.bars.update(screen.steps, completed=step + 1, description=f"{method} {target}")
            if step % 25 == 0:
                live.update(screen.table(method, target, due))

        for seed, method, target in todo:
            if seed not in networks:
                networks[seed] = dense(setting, data, args.data_dir, seed)
                value = test_accuracy(networks[seed], data, setting.test_examples)
                record.add("final_accuracy", value, "%", method="dense", column=None, seed=seed)
            result = run(setting, data, twin(networks[seed]), method, target, seed, show)
            config = {"title": METHODS[method], **setting._asdict()}
            add = partial(record.add, method=method, column="gradual", sparsity=target, seed=seed)
            add("final_accuracy", result["final"], "%", config=config)
            add("seconds", result["seconds"], "s", config=config)
            add("refresh_seconds", result["refreshing"], "s", config=config)
            for entry in result["due"]:
                at = {"step": entry["step"], "reached": entry["sparsity"]}
                add("accuracy_before_prune", entry["before"], "%", config=at)
                add("accuracy_after_prune", entry["after"], "%", config=at)
                if method != "magnitude":
                    add("predicted_loss_change", float(entry["info"].predicted_loss_change), "nats", config=at)
                if method == "woodfisher":
                    measured = float(entry["info"].loss_after - entry["info"].loss_before)
                    add("measured_loss_change", measured, "nats", config=at)
            screen.bars.advance(screen.runs)
            after = [f"{entry['after']:.1f}" for entry in result["due"]]
            live.console.print(f"seed {seed} {method} {target}: {result['final']:.2f} %, after each pruning {after}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
