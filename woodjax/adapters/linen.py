"""Flax Linen: a module in eval mode as a pure function of its parameters."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import flax.linen as nn
import jax
from flax.errors import ScopeParamShapeError
from jaxtyping import Array, Float

from woodjax.adapters._linen_layers import fit_layer
from woodjax.batch_stats import reestimate_batch_stats as woodjax_reestimate
from woodjax.typing import ApplyFn, Batch, Params

__all__ = [
    "functional",
    "functional_variables",
    "reestimate_batch_stats",
    "warm_up_batch_stats",
    "with_shapes_of",
]


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
    _check_params(variables)
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


def functional_variables(
    module: nn.Module, variables: Mapping[str, Any], **kwargs: Any
) -> tuple[ApplyFn, dict[str, Any]]:
    """Split a Linen module and its variables into `apply_fn(variables, inputs)` and the variables.

    As `functional`, with batch statistics among the arguments, so that they can be cut together with the channels they
    belong to. Shapes other than those of the module's fields need `with_shapes_of`.

    Args:
        module: A module whose call takes a batch of inputs.
        variables: What `module.init` returned or training made of it.
        **kwargs: Passed to the call, for example `train=False` or `deterministic=True`.

    Returns:
        `apply_fn`, a `jax.tree_util.Partial`, and the variables as a dict, such as `{"params", "batch_stats"}`.

    Raises:
        ValueError: No `"params"` in `variables`. When `apply_fn` is traced: the module changed a collection that is
            not the parameters, as train-mode batch normalisation does.

    Cost:
        None.

    Example:
        >>> import jax, jax.numpy as jnp, flax.linen as nn
        >>> from woodjax.adapters.linen import functional_variables
        >>> module = nn.BatchNorm(use_running_average=True)
        >>> apply_fn, variables = functional_variables(module, module.init(jax.random.key(0), jnp.ones((1, 3))))
        >>> sorted(variables), apply_fn(variables, jnp.ones((5, 3))).shape
        (['batch_stats', 'params'], (5, 3))
    """
    _check_params(variables)
    return jax.tree_util.Partial(_ApplyVariables(_Apply(module, kwargs))), dict(variables)


def with_shapes_of(module: nn.Module, **kwargs: Any) -> ApplyFn:
    """A module as a function of its variables in which each layer is as wide as the variables are.

    During the call `features`, `feature_group_count`, `num_heads` and their like are set from the arrays in `Dense`,
    `DenseGeneral`, `Conv`, `ConvTranspose`, `Embed` and `MultiHeadDotProductAttention`; normalisations take the width
    of their inputs. Everything else stays as it is: arrays that the module's own code makes of a fixed shape, shapes
    that it writes out (`x.reshape(..., 8, 64)`), masks of `Conv` and recurrent cells do not follow. Some layers compute
    with their width: `LayerNorm` and `RMSNorm` average over the channels that are left, `GroupNorm` keeps its number
    of groups unless it has a `group_size`, attention divides scores by the root of the new width of a head. So whether
    the function is the one that was meant is to be checked by a comparison.

    Args:
        module: A module whose call takes a batch of inputs; it stays as it is.
        **kwargs: Passed to the call, for example `train=False` or `deterministic=True`.

    Returns:
        `apply_fn(variables, inputs)`, a `jax.tree_util.Partial`, for variables of any shapes that fit each other.

    Raises:
        ValueError: When `apply_fn` is traced: no `"params"`; an array of a shape that the module's own code fixes; the
            module changed a collection that is not the parameters.

    Cost:
        None; when it is traced, one look at the arrays of each layer.

    Example:
        >>> import jax, jax.numpy as jnp, flax.linen as nn
        >>> from woodjax.adapters.linen import with_shapes_of
        >>> module = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(2)])
        >>> params = module.init(jax.random.key(0), jnp.ones((1, 3)))["params"]
        >>> first, last = params["layers_0"], params["layers_2"]
        >>> first = {"kernel": first["kernel"][:, :5], "bias": first["bias"][:5]}
        >>> small = {"layers_0": first, "layers_2": {**last, "kernel": last["kernel"][:5]}}
        >>> with_shapes_of(module)({"params": small}, jnp.ones((4, 3))).shape
        (4, 2)
    """
    return jax.tree_util.Partial(_ApplyWithShapes(_Apply(module, kwargs)))


def _check_params(variables: Mapping[str, Any]) -> None:
    if "params" not in variables:
        raise ValueError(f"variables have the collections {list(variables)}: 'params' is missing.")


@dataclass(frozen=True)
class _ApplyVariables:
    """A call of a module with all of its variables."""

    call: _Apply

    def __call__(self, variables: Mapping[str, Any], inputs: Array) -> Float[Array, "..."]:
        _check_params(variables)
        rest = {name: value for name, value in variables.items() if name != "params"}
        return self.call(rest, variables["params"], inputs)


@dataclass(frozen=True)
class _ApplyWithShapes(_ApplyVariables):
    """The same with layers as wide as the variables."""

    def __call__(self, variables: Mapping[str, Any], inputs: Array) -> Float[Array, "..."]:
        try:
            with nn.intercept_methods(fit_layer):
                return super().__call__(variables, inputs)
        except ScopeParamShapeError as error:
            raise ValueError(
                f"The module's own code fixes the shape of an array: {error} Keep the channels of that array, or make "
                "its shape follow the inputs."
            ) from error


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
