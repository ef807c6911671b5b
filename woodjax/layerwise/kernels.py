"""Kernels of a layer as matrices `[in, out]`, and what they read, found in the layer's program."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from woodjax.layerwise.layers import Hidden, LayerFn
from woodjax.taps import Product, run_tapped
from woodjax.tree import Layout
from woodjax.typing import Params


class KernelView(NamedTuple):
    """How a leaf is a matrix from what it reads to what it writes."""

    axes: tuple[int, ...]  # that are summed over, in ascending order: the inputs

    def matrix_shape(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Inputs and outputs of a leaf of this shape."""
        inputs = math.prod(shape[axis] for axis in self.axes)
        return inputs, math.prod(shape) // inputs

    def to_matrix(self, leaf: Float[Array, "..."]) -> Float[Array, "in out"]:
        """The leaf as a matrix, in its own dtype."""
        moved = jnp.moveaxis(leaf, self.axes, range(len(self.axes)))
        return moved.reshape(math.prod(moved.shape[: len(self.axes)]), -1)

    def to_leaf(self, matrix: Array, leaf: Float[Array, "..."]) -> Array:
        """A matrix in the shape of the leaf, in the matrix' dtype."""
        moved = jnp.moveaxis(leaf, self.axes, range(len(self.axes)))
        return jnp.moveaxis(matrix.reshape(moved.shape), range(len(self.axes)), self.axes)


class Recording(NamedTuple):
    """A layer as it was run."""

    outputs: Hidden
    views: dict[str, KernelView]  # by the path of the kernel
    inputs: dict[str, Float[Array, "rows in"]]  # a row for each place that the kernel is applied to
    uses: dict[str, int]  # how many equations use the leaf


def run_recorded(
    function: LayerFn,
    params: Params,
    hidden: Hidden,
    layout: Layout,
    shifts: dict[str, Float[Array, "rows out"]] | None = None,
) -> Recording:
    """Run a layer and note what each selected kernel reads.

    Args:
        function: `function(params, hidden)`.
        params: The parameters.
        hidden: What comes in.
        layout: Which leaves are selected.
        shifts: Added to what the kernels write: its gradient is that of their outputs.

    Returns:
        Outputs, kernels and inputs; leaves that are not used as kernels are left out.

    Cost:
        What the layer costs.
    """
    views: dict[str, KernelView] = {}
    inputs: dict[str, Array] = {}

    def tap(product: Product) -> Array:
        spec = layout.leaves[product.leaf]
        if not spec.selected:
            return product.output
        contracted, _ = product.equation.params["dimension_numbers"]
        axes, read = contracted[product.side], contracted[1 - product.side]
        order = sorted(range(len(axes)), key=axes.__getitem__)
        views[spec.path] = KernelView(tuple(axes[i] for i in order))
        inputs[spec.path] = _rows(product.value, [read[i] for i in order])
        if shifts is None:
            return product.output
        return product.output + _as_output(shifts[spec.path].astype(product.output.dtype), product)

    uses: Counter[int] = Counter()
    outputs = run_tapped(function, params, hidden, _dense_kernel, tap, uses)
    return Recording(outputs, views, inputs, {spec.path: uses[i] for i, spec in enumerate(layout.leaves)})


def find_kernels(function: LayerFn, params: Params, hidden: Hidden, layout: Layout) -> dict[str, KernelView]:
    """How each selected leaf of a layer is a matrix.

    Args:
        function: `function(params, hidden)`.
        params: The parameters; shapes are enough.
        hidden: What comes in; shapes are enough.
        layout: Which leaves are selected.

    Returns:
        A view by the path of the leaf.

    Raises:
        ValueError: A selected leaf that is not used once, in a matrix product; outputs that are not what a next layer
            would take.

    Cost:
        One trace.
    """
    found: dict[str, KernelView] = {}
    uses: dict[str, int] = {}

    def run(params: Params, hidden: Hidden) -> Hidden:
        recording = run_recorded(function, params, hidden, layout)
        found.update(recording.views)
        uses.update(recording.uses)
        return recording.outputs

    shapes = jax.eval_shape(run, params, hidden)
    if jax.tree.structure(shapes) != jax.tree.structure(hidden) or any(
        out.shape[:1] != x.shape[:1] for out, x in zip(jax.tree.leaves(shapes), jax.tree.leaves(hidden), strict=True)
    ):
        raise ValueError(
            f"apply makes {shapes} of hidden states of the shapes {jax.tree.map(jnp.shape, hidden)}: it should return "
            "what the next layer takes, with the sequences along the first axis."
        )
    lost = [spec.path for spec in layout.selected if spec.path not in found or uses[spec.path] != 1]
    if lost:
        raise ValueError(
            f"The leaves {lost} are not used once as the kernel of a matrix product, outside loops. Leave them out by "
            f"select=, for example select=lambda path, leaf: path not in {lost} and len(leaf.shape) >= 2."
        )
    return found


def _dense_kernel(equation: Any, leaves: Sequence[int | None]) -> int | None:
    # einsum puts kernels on either side.
    if equation.primitive.name != "dot_general":
        return None
    (contracted, _), (batched, _) = equation.params["dimension_numbers"]
    is_leaf = [leaf is not None for leaf in leaves]
    if batched or not contracted or is_leaf.count(True) != 1:
        return None
    return is_leaf.index(True)


def _rows(value: Array, read: Sequence[int]) -> Float[Array, "rows in"]:
    moved = jnp.moveaxis(value, read, range(value.ndim - len(read), value.ndim))
    return moved.reshape(-1, math.prod(moved.shape[value.ndim - len(read) :]))


def _as_output(rows: Float[Array, "rows out"], product: Product) -> Array:
    # Free axes of the left operand come first, then those of the right one.
    output = product.output
    written = product.equation.invars[product.side].aval.ndim - len(product.equation.params["dimension_numbers"][0][0])
    if product.side == 1:
        return rows.reshape(output.shape)
    moved = rows.reshape(*output.shape[written:], *output.shape[:written])
    return jnp.moveaxis(moved, range(moved.ndim - written, moved.ndim), range(written))
