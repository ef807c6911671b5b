"""The training loop: of functions, whole or under masks.

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
from jaxtyping import Array, Float, Int, Key, Shaped

from woodjax.adapters.nnx import TrainFn
from woodjax.checkpoints import Checkpoints
from woodjax.datasets import Dataset, Normalise, TrainingData
from woodjax.transform import find_state, prune_transform, set_masks
from woodjax.tree import apply_masks
from woodjax.typing import Masks, Params, PyTree

Augment = Callable[[Key[Array, ""], Any], Any]

AHEAD = 16  # steps that the host may be ahead of the device: more would only hold more batches


class EpochInfo(NamedTuple):
    """What a training says after an epoch."""

    epoch: int  # epochs done
    steps: int  # steps done
    losses: Float[np.ndarray, " steps"]  # mean over the batch, of each step of this epoch


class _State(NamedTuple):
    params: Params
    rest: PyTree  # batch statistics, counts of random numbers
    opt_state: optax.OptState
    step: Int[Array, ""]


def fit_network(
    forward: TrainFn,
    params: Params,
    rest: PyTree,
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
    on_epoch: Callable[[EpochInfo | None, Params, PyTree], None] | None = None,
) -> tuple[Params, PyTree]:
    """`fit` of a function: of a network that a plan made smaller, or one that is no NNX module.

    Args:
        forward: `forward(params, rest, inputs) -> (logits, rest)` in train mode: a `jax.tree_util.Partial`, as
            `woodjax.adapters.nnx.functional_train` returns.
        params: What is trained.
        rest: What a forward pass changes: batch statistics.
        dataset: As for `fit`, and so are all options that follow.
        epochs: Passes over the train split.
        optimizer: For example of `sgd_recipe`.
        seed: Decides the order of examples and the augmentation.
        batch_size: Examples in a step.
        masks: Of the structure of `params`, or None.
        augment: `augment(key, images) -> images`.
        label_smoothing: Weight of the uniform distribution in the targets.
        checkpoint_dir: Folder for checkpoints, or None.
        checkpoint_every: Epochs between checkpoints.
        on_epoch: Called with None, parameters and the rest at the start, and after each epoch with what is known of
            it. The arrays are given away to the next step: copy what is to be kept.

    Returns:
        The trained parameters and the rest.

    Raises:
        ValueError: As `fit`.
        ImportError: As `fit`.
        FloatingPointError: As `fit`.

    Cost:
        As `fit`.
    """
    steps = _check(dataset, epochs, batch_size, seed, label_smoothing, checkpoint_every)
    if isinstance(dataset, Dataset):
        dataset = dataset.on_device()
    transform = _transform(optimizer, params, masked=masks is not None)
    opt_state = transform.init(params)
    if masks is not None:
        opt_state, params = set_masks(opt_state, masks), apply_masks(params, masks)
    # Steps donate their state; the caller keeps arrays of its own.
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
        tell = on_epoch or (lambda info, params, rest: None)
        tell(None, state.params, state.rest)
        for epoch in range(first, epochs):
            batches = dataset.train_batches(batch_size=batch_size, seed=seed, epoch=epoch)
            state, losses = _run(step, state, batches, epoch * steps)
            done = epoch + 1
            if checkpoints is not None and (done % checkpoint_every == 0 or done == epochs):
                checkpoints.save(done, state)
            tell(EpochInfo(done, done * steps, losses), state.params, state.rest)
    return state.params, state.rest


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


def _digest(masks: Masks) -> str:
    digest = hashlib.sha256()
    for mask in jax.tree.leaves(masks):
        digest.update(np.packbits(np.asarray(mask)).tobytes())
    return digest.hexdigest()
