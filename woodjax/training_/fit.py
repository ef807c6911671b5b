"""Plain training of a small network, so that there is something to prune."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from woodjax.datasets import Dataset


def train(
    model: nnx.Module,
    dataset: Dataset,
    *,
    epochs: int,
    seed: int,
    batch_size: int = 64,
    learning_rate: float = 3e-3,
    on_epoch: Callable[[], None] = lambda: None,
) -> None:
    """Train a classifier in place by Adam with a cosine schedule; leaves it in eval mode.

    Args:
        model: An NNX module; its call takes a batch of inputs.
        dataset: Where the train split comes from.
        epochs: Passes over the train split.
        seed: Decides the order of examples.
        batch_size: Examples in a step; the rest of an epoch that does not fill one is dropped.
        learning_rate: Peak learning rate.
        on_epoch: Called after each epoch.

    Raises:
        ValueError: Fewer examples than `batch_size`, or `epochs < 1`.

    Cost:
        `epochs` forward and backward passes over the train split.
    """
    count = len(dataset.train_labels)
    if epochs < 1 or count < batch_size:
        raise ValueError(f"Need epochs >= 1 and {batch_size} examples, found epochs={epochs} and {count} examples.")
    steps = count // batch_size
    schedule = optax.cosine_decay_schedule(learning_rate, steps * epochs)
    optimizer = nnx.Optimizer(model, optax.adam(schedule), wrt=nnx.Param)
    model.train()
    rng = np.random.default_rng(seed)
    for _ in range(epochs):
        order = rng.permutation(count)[: steps * batch_size].reshape(steps, batch_size)
        for chosen in order:
            _step(model, optimizer, dataset.train_inputs[chosen], dataset.train_labels[chosen])
        on_epoch()
    model.eval()


@nnx.jit
def _step(
    model: nnx.Module,
    optimizer: nnx.Optimizer,
    inputs: Float[Array | np.ndarray, "n h w c"],
    labels: Int[Array | np.ndarray, " n"],
) -> None:
    def loss_fn(m: nnx.Module) -> Float[Array, ""]:
        return optax.softmax_cross_entropy_with_integer_labels(m(inputs), labels).mean()

    optimizer.update(model, nnx.grad(loss_fn)(model))


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
    apply_fn: Callable[..., Float[Array, "n classes"]],
    params: object,
    dataset: Dataset,
    batch_size: int = 1000,
) -> float:
    """Test accuracy, a batch at a time.

    Args:
        apply_fn: `apply_fn(params, inputs) -> logits`, best already jitted.
        params: A params-tree.
        dataset: Where the test split comes from.
        batch_size: Examples at once.

    Returns:
        Fraction of the test split, in [0, 1].

    Cost:
        One forward pass over the test split.
    """
    correct = 0.0
    for start in range(0, len(dataset.test_labels), batch_size):
        part = slice(start, start + batch_size)
        labels = dataset.test_labels[part]
        correct += float(accuracy(apply_fn(params, dataset.test_inputs[part]), jnp.asarray(labels))) * len(labels)
    return correct / len(dataset.test_labels)
