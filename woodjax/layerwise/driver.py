"""One layer after another: load, take moments of what comes in, prune, store, and hand on what goes out."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Sharding

from woodjax.curvature.damping import ONE_PERCENT, Damping
from woodjax.door import checked_but
from woodjax.layerwise.hidden import MicroBatches, check_finite, to_host
from woodjax.layerwise.kernels import KernelView, find_kernels
from woodjax.layerwise.layers import Hidden, LayerFn, ResidentLayer, as_partial
from woodjax.layerwise.moments import Moments, add_moments, advance, empty_moments
from woodjax.layerwise.output_gradients import HostWeights, OutputGradients, layer_weights
from woodjax.layerwise.pruning import Method, PrunedKernel, PruneRule, prune_kernel
from woodjax.patterns import NM
from woodjax.tree import Layout, is_kernel, make_layout
from woodjax.typing import Masks, Params, Select


class LayerInfo(NamedTuple):
    """What happened to a layer."""

    layer: int
    sparsity: float  # pruned fraction of the selected weights
    density: dict[str, float]  # what is left of each kernel
    damping: dict[str, float]  # the sweep: the largest as used
    error: dict[str, float]  # the sweep: squared change of the kernel's outputs over their squares


OnLayer = Callable[[LayerInfo, Hidden], None]


@checked_but("pattern")
def prune_layers(
    layers: Sequence[ResidentLayer],
    hidden: Hidden,
    *,
    sparsity: float | None = None,
    pattern: NM | None = None,
    method: Method = "sweep",
    output_gradients: OutputGradients | None = None,
    damping: Damping = ONE_PERCENT,
    block_size: int = 128,
    select: Select = is_kernel,
    microbatch_size: int = 8,
    sharding: Sharding | None = None,
    start: int = 0,
    on_layer: OnLayer | None = None,
) -> tuple[Hidden, list[LayerInfo]]:
    """Prune a deep network layer by layer, with the parameters of one layer on the device at a time.

    For each layer: load it, add up `Σ x xᵀ` of what each of its kernels reads, with the layer still dense and all
    layers before it pruned; prune each kernel; store the layer; run it once more, pruned, to make the hidden states of
    the next one. Hidden states of all sequences stay on the host between layers.

    Kernels are found in the program of the layer: leaves that it multiplies by, once, on either side of a matrix
    product. Those with axes of heads, `[width, heads, head_dim]` or `[heads, head_dim, width]`, are taken as matrices
    `[in, out]`; the runs of an N:M pattern go along `in`.

    Args:
        layers: In their order, for example the blocks of a decoder; embeddings and head stay outside.
        hidden: What goes into the first layer (into layer `start`): an array `[sequences, ...]` or a pytree of them,
            of the host or of devices; it is copied.
        sparsity: Fraction of every kernel to prune, in [0, 1]: exactly `round(sparsity · in · out)` weights.
        pattern: `NM(2, 4)`: in place of `sparsity`.
        method: `"sweep"`, SparseGPT's, which moves survivors; `"wanda"`, `|w|·‖x‖` compared within each output unit;
            `"magnitude"`, `|w|` compared within each kernel.
        output_gradients: From `squared_output_gradients`: moments become `Σ δ² x xᵀ`, the row Fisher of the loss, for
            each group of output units. None for the layer's own squared error. Not for magnitude.
        damping: Of the sweep, in units of the moments, or `Relative(alpha)` of each one's mean diagonal.
        block_size: Of the sweep, see `column_sweep`.
        select: Which leaves are prunable, asked as `select(path, leaf)`.
        microbatch_size: Sequences on the device at once.
        sharding: How micro-batches are laid out along their first axis, for example `NamedSharding(mesh, P("data"))`;
            moments are then summed over the devices by XLA.
        start: First layer to prune, of a run that goes on.
        on_layer: Called as `on_layer(info, hidden)` when a layer is stored, with the hidden states of the next one:
            save them, and a killed run goes on with `start=info.layer + 1, hidden=hidden` to the same bits.

    Returns:
        Hidden states behind the last layer, on the host, and what happened to each layer.

    Raises:
        ValueError: No layers, or `start` not among them; neither or both of `sparsity` and `pattern`; a method that
            does not exist; no sequences; a layer without selected kernels, with one that is not found, or one that the
            pattern does not divide; hidden states, moments or parameters that are not finite; a layer whose outputs
            do not have the structure of its inputs; `output_gradients` of other layers, sequences or micro-batches.

    Cost:
        Two forward passes. On the device one layer, one micro-batch of activations, and for the sweep `4 in²` bytes
        for each kernel, times the groups of output units; on the host the hidden states twice. Flops of a kernel: `2 ·
        tokens · in² + in³ + in² · out`, the first two for each group.

    References:
        Frantar & Alistarh, SparseGPT, 2023 (arXiv 2301.00774), sections 3 and 4.1; Sun et al., Wanda, 2023
        (arXiv 2306.11695), equation 1.

    Example:
        >>> import jax.numpy as jnp, numpy as np, woodjax as wj
        >>> apply = lambda p, x: x + jnp.tanh(x @ p["up"]) @ p["down"]
        >>> params = {"up": jnp.ones((4, 8)), "down": jnp.ones((8, 4))}
        >>> layers = [wj.HostLayer(apply, params) for _ in range(3)]
        >>> hidden, infos = wj.prune_layers(layers, np.eye(4, dtype=np.float32), pattern=wj.NM(2, 4))
        >>> [info.sparsity for info in infos], int(layers[0].masks["up"].sum())
        ([0.5, 0.5, 0.5], 16)
    """
    rule = PruneRule.of(method, sparsity, pattern, damping, block_size, weighted=output_gradients is not None)
    if not 0 <= start < len(layers):
        raise ValueError(f"start is {start} of {len(layers)} layers: pass the number of the first layer to prune.")
    batches = MicroBatches.of(hidden, microbatch_size, sharding)
    hidden = to_host(hidden)
    check_finite(hidden, "The hidden states that come in", "look at the embedding and its inputs.")
    infos = []
    for number in range(start, len(layers)):
        try:
            weights = layer_weights(output_gradients, number, len(layers), batches)
            hidden, info = _prune_layer(layers[number], number, hidden, batches, weights, rule, select)
        except ValueError as error:
            raise ValueError(f"Layer {number}: {error}") from error
        infos.append(info)
        if on_layer is not None:
            on_layer(info, hidden)
    return hidden, infos


def _prune_layer(
    layer: ResidentLayer,
    number: int,
    hidden: Hidden,
    batches: MicroBatches,
    weights: HostWeights | None,
    rule: PruneRule,
    select: Select,
) -> tuple[Hidden, LayerInfo]:
    function = as_partial(layer.apply)
    params = batches.place(layer.load())
    layout = make_layout(params, select=select)
    views = find_kernels(function, params, hidden, layout)
    _check_pattern(layout, views, rule.pattern)
    moments = _moments(function, params, hidden, batches, weights, layout, views, rule.method)
    pruned = {
        spec.path: prune_kernel(leaf, views[spec.path], moments.pop(spec.path, None), rule)
        for spec, leaf in zip(layout.leaves, jax.tree.leaves(params), strict=True)
        if spec.selected
    }
    info = _info(number, pruned)
    params, masks = _put_back(params, layout, pruned)
    del pruned
    layer.store(params, masks)
    hidden = batches.map(partial(advance, function, params), hidden)
    check_finite(hidden, "The hidden states that go out, pruned,", "prune less, or look for overflow in the layer.")
    return hidden, info


def _moments(
    function: LayerFn,
    params: Params,
    hidden: Hidden,
    batches: MicroBatches,
    weights: HostWeights | None,
    layout: Layout,
    views: dict[str, KernelView],
    method: Method,
) -> Moments:
    if method == "magnitude":
        return {}
    diagonal = method == "wanda"
    if weights is not None and (lost := sorted(set(views) - set(weights))):
        raise ValueError(f"output_gradients have nothing for the kernels {lost}: make them with the same select=.")
    used = None if weights is None else {path: weights[path] for path in views}
    groups = {path: 1 if used is None else used[path].shape[1] for path in views}
    moments = empty_moments(params, layout, views, groups, diagonal=diagonal, device=batches.everywhere)
    for part, rows in batches.cut((hidden, used)):
        moments = add_moments(function, params, part, rows, moments, layout=layout, diagonal=diagonal)
        jax.block_until_ready(moments)  # or all micro-batches would wait on the device
    return moments


def _check_pattern(layout: Layout, views: dict[str, KernelView], pattern: NM | None) -> None:
    for spec in layout.selected:
        inputs, _ = views[spec.path].matrix_shape(spec.shape)
        if pattern is not None and inputs % pattern.m:
            raise ValueError(
                f"Kernel '{spec.path}' reads {inputs} inputs, no multiple of {pattern.m} for {pattern.n}:{pattern.m}: "
                "leave it out by select=."
            )


def _put_back(params: Params, layout: Layout, pruned: dict[str, PrunedKernel]) -> tuple[Params, Masks]:
    leaves, masks = [], []
    for spec, leaf in zip(layout.leaves, jax.tree.leaves(params), strict=True):
        leaves.append(pruned[spec.path].kernel if spec.selected else leaf)
        masks.append(pruned[spec.path].mask if spec.selected else jnp.ones(spec.shape, bool))
    return jax.tree.unflatten(layout.treedef, leaves), jax.tree.unflatten(layout.treedef, masks)


def _info(number: int, pruned: dict[str, PrunedKernel]) -> LayerInfo:
    sizes = {path: found.mask.size for path, found in pruned.items()}
    known = jax.device_get({path: found[2:] for path, found in pruned.items()})
    kept = {path: int(count) for path, (count, *_) in known.items()}
    if lost := [path for path, (_, finite, *_) in known.items() if not finite[0]]:
        raise ValueError(f"Kernels {lost} hold NaN or infinities: look for a training that diverged.")
    if lost := [path for path, (_, finite, *_) in known.items() if not finite[1]]:
        raise ValueError(f"The second moments of what {lost} read are not finite: look for overflow in the layer.")
    return LayerInfo(
        number,
        1 - sum(kept.values()) / sum(sizes.values()),
        {path: kept[path] / sizes[path] for path in pruned},
        {path: float(damping.max()) for path, (*_, damping, _) in known.items() if damping is not None},
        {path: float(error) for path, (*_, error) in known.items() if error is not None},
    )
