"""Flax NNX: a model as a function of all of its arrays, and a model of the same code with smaller ones."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.errors import TraceContextError
from flax.traverse_util import flatten_dict
from jaxtyping import Array, Float

from woodjax.adapters._nnx_layers import fit_layers
from woodjax.typing import ApplyFn, Params, PyTree

CHANGED = (
    "The model changes a variable while it is evaluated (train-mode batch normalisation or dropout): call model.eval() "
    "before woodjax.adapters.nnx."
)


def functional_variables(model: nnx.Module) -> tuple[ApplyFn, PyTree]:
    """Split an NNX model into `apply_fn(variables, inputs)` and all of its arrays.

    As `functional`, with batch statistics (and any other arrays but those of random numbers) among the arguments, so
    that they can be cut together with the channels they belong to. Call `model.eval()` first.

    Args:
        model: A module whose call takes a batch of inputs.

    Returns:
        `apply_fn`, and the values as a nested dict, such as `{"bn1": {"bias", "mean", "scale", "var"}, "conv1":
        {"kernel"}}`. `apply_fn` is a `jax.tree_util.Partial`: one made later, of a model of the same graph, compiles
        nothing anew where it is an argument of a jitted function. It looks at no shape itself: other shapes work
        where the model's own code takes them, see `with_shapes_of`.

    Raises:
        ValueError: When `apply_fn` is called or traced: a variable is missing or unknown, or the model changed one, as
            train-mode batch normalisation and dropout do.

    Cost:
        None but a copy of the references.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from woodjax.adapters.nnx import functional_variables
        >>> model = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
        >>> model.eval()
        >>> apply_fn, variables = functional_variables(model)
        >>> sorted(variables), apply_fn(variables, jnp.ones((5, 3))).shape
        (['bias', 'mean', 'scale', 'var'], (5, 3))
    """
    graph, rest, state = split_variables(model)
    return jax.tree_util.Partial(_ApplyVariables(graph), state, rest), nnx.to_pure_dict(state)


def write_variables(model: nnx.Module, variables: PyTree) -> None:
    """Write arrays of the shapes that the model has back into it, in place.

    Args:
        model: The module that `functional_variables` was called on.
        variables: Nested dict of values, all of them.

    Raises:
        ValueError: A variable that is missing, unknown or of another shape.

    Cost:
        None but the references.
    """
    _, _, state = split_variables(model)
    written = with_values(state, checked(state, variables))
    for path, old, new in _pairs(state, written):
        if jnp.shape(old) != jnp.shape(new):
            raise ValueError(
                f"Variable '{path}' has the shape {jnp.shape(new)}, the model's {jnp.shape(old)}: make a model of "
                "other widths by woodjax.adapters.nnx.with_shapes_of."
            )
    nnx.update(model, written)


def with_shapes_of(model: nnx.Module, variables: PyTree) -> nnx.Module:
    """Copy a model with other arrays, its standard layers made as wide as they are.

    What says how wide a layer is (`in_features`, `out_features`, `feature_group_count`, `num_heads`, …) is set from
    the arrays in `Linear`, `LinearGeneral`, `Einsum`, `Conv`, `ConvTranspose`, `Embed`, `MultiHeadAttention` and all
    normalisations. Everything else stays as it is: a width that the model's own code holds (`x.reshape(..., self.heads,
    64)`, zero-padding to a number of channels) does not follow, and neither do recurrent cells. Some layers compute
    with their width: `LayerNorm`, `RMSNorm` and `GroupNorm` with one group average over the channels that are left,
    `MultiHeadAttention` divides scores by the root of the new width of a head. So whether the copy is the function that
    was meant is to be checked by a comparison.

    In a grouped convolution whose kernel has as many input channels a group as before whole groups are gone; otherwise
    each group has lost as many channels. `GroupNorm` loses whole groups.

    Args:
        model: A module; it stays as it is.
        variables: Nested dict of all values, as `functional_variables` returns, of any shapes.

    Returns:
        The copy, in the mode that the model is in.

    Raises:
        ValueError: A variable that is missing or unknown, or has another number of axes; groups or heads that the new
            widths do not divide into.

    Cost:
        None but the references.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> from woodjax.adapters.nnx import functional_variables, with_shapes_of
        >>> model = nnx.Sequential(nnx.Linear(3, 8, rngs=nnx.Rngs(0)), jax.nn.relu, nnx.Linear(8, 2, rngs=nnx.Rngs(1)))
        >>> _, variables = functional_variables(model)
        >>> first, last = variables["layers"][0], variables["layers"][2]
        >>> first["kernel"], first["bias"] = first["kernel"][:, :5], first["bias"][:5]
        >>> last["kernel"] = last["kernel"][:5]
        >>> small = with_shapes_of(model, variables)
        >>> small(jnp.ones((4, 3))).shape, small.layers[0].out_features, model.layers[0].out_features
        ((4, 2), 5, 8)
    """
    graph, rest, state = split_variables(model)
    written = with_values(state, checked(state, variables))
    for path, old, new in _pairs(state, written):
        if jnp.ndim(old) != jnp.ndim(new):
            raise ValueError(
                f"Variable '{path}' has the shape {jnp.shape(new)}, the model's {jnp.shape(old)}: cut axes, do not "
                "drop them."
            )
    copy = nnx.merge(graph, written, rest)
    fit_layers(copy)
    return copy


@dataclass(frozen=True)
class _ApplyVariables:
    """A call of a model, known to `jit` by its graph."""

    graph: nnx.GraphDef

    def __call__(self, state: nnx.State, rest: nnx.State, variables: PyTree, inputs: Array) -> Float[Array, "..."]:
        return apply_variables(self.graph, state, rest, variables, inputs)


def apply_variables(
    graph: nnx.GraphDef, state: nnx.State, rest: nnx.State, variables: PyTree, inputs: Array
) -> Float[Array, "..."]:
    """Call a model with other values of its variables.

    Args:
        graph: Of the model.
        state: Of the model; its values are not used.
        rest: Of random numbers.
        variables: Nested dict of all values.
        inputs: What the model takes.

    Returns:
        What the model returns.

    Raises:
        ValueError: A variable that is missing or unknown, or that the model changed.
    """
    model = nnx.merge(graph, with_values(state, checked(state, variables)), jax.tree.map(lambda x: x, rest))
    before = _flat(nnx.state(model))
    try:
        outputs = model(inputs)
    except TraceContextError as error:
        raise ValueError(CHANGED) from error
    after = _flat(nnx.state(model))
    if any(after.get(path) is not value for path, value in before.items()):
        raise ValueError(CHANGED)
    return outputs


def with_values(state: nnx.State, values: Params) -> nnx.State:
    """Copy a state with other values.

    Args:
        state: Of a model.
        values: Nested dict of some or all values.

    Returns:
        The copy.

    Raises:
        ValueError: A value that the state does not have.
    """
    copy = jax.tree.map(lambda x: x, state)
    nnx.replace_by_pure_dict(copy, values)
    return copy


def checked(state: nnx.State, variables: PyTree) -> PyTree:
    """Pass on variables that have the names of a state.

    Args:
        state: Of a model.
        variables: Nested dict of values.

    Returns:
        The variables.

    Raises:
        ValueError: Names that are missing or unknown.
    """
    wanted, found = _flat(state), {_name(path): value for path, value in flatten_dict(variables).items()}
    if wanted.keys() != found.keys():
        raise ValueError(
            f"Variables that are missing: {sorted(wanted.keys() - found.keys())}; unknown: "
            f"{sorted(found.keys() - wanted.keys())}. Pass all that functional_variables returns."
        )
    return variables


def split_variables(model: nnx.Module) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """Take a model apart.

    Args:
        model: A module; it stays as it is.

    Returns:
        Its graph, what belongs to random numbers, and all other variables.
    """
    graph, *states = nnx.split(model, nnx.RngState, ...)
    rest, state = jax.tree.map(lambda x: x, states)  # variables of their own
    return graph, rest, state


def _name(path: tuple[Any, ...]) -> str:
    return "/".join(map(str, path))


def _flat(state: nnx.State) -> dict[str, Any]:
    return {_name(path): value for path, value in flatten_dict(nnx.to_pure_dict(state)).items()}


def _pairs(state: nnx.State, other: nnx.State) -> list[tuple[str, Any, Any]]:
    values = _flat(other)
    return [(path, value, values[path]) for path, value in _flat(state).items()]
