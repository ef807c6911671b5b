"""A trained network, its data, and one measured pruning of it: what the command line and the benchmarks do."""

import time
from collections.abc import Callable
from os import PathLike
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from woodjax.adapters.nnx import functional
from woodjax.datasets import READERS, Dataset, load_dataset
from woodjax.losses import cross_entropy
from woodjax.models import NETWORKS, load_torch_layout
from woodjax.one_shot import OneShotInfo, Stage
from woodjax.recipes import Recipe, prune
from woodjax.records import Result, leaf_density
from woodjax.training import evaluate, train
from woodjax.tree import make_layout
from woodjax.typing import ApplyFn, Batch, LossFn, Masks, Params

DEFAULT_NETWORK = {
    "digits": "digits-mlp",
    "mnist": "mlpnet",
    "cifar10": "resnet20",
    "cifar10-subset": "resnet20",
}


class Measured(NamedTuple):
    """A pruned network, and what was measured of it."""

    result: Result
    params: Params
    masks: Masks
    info: OneShotInfo | None  # None for magnitude, which sees no data


class Problem(NamedTuple):
    """A trained network on a data set."""

    network: str
    dataset: Dataset
    apply_fn: ApplyFn  # jitted
    loss_fn: LossFn
    params: Params

    @property
    def pool(self) -> Batch:
        """The train split, on the device."""
        return jnp.asarray(self.dataset.train_inputs), jnp.asarray(self.dataset.train_labels)

    @property
    def num_weights(self) -> int:
        """Number of prunable weights."""
        return make_layout(self.params).num_weights

    def accuracy(self, params: Params) -> float:
        """Test accuracy in [0, 1]."""
        return evaluate(self.apply_fn, params, self.dataset)


def load_problem(
    dataset: str,
    *,
    data_dir: str | PathLike[str] | None = None,
    network: str | None = None,
    weights: str | PathLike[str] | None = None,
    epochs: int = 30,
    seed: int = 0,
    on_epoch: Callable[[], None] = lambda: None,
) -> Problem:
    """Load data and a network, and train it if no weights are given.

    Args:
        dataset: Name, as `woodjax.datasets.load_dataset` takes.
        data_dir: Folder with the data.
        network: Name in `woodjax.models.NETWORKS`; None for the one that fits the data set.
        weights: Torch-layout safetensors file; None trains.
        epochs: Epochs of that training.
        seed: Seed of initial weights and of the order of examples.
        on_epoch: Called after each epoch.

    Returns:
        The problem, network in eval mode.

    Raises:
        ValueError: Unknown name; a network that does not take the data's shape; weights that do
            not fit.
        FileNotFoundError: No data or no weights there.
    """
    if network is None and dataset in READERS and dataset not in DEFAULT_NETWORK:
        raise ValueError(f"No network here fits {dataset!r}: load_problem is for {sorted(DEFAULT_NETWORK)}.")
    data = load_dataset(dataset, data_dir)
    network = network or DEFAULT_NETWORK[dataset]
    if network not in NETWORKS:
        raise ValueError(f"Unknown network {network!r}: choose one of {sorted(NETWORKS)}.")
    model = NETWORKS[network](nnx.Rngs(seed))
    model.eval()
    try:
        jax.eval_shape(*functional(model), data.train_inputs[:1])
    except (TypeError, ValueError) as error:
        shape = data.train_inputs.shape[1:]
        raise ValueError(f"Network {network!r} does not take the inputs of {dataset!r}, shape {shape}.") from error
    if weights is not None:
        load_torch_layout(model, weights)
    else:
        train(model, data, epochs=epochs, seed=seed, on_epoch=on_epoch)
    apply_fn, params = functional(model)
    return Problem(network, data, jax.jit(apply_fn), cross_entropy(apply_fn), params)


def measure(
    problem: Problem,
    name: str,
    recipe: Recipe,
    sparsity: float,
    *,
    examples: int,
    seed: int,
    microbatch_size: int = 64,
    on_stage: Callable[[Stage], None] | None = None,
) -> Measured:
    """Prune once and measure what came out.

    Args:
        problem: What to prune.
        name: Short name of the method, for the record.
        recipe: The method.
        sparsity: Fraction to prune.
        examples: Examples for each stage; at most the train split.
        seed: Decides which.
        microbatch_size: Gradient rows computed at once.
        on_stage: Called after each stage.

    Returns:
        The result, the pruned parameters, the masks and the info.

    Raises:
        ValueError: As `woodjax.prune_one_shot`.
    """
    pool = problem.pool
    start = time.perf_counter()
    pruned, masks, info = prune(
        recipe,
        problem.loss_fn,
        problem.params,
        pool,
        sparsity,
        examples=min(examples, len(pool[1])),
        key=jax.random.key(seed),
        microbatch_size=microbatch_size,
        on_stage=on_stage,
    )
    jax.block_until_ready(pruned)
    seconds = time.perf_counter() - start
    removed = sum(int(jnp.sum(~mask)) for mask in jax.tree.leaves(masks))
    result = Result(
        method=name,
        title=recipe.title,
        column=recipe.column,
        sparsity=sparsity,
        reached=removed / problem.num_weights,
        accuracy=problem.accuracy(pruned),
        seconds=seconds,
        predicted_loss_change=None if info is None else float(info.predicted_loss_change.sum()),
        measured_loss_change=None if info is None else float((info.loss_after - info.loss_before).sum()),
        leaf_density=leaf_density(masks),
    )
    return Measured(result, pruned, masks, info)
