"""Squared gradients of what kernels write: a backward sweep with one layer on the device at a time.

The gradient of a kernel `W [in, out]` at one token is `x δᵀ`. Taking tokens as independent the Fisher of output unit
`o` is `Σ δ_o² x xᵀ`: a second moment of the inputs with the weights `δ_o²`. These weights alone are kept, their means
over groups of neighbouring output units: `rows · groups` numbers a kernel, no matrix.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from jaxtyping import Array, Float

from woodjax.door import checked
from woodjax.layerwise.hidden import MicroBatches, check_finite, to_host
from woodjax.layerwise.kernels import find_kernels, run_recorded
from woodjax.layerwise.layers import Hidden, LayerFn, ResidentLayer, as_partial
from woodjax.layerwise.moments import Weights, advance
from woodjax.loss_rows import batch_size
from woodjax.tree import Layout, is_kernel, make_layout
from woodjax.typing import Batch, Params, Select

HostWeights = dict[str, Float[np.ndarray, "rows groups"]]  # by the path of the kernel
Floats = list[Float[Array, "n ..."]]  # the floating leaves of hidden states


class OutputGradients(NamedTuple):
    """Made by `squared_output_gradients`, for `prune_layers`."""

    squares: list[HostWeights]  # of each layer
    size: int  # sequences
    microbatch_size: int  # rows are in the order of these


@checked
def squared_output_gradients(
    layers: Sequence[ResidentLayer],
    hidden: Hidden,
    loss_fn: Callable[[Hidden, Batch], Float[Array, ""]],
    targets: Batch,
    *,
    groups: int = 4,
    select: Select = is_kernel,
    microbatch_size: int = 8,
    sharding: Sharding | None = None,
) -> OutputGradients:
    """Mean squared gradient of the loss by what each kernel writes, for every token and group of output units.

    A forward sweep saves what goes into each layer on the host; a backward sweep loads the layers in reverse. Neither
    holds two layers.

    Args:
        layers: In their order; their `store` is not called.
        hidden: What goes into the first layer.
        loss_fn: `loss_fn(hidden, targets) -> scalar`, the SUM of the losses of a micro-batch from what the last layer
            makes: the head belongs to it.
        targets: A pytree with the sequences along the first axis of every leaf.
        groups: Groups of neighbouring output units of a kernel, as many as divide it: `gcd(groups, out)`. 1 for all
            units together; `out` or a multiple of it for the row Fisher of every unit.
        select: Which leaves are prunable, as for `prune_layers`.
        microbatch_size: Sequences on the device at once; `prune_layers` must be given the same.
        sharding: As for `prune_layers`.

    Returns:
        Weights of the rows of each kernel's inputs, on the host.

    Raises:
        ValueError: No layers; `groups < 1`; hidden states or gradients that are not finite; targets of another
            number of sequences; as `prune_layers`.

    Cost:
        Two forward passes and a backward one; on the device one layer and the activations of one layer for a
        micro-batch; on the host the hidden states once for each layer, and `4 · tokens · groups` bytes for each
        kernel.

    References:
        Kim et al., GuidedQuant, 2025 (arXiv 2505.07004), section 3.2: Fisher blocks averaged over groups of outputs;
        tokens as independent: Eschenhagen et al. 2023 (arXiv 2311.00636), "expand"; the row blocks: `row_fisher`.

    Example:
        >>> import jax.numpy as jnp, numpy as np, woodjax as wj
        >>> layers = [wj.HostLayer(lambda w, x: x @ w, np.eye(2, dtype=np.float32))]
        >>> loss_fn = lambda hidden, targets: 0.5 * jnp.sum((hidden - targets) ** 2)
        >>> ones, zeros = np.ones((1, 2), np.float32), np.zeros((1, 2))
        >>> found = wj.squared_output_gradients(layers, ones, loss_fn, zeros, groups=2)
        >>> found.squares[0][""].tolist()
        [[1.0, 1.0]]
    """
    if not layers or groups < 1:
        raise ValueError(f"{len(layers)} layers, groups={groups}: pass at least one of each.")
    batches = MicroBatches.of(hidden, microbatch_size, sharding)
    size = batches.size
    if batch_size(targets) != size:
        raise ValueError(f"targets are of {batch_size(targets)} sequences, hidden of {size}: pass targets of each.")
    boundaries = [to_host(hidden)]
    for layer in layers:
        params, function = batches.place(layer.load()), as_partial(layer.apply)
        boundaries.append(batches.map(partial(advance, function, params), boundaries[-1]))
        del params
    check_finite(boundaries[-1], "The hidden states behind the last layer", "look for overflow in the layers.")
    head = as_partial(loss_fn)
    cotangents = batches.map(lambda part: _head_gradient(head, *part), (boundaries.pop(), targets))
    squares: list[HostWeights] = []
    for number in reversed(range(len(layers))):
        try:
            cotangents, found = _back_through(layers[number], boundaries.pop(), cotangents, batches, groups, select)
        except ValueError as error:
            raise ValueError(f"Layer {number}: {error}") from error
        squares.append(found)
    return OutputGradients(squares[::-1], size, microbatch_size)


def layer_weights(
    output_gradients: OutputGradients | None, number: int, layers: int, batches: MicroBatches
) -> HostWeights | None:
    """Weights of the rows that the kernels of a layer read, if there are any.

    Args:
        output_gradients: From `squared_output_gradients`, or None.
        number: Of the layer.
        layers: How many there are.
        batches: How sequences are cut.

    Returns:
        Arrays of the host by the path of the kernel, or None.

    Raises:
        ValueError: Of other layers, sequences or micro-batches.
    """
    if output_gradients is None:
        return None
    made = len(output_gradients.squares), output_gradients.size, output_gradients.microbatch_size
    if made != (layers, batches.size, batches.microbatch_size):
        raise ValueError(
            f"output_gradients are of {made[0]} layers and {made[1]} sequences in micro-batches of {made[2]}, here are "
            f"{layers}, {batches.size} and {batches.microbatch_size}: make them of the same."
        )
    return output_gradients.squares[number]


def _back_through(
    layer: ResidentLayer, hidden: Hidden, cotangents: Floats, batches: MicroBatches, groups: int, select: Select
) -> tuple[Floats, HostWeights]:
    params, function = batches.place(layer.load()), as_partial(layer.apply)
    layout = make_layout(params, select=select)
    find_kernels(function, params, hidden, layout)  # raises
    run = partial(_backward, function, params, layout=layout, groups=groups)
    cotangents, squares = batches.map(lambda pair: run(*pair), (hidden, cotangents))
    check_finite((cotangents, squares), "Gradients of the loss", "look at the loss, or pass hidden states of float32.")
    return cotangents, squares


@jax.jit
def _head_gradient(head: jax.tree_util.Partial, hidden: Hidden, targets: Batch) -> Floats:
    floats, join = _floats(hidden)
    return jax.grad(lambda values: head(join(values), targets))(floats)


@partial(jax.jit, static_argnames=("layout", "groups"))
def _backward(
    function: LayerFn, params: Params, hidden: Hidden, cotangents: Floats, *, layout: Layout, groups: int
) -> tuple[Floats, Weights]:
    recorded = jax.eval_shape(lambda p, x: run_recorded(function, p, x, layout).inputs, params, hidden)
    outs = {spec.path: spec.size // recorded[spec.path].shape[1] for spec in layout.selected}
    shifts = {path: jnp.zeros((rows.shape[0], outs[path])) for path, rows in recorded.items()}
    floats, join = _floats(hidden)

    def run(values: Floats, shifts: dict[str, Array]) -> Floats:
        return _floats(run_recorded(function, params, join(values), layout, shifts).outputs)[0]

    _, back = jax.vjp(run, floats, shifts)
    before, deltas = back(cotangents)

    def means(delta: Float[Array, "rows out"]) -> Float[Array, "rows groups"]:
        return jnp.mean(jnp.square(delta).reshape(len(delta), math.gcd(groups, delta.shape[1]), -1), axis=2)

    return before, jax.tree.map(means, deltas)


def _floats(hidden: Hidden) -> tuple[Floats, Callable[[Floats], Hidden]]:
    # The leaves that have gradients, and the way back with others in their place.
    leaves, treedef = jax.tree.flatten(hidden)
    places = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.floating)]

    def join(values: Floats) -> Hidden:
        given = dict(zip(places, values, strict=True))
        return jax.tree.unflatten(treedef, [given.get(i, leaf) for i, leaf in enumerate(leaves)])

    return [leaves[i] for i in places], join
