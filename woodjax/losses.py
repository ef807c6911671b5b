"""From a pure `apply_fn` to the loss of one example."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from woodjax.typing import ApplyFn, Example, LossFn, Params


def cross_entropy(apply_fn: ApplyFn, *, temperature: float = 1.0) -> LossFn:
    """Softmax cross-entropy of one `(input, integer label)` pair.

    Args:
        apply_fn: `apply_fn(params, inputs) -> logits [n, C]`, eval mode.
        temperature: Divides the logits; above 1 the predictions are nearer to uniform.

    Returns:
        `loss_fn(params, (input, label))`, in nats.

    Raises:
        ValueError: A temperature that is not positive.

    Cost:
        One forward pass.

    Example:
        >>> import jax.numpy as jnp, woodjax as wj
        >>> loss = wj.cross_entropy(lambda w, x: x @ w)
        >>> round(float(loss(jnp.eye(2), (jnp.zeros(2), jnp.array(0)))), 3)
        0.693
    """
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}: pass a positive number; 1 leaves the logits as they are.")
    bind = jax.tree_util.Partial if isinstance(apply_fn, jax.tree_util.Partial) else partial
    return bind(_CrossEntropy(temperature), apply_fn)


@dataclass(frozen=True)
class _CrossEntropy:
    """Known to `jit` by the temperature."""

    temperature: float

    def __call__(self, apply_fn: ApplyFn, params: Params, example: Example) -> Float[Array, ""]:
        inputs, label = example
        logits = apply_fn(params, jax.tree.map(lambda x: x[None], inputs))[0]
        wide = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        return optax.softmax_cross_entropy_with_integer_labels(wide / self.temperature, label)
