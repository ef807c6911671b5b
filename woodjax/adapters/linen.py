"""Flax Linen: a module in eval mode as a pure function of its parameters."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import flax.linen as nn
import jax
from jaxtyping import Array, Float

from woodjax.batch_stats import reestimate_batch_stats as woodjax_reestimate
from woodjax.typing import ApplyFn, Batch, Params


def functional(module: nn.Module, variables: Mapping[str, Any], **kwargs: Any) -> tuple[ApplyFn, Params]:
    """Split a Linen module and its variables into `apply_fn(params, inputs)` and its parameters.

    Args:
        module: A module whose call takes a batch of inputs.
        variables: What `module.init` returned or training made of it.
        **kwargs: Passed to the call, for example `train=False` or `deterministic=True`.

    Returns:
        `apply_fn`, and `variables["params"]`. `apply_fn` is a `jax.tree_util.Partial`: one made later, with other
        batch statistics, compiles nothing anew where losses are made of it.

    Raises:
        ValueError: No `"params"` in `variables`. When `apply_fn` is traced: the module changed a
            collection that is not the parameters, as train-mode batch normalisation does.

    Cost:
        None.

    Example:
        >>> import jax, jax.numpy as jnp, flax.linen as nn
        >>> from woodjax.adapters.linen import functional
        >>> module = nn.Dense(2)
        >>> apply_fn, params = functional(module, module.init(jax.random.key(0), jnp.ones((1, 3))))
        >>> apply_fn(params, jnp.ones((5, 3))).shape
        (5, 2)
    """
    if "params" not in variables:
        raise ValueError(f"variables have the collections {list(variables)}: 'params' is missing.")
    rest = {name: value for name, value in variables.items() if name != "params"}

    return jax.tree_util.Partial(_Apply(module, kwargs), rest), variables["params"]


@dataclass(frozen=True)
class _Apply:
    """A call of a module, known to `jit` by the module and the options of the call."""

    module: nn.Module
    kwargs: dict[str, Any]

    def __hash__(self) -> int:
        return hash(type(self.module))  # a module may hold lists

    def __call__(self, rest: dict[str, Any], params: Params, inputs: Array) -> Float[Array, "n classes"]:
        logits, changed = self.module.apply({"params": params, **rest}, inputs, mutable=list(rest), **self.kwargs)
        before, after = jax.tree.leaves(rest), jax.tree.leaves(changed)
        if any(a is not b for a, b in zip(before, after, strict=True)):
            raise ValueError(
                f"The module changes {list(changed)} while it is evaluated (train-mode batch normalisation): call it "
                "in eval mode, for example functional(module, variables, train=False)."
            )
        return logits


def reestimate_batch_stats(
    module: nn.Module, variables: Mapping[str, Any], batches: Iterable[Batch], **kwargs: Any
) -> dict[str, Any]:
    """`woodjax.reestimate_batch_stats` for a module and its variables.

    A module without batch normalisation has no `"batch_stats"`: its variables come back as they are.

    Args:
        module: A module whose call takes a batch of inputs.
        variables: What `module.init` returned or training made of it.
        batches: Inputs, all of the same size.
        **kwargs: Passed to the call, for example `train=True`.

    Returns:
        The variables, with new batch statistics.

    Raises:
        ValueError: No `"batch_stats"` in `variables` of a module that has some; as `woodjax.reestimate_batch_stats`.

    Cost:
        One forward pass a batch, and one more.
    """
    if "batch_stats" not in variables:
        makes = partial(module.apply, mutable=["batch_stats"], **kwargs)
        if any(jax.tree.leaves(jax.eval_shape(makes, dict(variables), inputs)[1]) for inputs in islice(batches, 1)):
            raise ValueError(f"variables have the collections {list(variables)}: 'batch_stats' is missing.")
        return dict(variables)
    rest = {name: value for name, value in variables.items() if name != "batch_stats"}
    stats = woodjax_reestimate(_Stats(_Apply(module, kwargs)), rest, variables["batch_stats"], batches)
    return {**rest, "batch_stats": stats}


warm_up_batch_stats = reestimate_batch_stats
"""`woodjax.warm_up_batch_stats` for a module: the same function, under the name it has before training."""


@dataclass(frozen=True)
class _Stats:
    """Batch statistics after a call in train mode, known to `jit` by the module and the options of the call."""

    call: _Apply

    def __call__(self, rest: dict[str, Any], stats: Any, inputs: Batch) -> Any:
        variables = {**rest, "batch_stats": stats}
        _, changed = self.call.module.apply(variables, inputs, mutable=["batch_stats"], **self.call.kwargs)
        return changed["batch_stats"]
