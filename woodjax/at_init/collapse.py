"""What masks leave of each layer, and of the paths through the network."""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from woodjax.at_init._selected import inputs_of, wide
from woodjax.door import checked
from woodjax.gradients import check_apply
from woodjax.loss_rows import LossRow
from woodjax.tree import check_bool, check_floating, check_like, is_kernel, make_layout
from woodjax.typing import ApplyFn, Batch, Masks, Params, Select

FLOWS = 16  # random inputs and
DRAWS = 24  # random positive kernels: a max-pooling window lets one position of each through


class CollapseReport(NamedTuple):
    """Density of every prunable leaf."""

    density: dict[str, Float[Array, "..."]]  # by path; one number a layer where layers are stacked
    collapsed: Int[Array, ""]  # layers that keep nothing
    lowest_density: Float[Array, ""]
    sparsity: Float[Array, ""]  # of all prunable weights together

    @property
    def collapsed_layers(self) -> list[str]:
        """Paths of leaves with a layer that keeps nothing; outside `jit` only."""
        return [path for path, density in self.density.items() if not bool(jnp.all(density > 0))]


@checked
def layer_collapse_report(masks: Masks, *, select: Select = is_kernel, batch_axes: int = 0) -> CollapseReport:
    """Density per layer, collapsed layers and the lowest density.

    A layer that keeps nothing cuts the network, unless a residual connection goes round it: look before training.

    Args:
        masks: A params-tree of bool. For effective densities pass those of `effective_masks`.
        select: Which leaves are prunable: the same that the masks were made with.
        batch_axes: Leading axes that stack layers.

    Returns:
        The report.

    Raises:
        ValueError: A mask that is not bool; no leaf selected, or an empty one.

    Cost:
        `d` additions.

    References:
        Tanaka et al., SynFlow, 2020 (arXiv 2006.05467), section 3: layer-collapse.

    Example:
        >>> import jax.numpy as jnp, woodjax as wj
        >>> report = wj.layer_collapse_report({"a": jnp.zeros((2, 2), bool), "b": jnp.eye(2, dtype=bool)})
        >>> report.collapsed_layers, float(report.density["b"]), float(report.sparsity)
        (['a'], 0.5, 0.75)
    """
    check_bool(masks, "masks")
    shapes = jax.tree.map(lambda mask: jax.ShapeDtypeStruct(jnp.shape(mask), jnp.float32), masks)
    specs = make_layout(shapes, select=select, batch_axes=batch_axes).leaves
    density, kept = {}, jnp.zeros((), jnp.float32)
    for spec, mask in zip(specs, jax.tree.leaves(masks), strict=True):
        if spec.selected:
            layers = jnp.reshape(mask, (*spec.shape[:batch_axes], -1))
            density[spec.path] = jnp.mean(layers, axis=-1, dtype=jnp.float32)
            kept += jnp.sum(mask, dtype=jnp.float32)
    every = jnp.concatenate([jnp.ravel(x) for x in density.values()])
    size = sum(math.prod(spec.shape) for spec in specs if spec.selected)
    return CollapseReport(density, jnp.sum(every == 0), jnp.min(every), 1 - kept / size)


@checked
def effective_masks(
    apply_fn: ApplyFn, params: Params, masks: Masks, batch: Batch, *, select: Select = is_kernel, seed: int = 0
) -> Masks:
    """Masks without the weights that lie on no path from the input to the outputs.

    A weight whose neuron has lost all its inputs or all its outputs does nothing, and counts as kept. Positive flow
    is sent through the network of kept weights: where none arrives, or where none of what arrives goes on to the
    outputs, there is no path.

    Args:
        apply_fn: `apply_fn(params, inputs) -> outputs [n, C]`: dense layers and convolutions, ReLUs, pooling, residual
            sums, normalisation by batch statistics AS THEY BEGIN (mean 0). Networks that take means away (layer
            normalisation) let no flow through.
        params: A params-tree; of kernels the shape alone counts, of the other leaves the absolute value.
        masks: A params-tree of bool.
        batch: `(inputs, labels)` or inputs: their shape alone counts.
        select: Which leaves are prunable.
        seed: Of the random positive inputs.

    Returns:
        A params-tree of bool: `masks`, and False on what is cut off. Weights without flow in the dense network as
        well, such as a corner of a kernel that only ever meets padding, stay.

    Raises:
        ValueError: Trees that differ; masks that are not bool; no leaf selected; inputs that are not floating; a leaf
            that no flow reaches in the dense network, or flow that float32 does not hold (outside `jit`).

    Cost:
        96 forward and backward passes of 16 inputs.

    References:
        Vysogorets & Kempe, Connectivity matters, 2021 (arXiv 2107.02306): effective sparsity.

    Example:
        >>> import jax.numpy as jnp, woodjax as wj
        >>> params = [jnp.ones((2, 2)), jnp.ones((2, 1))]
        >>> masks = [jnp.array([[True, True], [True, True]]), jnp.array([[True], [False]])]
        >>> apply_fn = lambda p, x: jnp.maximum(x @ p[0], 0) @ p[1]
        >>> [mask.tolist() for mask in wj.effective_masks(apply_fn, params, masks, jnp.ones((1, 2)))]
        [[[True, False], [True, False]], [[True], [False]]]
    """
    check_like(masks, params, "masks")
    check_bool(masks, "masks")
    layout = make_layout(params, select=select)
    inputs = inputs_of(batch)
    check_floating(inputs)
    check_apply(apply_fn, params, inputs)
    key = jax.random.key(seed)
    drawn = jax.tree.map(lambda x: jax.random.uniform(key, (FLOWS, *x.shape[1:]), x.dtype, 0.5, 1.5), inputs)
    everything = jax.tree.map(jnp.ones_like, masks)
    chosen = tuple(spec.selected for spec in layout.leaves)
    reached = [_reached(LossRow(apply_fn, False), params, m, drawn, key, chosen=chosen) for m in (everything, masks)]
    for _, held in reached:
        if not isinstance(held, jax.core.Tracer) and not bool(held):
            raise ValueError(
                "The flow through the network overflows: pass apply_fn with batch statistics as they begin, "
                "and scales of normalisation of about one."
            )
    found = [jax.tree.leaves(tree) for tree, _ in reached]
    results = []
    for spec, mask, dense, sparse in zip(layout.leaves, jax.tree.leaves(masks), *found, strict=True):
        if spec.selected and not isinstance(dense, jax.core.Tracer) and not bool(jnp.any(dense)):
            raise ValueError(
                f"No flow goes through leaf '{spec.path}' in the dense network: pass apply_fn with batch statistics as "
                "they begin. Networks with layer normalisation or other differences have no positive flow."
            )
        results.append(mask & (sparse | ~dense) if spec.selected else mask)
    return jax.tree.unflatten(layout.treedef, results)


def _reached(
    network: LossRow, params: Params, masks: Masks, inputs: Batch, key: Key[Array, ""], *, chosen: tuple[bool, ...]
) -> tuple[Masks, Bool[Array, ""]]:
    # Which weights have flow on both sides in any draw, and whether all numbers were finite.
    found, finite = _flow(network, params, masks, inputs, key, chosen=chosen)
    for number in range(1, DRAWS):
        more, held = _flow(network, params, masks, inputs, jax.random.fold_in(key, number), chosen=chosen)
        found, finite = jax.tree.map(jnp.logical_or, found, more), finite & held
    return found, finite


@partial(jax.jit, static_argnames="chosen")
def _flow(
    network: LossRow, params: Params, masks: Masks, inputs: Batch, key: Key[Array, ""], *, chosen: tuple[bool, ...]
) -> tuple[Masks, Bool[Array, ""]]:
    leaves, treedef = jax.tree.flatten(params)
    positive = [
        _unit_flow(mask, jax.random.fold_in(key, i), wide(w).dtype) if ours else jnp.abs(wide(w))
        for i, (ours, mask, w) in enumerate(zip(chosen, jax.tree.leaves(masks), leaves, strict=True))
    ]
    tree = jax.tree.unflatten(treedef, positive)

    def gradient(x: Batch) -> Params:
        return jax.grad(lambda p: jnp.sum(network.loss_fn(p, x)))(tree)

    # What biases feed in is there without input too, to the same bits where no path from the input ends.
    fed, unfed = gradient(jax.tree.map(lambda x: x * 1e3, inputs)), gradient(jax.tree.map(jnp.zeros_like, inputs))
    finite = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves((fed, unfed))]
    return jax.tree.map(lambda a, b: a != b, fed, unfed), jnp.all(jnp.stack(finite))


def _unit_flow(mask: Array, key: Key[Array, ""], dtype: jnp.dtype) -> Array:
    # Every output gets as much as an input has, on average: a deep sparse network neither over- nor underflows.
    outputs = mask.shape[-1] if mask.ndim > 1 else 1
    size = outputs / jnp.maximum(jnp.sum(mask, dtype=dtype), 1)
    return jnp.where(mask, jax.random.uniform(key, mask.shape, dtype, 0.5, 1.5) * size, 0)
