"""From a pure `apply_fn` to the loss of one example."""

from functools import partial

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from woodjax.typing import ApplyFn, Example, LossFn, Params


def cross_entropy(apply_fn: ApplyFn) -> LossFn:
    """Softmax cross-entropy of one `(input, integer label)` pair.

    Args:
        apply_fn: `apply_fn(params, inputs) -> logits [n, C]`, eval mode.

    Returns:
        `loss_fn(params, (input, label))`, in nats.

    Cost:
        One forward pass.

    Example:
        >>> import jax.numpy as jnp
        >>> from woodjax.adapters.losses import cross_entropy
        >>> loss = cross_entropy(lambda w, x: x @ w)
        >>> round(float(loss(jnp.eye(2), (jnp.zeros(2), jnp.array(0)))), 3)
        0.693
    """
    bind = jax.tree_util.Partial if isinstance(apply_fn, jax.tree_util.Partial) else partial
    return bind(_cross_entropy, apply_fn)


def _cross_entropy(apply_fn: ApplyFn, params: Params, example: Example) -> Float[Array, ""]:
    inputs, label = example
    logits = apply_fn(params, jax.tree.map(lambda x: x[None], inputs))[0]
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), label)
