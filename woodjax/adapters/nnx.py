"""Flax NNX: a model in eval mode as a pure function of a nested dict of its parameters."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx
from flax.errors import TraceContextError
from jaxtyping import Array, Float

from woodjax.adapters._nnx_blocks import host_layers, layer_function
from woodjax.adapters._nnx_variables import CHANGED, functional_variables, with_shapes_of, with_values, write_variables
from woodjax.batch_stats import reestimate_batch_stats as woodjax_reestimate
from woodjax.losses import cross_entropy
from woodjax.sparsities import Sparsity
from woodjax.transform import RefreshInfo, get_info, get_masks
from woodjax.transform import refresh as woodjax_refresh
from woodjax.transform import set_masks as woodjax_set_masks
from woodjax.tree import apply_masks
from woodjax.typing import ApplyFn, Batch, Example, LossFn, Masks, Params, PyTree

__all__ = [
    "TrainFn",
    "functional",
    "functional_train",
    "functional_variables",
    "host_layers",
    "info",
    "layer_function",
    "masks",
    "reestimate_batch_stats",
    "refresh",
    "set_masks",
    "update",
    "warm_up_batch_stats",
    "with_shapes_of",
    "write_variables",
]

TrainFn = Callable[[Params, PyTree, Batch], tuple[Float[Array, "n classes"], PyTree]]


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
    graph, state, rest = _split(model)
    return jax.tree_util.Partial(_Apply(graph), state, rest), nnx.to_pure_dict(state)


def _split(model: nnx.Module) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    # Variables of their own: those that split returns are the model's, and change with it.
    graph, *states = nnx.split(model, nnx.Param, ...)
    state, rest = jax.tree.map(lambda x: x, states)
    return graph, state, rest


@dataclass(frozen=True)
class _Apply:
    """A call of a model, known to `jit` by its graph."""

    graph: nnx.GraphDef

    def __call__(self, state: nnx.State, rest: nnx.State, params: Params, inputs: Array) -> Float[Array, "n classes"]:
        merged = nnx.merge(self.graph, with_values(state, params), rest)
        try:
            return merged(inputs)
        except TraceContextError as error:
            raise ValueError(CHANGED) from error


def functional_train(model: nnx.Module) -> tuple[TrainFn, Params, PyTree]:
    """Split an NNX model into `forward(params, rest, inputs) -> (logits, rest)`, its parameters and the rest.

    For training steps on plain pytrees: what changes in a forward pass (batch statistics, counts of random numbers)
    comes in and goes out. The mode of the model is that of the call: call `model.train()` first.

    Args:
        model: A module whose call takes a batch of inputs.

    Returns:
        `forward`, the values of all `nnx.Param` and those of all other variables, both nested dicts. `forward` is a
        `jax.tree_util.Partial`: one made later, of a model of the same graph, compiles nothing anew where it is an
        argument of a jitted function.

    Cost:
        None but a copy of the references.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from woodjax.adapters.nnx import functional_train
        >>> forward, params, rest = functional_train(nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
        >>> logits, rest = forward(params, rest, jnp.ones((5, 3)))
        >>> round(float(rest["mean"][0]), 3)
        0.01
    """
    graph, state, rest = _split(model)
    forward = jax.tree_util.Partial(_Forward(graph), state, rest)
    return forward, nnx.to_pure_dict(state), nnx.to_pure_dict(rest)


@dataclass(frozen=True)
class _Forward:
    """A call of a model that may change its variables, known to `jit` by its graph."""

    graph: nnx.GraphDef

    def __call__(
        self, state: nnx.State, others: nnx.State, params: Params, rest: PyTree, inputs: Batch
    ) -> tuple[Float[Array, "n classes"], PyTree]:
        model = nnx.merge(self.graph, with_values(state, params), with_values(others, rest))
        logits = model(inputs)
        _, _, rest = nnx.split(model, nnx.Param, ...)
        return logits, nnx.to_pure_dict(rest)


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
    nnx.update(model, with_values(nnx.state(model, nnx.Param), params))


def refresh(
    model: nnx.Module,
    optimizer: nnx.Optimizer[Any],
    batch: Batch,
    sparsity: Sparsity,
    *,
    loss: Callable[[ApplyFn], LossFn] = cross_entropy,
    **options: Any,
) -> RefreshInfo:
    """`woodjax.refresh` for a model and its `nnx.Optimizer`, in place.

    Gradients are taken in eval mode, with the running statistics as they are; the model itself stays in the mode
    that it is in.

    Args:
        model: A module whose call takes a batch of inputs.
        optimizer: Made with `wrt=nnx.Param` and an optimizer that holds one `prune_transform`.
        batch: As in `woodjax.refresh`, for the default loss `(inputs, integer labels)`.
        sparsity: As in `woodjax.refresh`.
        loss: From `apply_fn(params, inputs) -> logits` to the loss of one example. Pass the same function again to
            reuse what was compiled.
        **options: As in `woodjax.refresh`.

    Returns:
        What was done.

    Raises:
        ValueError: As `woodjax.refresh`; the model and the optimizer are as they were.

    Cost:
        As `woodjax.refresh`.
    """
    twin = _twin(model)
    twin.eval()
    apply_fn, _ = functional(twin)
    params, opt_state = _values(nnx.state(model, optimizer.wrt)), _values(optimizer.opt_state)
    loss_fn = jax.tree_util.Partial(_loss_of_state, loss(apply_fn))
    params, opt_state, done = woodjax_refresh(params, opt_state, batch, sparsity, loss_fn=loss_fn, **options)
    nnx.update(model, params)
    nnx.update(optimizer.opt_state, nnx.state(opt_state))
    return done


def masks(optimizer: nnx.Optimizer[Any]) -> Masks:
    """The masks that an optimizer holds.

    Args:
        optimizer: As in `refresh`.

    Returns:
        A nested dict of bool, as `functional` gives the parameters.

    Raises:
        ValueError: As `woodjax.get_masks`.

    Cost:
        None.
    """
    return nnx.to_pure_dict(get_masks(_values(optimizer.opt_state)))


def set_masks(model: nnx.Module, optimizer: nnx.Optimizer[Any], masks: Masks) -> None:
    """`woodjax.set_masks` for a model and its `nnx.Optimizer`, in place; pruned weights become zero at once.

    Args:
        model: As in `refresh`.
        optimizer: As in `refresh`.
        masks: A nested dict of bool, as `masks` returns, or `woodjax.masks_from_params` of the parameters that
            `functional` returns.

    Raises:
        ValueError: As `woodjax.set_masks`.

    Cost:
        One pass over parameters and optimizer state.
    """
    params, opt_state = _values(nnx.state(model, optimizer.wrt)), _values(optimizer.opt_state)
    state = with_values(params, masks)
    nnx.update(optimizer.opt_state, nnx.state(woodjax_set_masks(opt_state, state)))
    nnx.update(model, apply_masks(params, state))


def info(optimizer: nnx.Optimizer[Any]) -> RefreshInfo:
    """What the last refresh did.

    Args:
        optimizer: As in `refresh`.

    Returns:
        As `woodjax.get_info`.

    Raises:
        ValueError: As `woodjax.get_info`.

    Cost:
        None.
    """
    return get_info(_values(optimizer.opt_state))


def reestimate_batch_stats(model: nnx.Module, batches: Iterable[Batch]) -> None:
    """`woodjax.reestimate_batch_stats` for a model, in place; it stays in the mode that it is in.

    A model without batch normalisation stays as it is.

    Args:
        model: A module whose call takes a batch of inputs.
        batches: Inputs, all of the same size.

    Raises:
        ValueError: As `woodjax.reestimate_batch_stats`.

    Cost:
        One forward pass a batch, and one more.
    """
    twin = _twin(model)
    twin.train()
    graph, stats, rest = nnx.split(twin, nnx.BatchStat, ...)
    nnx.update(model, woodjax_reestimate(_Stats(graph), rest, stats, batches))


warm_up_batch_stats = reestimate_batch_stats
"""`woodjax.warm_up_batch_stats` for a model: the same function, under the name it has before training."""


@dataclass(frozen=True)
class _Stats:
    """Batch statistics after a call in train mode, known to `jit` by the model's graph."""

    graph: nnx.GraphDef

    def __call__(self, rest: nnx.State, stats: nnx.State, inputs: Batch) -> nnx.State:
        model = nnx.merge(self.graph, stats, rest)
        model(inputs)
        return nnx.state(model, nnx.BatchStat)


def _twin(model: nnx.Module) -> nnx.Module:
    return nnx.merge(*nnx.split(model))  # shares the arrays, not the mode


def _values(tree: Any) -> Any:
    return jax.tree.map(lambda x: x[...] if _is_variable(x) else x, tree, is_leaf=_is_variable)


def _is_variable(x: Any) -> bool:
    return isinstance(x, nnx.Variable)


def _loss_of_state(loss_fn: LossFn, state: nnx.State, example: Example) -> Float[Array, ""]:
    return loss_fn(nnx.to_pure_dict(state), example)
