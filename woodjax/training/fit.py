"""Plain training of a model, whole or under masks."""

from collections.abc import Callable
from functools import lru_cache
from os import PathLike

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from woodjax.adapters.nnx import functional_train
from woodjax.datasets import TrainingData
from woodjax.training.loop import Augment, EpochInfo, fit_network
from woodjax.typing import Masks, Params, PyTree


def fit(
    model: nnx.Module,
    dataset: TrainingData,
    *,
    epochs: int,
    optimizer: optax.GradientTransformation,
    seed: int,
    batch_size: int = 128,
    masks: Masks | None = None,
    augment: Augment | None = None,
    label_smoothing: float = 0.0,
    checkpoint_dir: str | PathLike[str] | None = None,
    checkpoint_every: int = 1,
    on_epoch: Callable[[EpochInfo], None] | None = None,
) -> None:
    """Train a classifier in place by softmax cross-entropy; leaves it in eval mode.

    Under `masks` pruned weights are exactly zero from before the first step to the end, whatever the optimizer does
    (weight decay, momentum): by `prune_transform` around it. An optimizer that holds a `prune_transform` already is
    taken as it is, with these masks in it.

    A call with the same kind of model and the same `optimizer` and `augment` objects compiles nothing anew: other
    masks, seeds and weights are arguments of one program.

    Args:
        model: An NNX module; its call takes a batch of inputs and returns logits.
        dataset: Where the train split comes from. A `Dataset` is put on the device where it fits there; bytes are
            normalised in the step.
        epochs: Passes over the train split, at least 1.
        optimizer: For example of `sgd_recipe`; a schedule in it counts steps.
        seed: Decides the order of examples and the augmentation; not negative.
        batch_size: Examples in a step; the rest of an epoch that does not fill one is left out of it.
        masks: Nested dict of bool, of the structure that `woodjax.adapters.nnx.functional` gives the parameters; None
            trains every weight.
        augment: `augment(key, images) -> images`, applied in the step before normalisation, for example
            `woodjax.datasets.augment`.
        label_smoothing: Weight of the uniform distribution in the targets, in [0, 1).
        checkpoint_dir: Folder for checkpoints; a run that finds one there goes on from it, if it has the same masks,
            data, batch size and seed. Optimizer, `augment`, `epochs` and first weights are not compared: another
            recipe needs another folder. None keeps none.
        checkpoint_every: Epochs between checkpoints; the last epoch is always saved.
        on_epoch: Called after each epoch, with the model up to date and in eval mode.

    Raises:
        ValueError: An argument out of its range; fewer examples than `batch_size`; masks that do not fit the
            parameters; a checkpoint of another training.
        ImportError: `checkpoint_dir` without Orbax.
        FloatingPointError: The loss of a step is not finite. The model is as after the last whole epoch.

    Cost:
        `epochs` forward and backward passes. Memory: parameters and optimizer state, two copies of the parameters for
        the model, 16 batches.

    References:
        Goyal et al., Accurate, large minibatch SGD, 2017 (arXiv 1706.02677), section 2; Szegedy et al. 2015 (arXiv
        1512.00567), section 7: label smoothing.

    Example:
        >>> from flax import nnx
        >>> from woodjax.datasets import load_dataset
        >>> from woodjax.models import digits_mlp
        >>> from woodjax.training import evaluate_model, fit, sgd_recipe
        >>> digits, model = load_dataset("digits"), digits_mlp(nnx.Rngs(0))
        >>> sgd = sgd_recipe(0.1, steps=5 * (digits.num_train // 64))
        >>> fit(model, digits, epochs=5, optimizer=sgd, seed=0, batch_size=64)
        >>> evaluate_model(model, digits) > 0.8
        True
    """
    model.train()
    forward, params, rest = functional_train(model)
    model.eval()  # what on_epoch looks at

    def tell(info: EpochInfo | None, params: Params, rest: PyTree) -> None:
        _write(model, params, rest)
        if info is not None and on_epoch is not None:
            on_epoch(info)

    fit_network(
        forward,
        params,
        rest,
        dataset,
        epochs=epochs,
        optimizer=optimizer,
        seed=seed,
        batch_size=batch_size,
        masks=masks,
        augment=augment,
        label_smoothing=label_smoothing,
        checkpoint_dir=checkpoint_dir,
        checkpoint_every=checkpoint_every,
        on_epoch=tell,
    )
    model.eval()


def _write(model: nnx.Module, params: Params, rest: PyTree) -> None:
    for kind, values in ((nnx.Param, params), (nnx.Not(nnx.Param), rest)):
        current = nnx.state(model, kind)
        nnx.replace_by_pure_dict(current, jax.tree.map(jnp.copy, values))
        nnx.update(model, current)


@lru_cache(maxsize=32)
def _adam(learning_rate: float, steps: int) -> optax.GradientTransformation:
    return optax.adam(optax.cosine_decay_schedule(learning_rate, steps))


def train(
    model: nnx.Module,
    dataset: TrainingData,
    *,
    epochs: int,
    seed: int,
    batch_size: int = 64,
    learning_rate: float = 3e-3,
    on_epoch: Callable[[], None] = lambda: None,
) -> None:
    """`fit` by Adam with a cosine schedule, for small networks that there is to be something to prune.

    Args:
        model: An NNX module; its call takes a batch of inputs.
        dataset: Where the train split comes from.
        epochs: Passes over the train split.
        seed: Decides the order of examples.
        batch_size: Examples in a step; the rest of an epoch that does not fill one is dropped.
        learning_rate: Peak learning rate.
        on_epoch: Called after each epoch.

    Raises:
        ValueError: As `fit`.

    Cost:
        `epochs` forward and backward passes over the train split.
    """
    optimizer = _adam(learning_rate, max(1, epochs * (dataset.num_train // batch_size)))

    def tell(_: EpochInfo) -> None:
        on_epoch()

    fit(model, dataset, epochs=epochs, optimizer=optimizer, seed=seed, batch_size=batch_size, on_epoch=tell)
