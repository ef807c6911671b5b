"""The empirical Fisher from its gradients alone, in one call."""

from functools import partial

import jax
from jaxtyping import Array, Float

from woodjax.curvature.damping import (
    ONE_PERCENT,
    Damping,
    check_damping,
)
from woodjax.curvature.gradient_rows import GradientRows
from woodjax.curvature.low_rank import LowRankFisher, factored
from woodjax.curvature.sums import accumulate, layout_of
from woodjax.door import checked
from woodjax.placement import on_any_axes
from woodjax.stream import GradientStream
from woodjax.tree import Layout, is_kernel, wide_dtype
from woodjax.typing import Gradients, Select


@checked
@on_any_axes
def low_rank_fisher(
    gradients: Gradients | GradientStream,
    *,
    block_size: int | None = None,
    damping: Damping = ONE_PERCENT,
    select: Select = is_kernel,
    batch_axes: int = 0,
) -> LowRankFisher:
    """Empirical Fisher of the whole network, or of blocks, from its gradients alone.

    Args:
        gradients: Per-example gradients, leaves `[m, *leaf.shape]`, or a stream of them, which is
            written straight into the rows that are kept. `streamed_fisher` keeps none.
        block_size: None for one block over the whole network (no block-diagonal
            approximation), or coordinates in a block `b`, clipped to the largest layer.
        damping: `λ`, not divided by `m`: a positive number in units of squared gradients,
            `Relative(alpha)`, or `"auto"`; see `woodjax.curvature.damping`. Where it is too small for the
            precision at hand it is raised by tens: see the result's `damping` and `raised`.
        select: Which leaves are prunable, asked as `select(path, leaf)`.
        batch_axes: Leading axes that stack layers; no block straddles two layers.

    Returns:
        A curvature.

    Raises:
        ValueError: Damping not positive; gradients of unequal length; a selected leaf that is
            empty or not floating; `block_size < 1`.

    Cost:
        Memory `m·d + nb·m²`; about `m²d + nb·2m³/3` flops.

    References:
        Frantar et al., M-FAC, 2021 (arXiv 2107.03356), static algorithm;
        Benbaki et al., CHITA, 2023 (arXiv 2302.14623), section 3.

    Example:
        >>> import jax.numpy as jnp, woodjax as wj
        >>> fisher = wj.low_rank_fisher({"w": jnp.array([[[1.0, 0.0]]])}, damping=1.0)
        >>> fisher.inverse_diagonal()["w"].round(3).tolist()
        [[0.5, 1.0]]
    """
    check_damping(damping)
    layout = layout_of(gradients, block_size=block_size, select=select, batch_axes=batch_axes)
    if isinstance(gradients, GradientStream):
        (state,) = accumulate(
            gradients, (GradientRows.empty(layout, gradients.num_rows, wide_dtype(gradients.params)),)
        )
        rows = gradients.microbatches.in_order(state.rows) if isinstance(damping, str) else state.rows
        return factored(layout, rows, damping)
    return factored(layout, _to_rows(gradients, layout=layout), damping)


@partial(jax.jit, static_argnames="layout")
def _to_rows(gradients: Gradients, *, layout: Layout) -> Float[Array, "m nb b"]:
    return layout.to_blocks(gradients)
