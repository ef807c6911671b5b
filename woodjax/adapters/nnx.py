"""Flax NNX: a model in eval mode as a pure function of a nested dict of its parameters."""

from dataclasses import dataclass

import jax
from flax import nnx
from flax.errors import TraceContextError
from jaxtyping import Array, Float

from woodjax.typing import ApplyFn, Params


def functional(model: nnx.Module) -> tuple[ApplyFn, Params]:
    """Split an NNX model into `apply_fn(params, inputs)` and its parameters.

    The rest of the model (batch statistics) is held as it is now. Call `model.eval()` first.

    Args:
        model: A module whose call takes a batch of inputs.

    Returns:
        `apply_fn`, and the values of all `nnx.Param` as a nested dict. `apply_fn` is a `jax.tree_util.Partial`:
        one made later, with other batch statistics, compiles nothing anew where losses are made of it.

    Raises:
        ValueError: When `apply_fn` is traced: the model changed a variable that is not a parameter,
            as train-mode batch normalisation and dropout do.

    Cost:
        None but a copy of the references.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from woodjax.adapters.nnx import functional
        >>> apply_fn, params = functional(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
        >>> apply_fn(params, jnp.ones((5, 3))).shape
        (5, 2)
    """
    graph, state, rest = nnx.split(model, nnx.Param, ...)
    return jax.tree_util.Partial(_Apply(graph), state, rest), nnx.to_pure_dict(state)


@dataclass(frozen=True)
class _Apply:
    """A call of a model, known to `jit` by its graph."""

    graph: nnx.GraphDef

    def __call__(self, state: nnx.State, rest: nnx.State, params: Params, inputs: Array) -> Float[Array, "n classes"]:
        merged = nnx.merge(self.graph, _with_values(state, params), rest)
        try:
            return merged(inputs)
        except TraceContextError as error:
            raise ValueError(
                "The model changes a variable while it is evaluated (train-mode batch normalisation or dropout): "
                "call model.eval() before woodjax.adapters.nnx.functional."
            ) from error


def update(model: nnx.Module, params: Params) -> None:
    """Write parameters back into the model, in place.

    Args:
        model: The module that `functional` was called on.
        params: Nested dict of values.

    Raises:
        ValueError: A parameter that the model does not have.

    Cost:
        None but the references.
    """
    nnx.update(model, _with_values(nnx.state(model, nnx.Param), params))


def _with_values(state: nnx.State, params: Params) -> nnx.State:
    copy = jax.tree.map(lambda x: x, state)
    nnx.replace_by_pure_dict(copy, params)
    return copy
