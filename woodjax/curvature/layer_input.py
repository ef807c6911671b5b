"""The Hessian of a layer's own squared error: second moments of its inputs, the same for every output unit.

Changing the kernel `W [in, out]` of a dense layer by `δ` changes its output by `xᵀδ`. The mean squared change is
`½ δ_oᵀ H δ_o` summed over output units `o`, with `H = (2/m) Σ x xᵀ`: neither labels nor a backward pass are needed,
and predictions are in units of squared outputs, not of the loss.

Memory: `2 Σ in²` floats. Flops: `2m · in²` to build, `2 · in³` to invert.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from woodjax import linalg
from woodjax.curvature._blocked import INVERSION_BYTES, after, map_chunks
from woodjax.curvature._dense_layers import (
    DenseLayers,
    Matrices,
    add_outer,
    damp,
    invert_in_turn,
    layout_of_dense_layers,
    sum_taps,
)
from woodjax.curvature.damping import ONE_PERCENT, Damping, Rule, count_raised, resolve_damping, split_damping
from woodjax.curvature.protocol import compiled
from woodjax.door import checked_but
from woodjax.placement import on_any_axes
from woodjax.stream import GradientStream
from woodjax.tree import Layout, is_kernel, wide_dtype
from woodjax.typing import Masks, Params, Select, Updates

Moments = list[Float[Array, "in in"]]  # one for each selected leaf


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["hessians", "inverses", "damping", "raised"],
    meta_fields=["layout"],
)
@dataclass(frozen=True)
class LayerInputHessian(DenseLayers):
    """`H` and `H⁻¹` of one output unit, `[in, in]` for each dense layer. Made by `layer_input_hessian`."""

    hessians: Moments  # damping included
    inverses: Moments
    damping: Float[Array, " leaves"]  # as used
    raised: Int[Array, ""]  # leaves where it was raised

    @compiled
    def inverse_diagonal(self) -> Params:
        """`[H⁻¹]_qq`, the same along the output axis; 0 on leaves that are not prunable."""
        shapes = [spec.shape for spec in self.layout.selected]
        diagonals = [jnp.diagonal(inverse)[:, None] for inverse in self.inverses]
        known = [jnp.where(diagonal > 0, diagonal, jnp.nan) for diagonal in diagonals]
        return self._tree([jnp.broadcast_to(x, shape) for x, shape in zip(known, shapes, strict=True)])

    @compiled
    def solve(self, tree: Params) -> Params:
        """`H⁻¹v`: `2 · in² · out` flops a leaf."""
        return self._product(self.inverses, tree)

    @compiled
    def matvec(self, tree: Params) -> Params:
        """`Hv`: `2 · in² · out` flops a leaf."""
        return self._product(self.hessians, tree)

    @compiled
    def compensate(self, params: Params, masks: Masks, gradient: Params | None = None) -> Updates:
        """Exact minimiser of `ḡᵀδ + ½δᵀHδ` with `δ_Q = −w_Q`: `in³/3` flops an output unit."""
        trees = [self._matrices(tree) for tree in (params, masks, gradient) if tree is not None]
        results: Matrices = []
        for inverse, *leaves in zip(self.inverses, *trees, strict=True):  # one leaf after another
            waiting = after(inverse, results[-1]) if results else inverse
            units = tuple(leaf.T for leaf in leaves)
            step = partial(_unit_step, waiting)
            results.append(map_chunks(step, units, INVERSION_BYTES * inverse.size).T)
        return self._tree(results)

    def _product(self, moments: Moments, tree: Params) -> Params:
        pairs = zip(moments, self._matrices(tree), strict=True)
        return self._tree([linalg.contract("ij,jo->io", moment, v) for moment, v in pairs])


def _unit_step(inverse: Float[Array, "in in"], unit: tuple[Array, ...]) -> Float[Array, " in"]:
    return linalg.joint_step_inverse(inverse, *unit)


@checked_but("stream")
@on_any_axes
def layer_input_hessian(
    stream: GradientStream, *, damping: Damping = ONE_PERCENT, select: Select = is_kernel
) -> LayerInputHessian:
    """Hessian of each dense layer's squared error, from its inputs alone: L-OBS, OBC and SparseGPT's curvature.

    Args:
        stream: Rows; of their gradients nothing is computed. Kernels are `[in, out]`, as Flax's.
        damping: `λ`: a positive number in units of squared inputs, or `Relative(alpha)` of the mean diagonal over
            all selected layers.
        select: Which leaves are prunable, asked as `select(path, leaf)`: kernels of dense layers.

    Returns:
        A curvature whose predictions are mean squared changes of the layers' outputs.

    Raises:
        ValueError: Gradients instead of a stream; a stream with masks; a selected leaf that is not the kernel of
            a dense layer; damping not positive, or `"auto"`.

    Cost:
        One forward pass; memory `2 Σ in²`; `2m · in²` flops a leaf to build, `2 · in³` to invert.

    References:
        Dong, Chen & Pan, L-OBS, 2017 (arXiv 1705.07565), section 3; Frantar & Alistarh, OBC, 2022
        (arXiv 2208.11580), section 3; SparseGPT, 2023 (arXiv 2301.00774), section 3.

    Example:
        >>> import jax.numpy as jnp, woodjax as wj
        >>> loss = lambda w, x: (x @ w).sum()
        >>> stream = wj.stream_gradients(loss, jnp.ones((2, 1)), jnp.array([[1.0, 0.0]]))
        >>> wj.layer_input_hessian(stream, damping=1.0).matvec(jnp.ones((2, 1))).tolist()  # 2x² + λ
        [[3.0], [1.0]]
    """
    rule, number = split_damping(damping)
    layout = layout_of_dense_layers(stream, select, "layer_input_hessian")
    dtype = wide_dtype(stream.params)
    sums = sum_taps(stream, layout, _add_inputs, [jnp.zeros((spec.shape[0],) * 2, dtype) for spec in layout.selected])
    return _invert(sums, stream.num_rows, number, layout=layout, rule=rule)


def _add_inputs(total: Array, inputs: Float[Array, "k in"], output_gradients: Float[Array, "k out"]) -> Array:
    del output_gradients
    return add_outer(total, inputs)


@partial(jax.jit, static_argnames=("layout", "rule"))
def _invert(
    sums: Moments, m: int, number: Float[Array, ""] | float, *, layout: Layout, rule: Rule
) -> LayerInputHessian:
    moments = [2 * total / m for total in sums]
    asked = jnp.asarray(resolve_damping(rule, number, lambda: _every_weight(layout, moments)))
    results = invert_in_turn(moments, [asked] * len(moments))
    used = jnp.stack([result.damping for result in results])
    hessians = [damp(moment, result.damping) for moment, result in zip(moments, results, strict=True)]
    return LayerInputHessian(layout, hessians, [result.inverse for result in results], used, count_raised(used, asked))


def _every_weight(layout: Layout, moments: Moments) -> Float[Array, " d"]:
    pairs = zip(layout.selected, moments, strict=True)
    return jnp.concatenate([jnp.repeat(jnp.diagonal(moment), spec.shape[1]) for spec, moment in pairs])
