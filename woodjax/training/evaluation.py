"""Accuracy of a classifier."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Shaped

from woodjax.adapters.nnx import functional
from woodjax.datasets import TrainingData
from woodjax.typing import ApplyFn, Params


def accuracy(logits: Float[Array, "n classes"], labels: Int[Array, " n"]) -> Float[Array, ""]:
    """Fraction of examples whose largest logit is the label's.

    Args:
        logits: `[n, C]`.
        labels: `[n]`.

    Returns:
        A scalar in [0, 1].

    Example:
        >>> import jax.numpy as jnp
        >>> from woodjax.training import accuracy
        >>> float(accuracy(jnp.array([[0.0, 1.0], [1.0, 0.0]]), jnp.array([1, 1])))
        0.5
    """
    return jnp.mean(jnp.argmax(logits, axis=-1) == labels)


def evaluate(
    apply_fn: ApplyFn,
    params: Params,
    dataset: TrainingData,
    batch_size: int = 1000,
) -> float:
    """Test accuracy, a batch at a time.

    Args:
        apply_fn: `apply_fn(params, inputs) -> logits`, best already jitted.
        params: A params-tree.
        dataset: Where the test split comes from; bytes are normalised.
        batch_size: Examples at once.

    Returns:
        Fraction of the test split, in [0, 1].

    Cost:
        One forward pass over the test split.
    """
    correct, count = 0.0, 0
    for images, labels in dataset.test_batches(batch_size):
        logits = apply_fn(params, dataset.normalise(images))
        correct += float(accuracy(logits, jnp.asarray(labels))) * len(labels)
        count += len(labels)
    return correct / count


def evaluate_model(model: nnx.Module, dataset: TrainingData, batch_size: int = 1000) -> float:
    """`evaluate` of a model in eval mode, compiled once for all models of one kind.

    Args:
        model: A module in eval mode, as `fit` leaves it.
        dataset: Where the test split comes from.
        batch_size: Examples at once.

    Returns:
        Fraction of the test split, in [0, 1].

    Raises:
        ValueError: The model is in train mode.

    Cost:
        One forward pass over the test split.
    """
    apply_fn, params = functional(model)
    return evaluate(partial(_apply, apply_fn), params, dataset, batch_size)


@jax.jit
def _apply(apply_fn: ApplyFn, params: Params, inputs: Shaped[Array, "n ..."]) -> Float[Array, "n classes"]:
    return apply_fn(params, inputs)
