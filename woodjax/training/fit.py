"""Plain training of a classifier, whole or under masks.

A training is a function of its arguments alone: the order of examples is one of `(seed, epoch)`, the augmentation one
of `(seed, step)`. So a run that was killed goes on from its last checkpoint to the same bits.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import lru_cache, partial
from os import PathLike
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, Key, PyTree, Shaped

from woodjax.adapters.nnx import TrainFn, functional_train
from woodjax.datasets import Dataset, Normalise, TrainingData
from woodjax.training.checkpoints import Checkpoints
from woodjax.transform import find_state, prune_transform, set_masks
from woodjax.tree import apply_masks
from woodjax.typing import Masks, Params

Augment = Callable[[Key[Array, ""], Any], Any]

AHEAD = 16  # steps that the host may be ahead of the device: more would only hold more batches


class EpochInfo(NamedTuple):
    """What `fit` says after an epoch."""

    epoch: int  # epochs done
    steps: int  # steps done
    losses: Float[np.ndarray, " steps"]  # mean over the batch, of each step of this epoch


class _State(NamedTuple):
    params: Params
    rest: PyTree  # batch statistics, counts of random numbers
    opt_state: optax.OptState
    step: Int[Array, ""]


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
    steps = _check(dataset, epochs, batch_size, seed, label_smoothing, checkpoint_every)
    if isinstance(dataset, Dataset):
        dataset = dataset.on_device()
    model.train()
    forward, params, rest = functional_train(model)
    model.eval()  # what on_epoch looks at
    transform = _transform(optimizer, params, masked=masks is not None)
    opt_state = transform.init(params)
    if masks is not None:
        opt_state, params = set_masks(opt_state, masks), apply_masks(params, masks)
    # Steps donate their state; the model keeps arrays of its own.
    state = jax.tree.map(jnp.copy, _State(params, rest, opt_state, jnp.zeros((), jnp.int32)))
    options = {"optimizer": transform, "normalise": dataset.normalise, "augment": augment}
    step = partial(_step, forward, jax.random.key(seed), label_smoothing=float(label_smoothing), **options)
    with ExitStack() as stack:
        first, checkpoints = 0, None
        if checkpoint_dir is not None:
            settings = {"dataset": dataset.name, "examples": dataset.num_train, "batch_size": batch_size, "seed": seed}
            settings |= {"label_smoothing": float(label_smoothing), "masks": None if masks is None else _digest(masks)}
            checkpoints = stack.enter_context(Checkpoints(checkpoint_dir, settings))
            first, state = checkpoints.restore(state) or (0, state)
        _write(model, state)
        for epoch in range(first, epochs):
            batches = dataset.train_batches(batch_size=batch_size, seed=seed, epoch=epoch)
            state, losses = _run(step, state, batches, epoch * steps)
            _write(model, state)
            done = epoch + 1
            if checkpoints is not None and (done % checkpoint_every == 0 or done == epochs):
                checkpoints.save(done, state)
            if on_epoch is not None:
                on_epoch(EpochInfo(done, done * steps, losses))
    model.eval()


def _check(
    dataset: TrainingData, epochs: int, batch_size: int, seed: int, label_smoothing: float, checkpoint_every: int
) -> int:
    # Steps of an epoch.
    for name, value, least in (
        ("epochs", epochs, 1),
        ("batch_size", batch_size, 1),
        ("seed", seed, 0),
        ("checkpoint_every", checkpoint_every, 1),
    ):
        if value < least:
            raise ValueError(f"{name} is {value}: pass at least {least}.")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing is {label_smoothing}: pass a number in [0, 1).")
    if dataset.num_train < batch_size:
        raise ValueError(
            f"batch_size is {batch_size} and {dataset.name!r} has {dataset.num_train} training examples: an epoch "
            "would have no step. Pass a smaller batch_size."
        )
    return dataset.num_train // batch_size


def _transform(optimizer: optax.GradientTransformation, params: Params, *, masked: bool) -> Any:
    if not masked:
        return optimizer
    try:
        find_state(jax.eval_shape(optimizer.init, params))
    except ValueError:
        return _under_masks(optimizer)
    return optimizer


@lru_cache(maxsize=32)
def _under_masks(optimizer: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    # The same object again, so that `_step` is not compiled anew.
    return prune_transform(optimizer)


def _run(
    step: Callable[..., tuple[_State, Float[Array, ""]]], state: _State, batches: Iterator[Any], before: int
) -> tuple[_State, Float[np.ndarray, " steps"]]:
    losses: list[float] = []
    pending: deque[Float[Array, ""]] = deque()

    def settle() -> None:
        losses.append(float(pending.popleft()))
        if not np.isfinite(losses[-1]):
            raise FloatingPointError(
                f"The loss of step {before + len(losses) - 1} is {losses[-1]}: lower the learning rate, warm it up, or "
                "look for examples that are not finite and labels that are not among the classes."
            )

    for images, labels in batches:
        state, loss = step(state, images, labels)
        pending.append(loss)
        if len(pending) > AHEAD:
            settle()
    while pending:
        settle()
    return state, np.asarray(losses)


@partial(jax.jit, static_argnames=("optimizer", "normalise", "augment", "label_smoothing"), donate_argnames=("state",))
def _step(
    forward: TrainFn,
    key: Key[Array, ""],
    state: _State,
    images: Shaped[Array, "n ..."],
    labels: Int[Array, " n"],
    *,
    optimizer: optax.GradientTransformation,
    normalise: Normalise,
    augment: Augment | None,
    label_smoothing: float,
) -> tuple[_State, Float[Array, ""]]:
    if augment is not None:
        images = augment(jax.random.fold_in(key, state.step), images)
    inputs = normalise(images)

    def loss_fn(params: Params) -> tuple[Float[Array, ""], PyTree]:
        logits, rest = forward(params, state.rest, inputs)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        if label_smoothing:
            uniform = -jnp.mean(jax.nn.log_softmax(logits), axis=-1)
            loss = (1 - label_smoothing) * loss + label_smoothing * uniform
        return jnp.mean(loss), rest

    (loss, rest), gradient = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    return _State(optax.apply_updates(state.params, updates), rest, opt_state, state.step + 1), loss


def _write(model: nnx.Module, state: _State) -> None:
    for kind, values in ((nnx.Param, state.params), (nnx.Not(nnx.Param), state.rest)):
        current = nnx.state(model, kind)
        nnx.replace_by_pure_dict(current, jax.tree.map(jnp.copy, values))
        nnx.update(model, current)


def _digest(masks: Masks) -> str:
    digest = hashlib.sha256()
    for mask in jax.tree.leaves(masks):
        digest.update(np.packbits(np.asarray(mask)).tobytes())
    return digest.hexdigest()


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
