"""From a pure `apply_fn` to the loss of one example."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from woodjax.door import checked
from woodjax.typing import ApplyFn, LossFn


@checked
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

    References:
        The negative log-likelihood of the softmax; Hinton et al. 2015 (arXiv 1503.02531), section 2: the temperature.

    Example:
        >>> import jax.numpy as jnp, woodjax as wj
        >>> loss = wj.cross_entropy(lambda w, x: x @ w)
        >>> round(float(loss(jnp.eye(2), (jnp.zeros(2), jnp.array(0)))), 3)
        0.693
    """
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}: pass a positive number; 1 leaves the logits as they are.")
    if isinstance(apply_fn, jax.tree_util.Partial):
        return jax.tree_util.Partial(_CrossEntropy(temperature), apply_fn)
    return _CrossEntropy(temperature, apply_fn)


@dataclass(frozen=True)
class _CrossEntropy:
    """Known to `jit` by its values: one made again of the same function compiles nothing anew."""

    temperature: float
    apply_fn: ApplyFn | None = None  # None: the first argument of the call

    def __call__(self, *arguments: Any) -> Float[Array, ""]:
        apply_fn, params, (inputs, label) = (self.apply_fn, *arguments) if self.apply_fn else arguments
        logits = apply_fn(params, jax.tree.map(lambda x: x[None], inputs))[0]
        wide = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        return optax.softmax_cross_entropy_with_integer_labels(wide / self.temperature, label)
