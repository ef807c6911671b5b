"""Empirical Fisher kept as its gradients: exact for the whole network, never `d × d`.

`F = λI + GᵀG/m` through the `m × m` matrix `mλI + GGᵀ = LLᵀ`; `L⁻¹` is kept.

Memory: `m·nb·b` for the gradients (`m·d` for the whole network), `nb·m²` for the factors.
Flops: `2m²b + m³` a block to build, `2m²b` for the diagonal, `4mb` for a product.
"""

from dataclasses import dataclass
from functools import partial

import jax
from jaxtyping import Array, Bool, Float

from woodjax import linalg
from woodjax.curvature._blocked import Blocked, gradient_blocks
from woodjax.tree import is_kernel
from woodjax.typing import Gradients, Select


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["gradients", "whitener"],
    meta_fields=["layout"],
)
@dataclass(frozen=True)
class LowRankFisher(Blocked):
    """Gradients and the inverse factor of their damped Gram matrix. Made by `low_rank_fisher`."""

    gradients: Float[Array, "nb m b"]
    whitener: linalg.Whitener  # every field with a leading axis [nb]

    @property
    def damping(self) -> Float[Array, " nb"]:
        """`λ` of each block, as used: raised where a factor failed."""
        return self.whitener.damping

    def block_inverse_diagonal(self) -> Float[Array, "nb b"]:
        """`2m²b` flops a block, streamed over columns."""
        return jax.vmap(linalg.dual_inverse_diagonal)(self.gradients, self.whitener)

    def block_solve(self, blocks: Float[Array, "nb b"]) -> Float[Array, "nb b"]:
        """`4mb + 4m²` flops a block."""
        return jax.vmap(linalg.dual_solve)(self.gradients, self.whitener, blocks)

    def block_matvec(self, blocks: Float[Array, "nb b"]) -> Float[Array, "nb b"]:
        """`4mb` flops a block."""
        products = linalg.contract("nmb,nb->nm", self.gradients, blocks)
        back = linalg.contract("nmb,nm->nb", self.gradients, products)
        return self.damping[:, None] * blocks + back / self.gradients.shape[1]

    def block_compensate(
        self,
        weights: Float[Array, "nb b"],
        kept: Bool[Array, "nb b"],
        gradient: Float[Array, "nb b"] | None,
    ) -> Float[Array, "nb b"]:
        """`2m²b + m³` flops a block: the Gram matrix of the survivors."""
        return jax.vmap(linalg.joint_step_gram)(self.gradients, self.damping, weights, kept, gradient)


def low_rank_fisher(
    gradients: Gradients,
    *,
    block_size: int | None = None,
    damping: Float[Array, ""] | float = 1e-5,
    select: Select = is_kernel,
    batch_axes: int = 0,
) -> LowRankFisher:
    """Empirical Fisher of the whole network, or of blocks, from its gradients alone.

    Args:
        gradients: Per-example gradients, leaves `[m, *leaf.shape]`.
        block_size: None for one block over the whole network (no block-diagonal
            approximation), or coordinates in a block `b`, clipped to the largest layer.
        damping: `λ > 0`, in units of squared gradients, not divided by `m`. Where it is too
            small for the precision at hand it is raised by tens: see the result's `damping`.
        select: Which leaves are prunable, asked as `select(path, leaf)`.
        batch_axes: Leading axes that stack layers; no block straddles two layers.

    Returns:
        A curvature.

    Raises:
        ValueError: Damping not positive; gradients of unequal length; a selected leaf that is
            empty or not floating; `block_size < 1`.

    Cost:
        Memory `m·d + nb·m²`; flops `2m²d + nb·m³`.

    References:
        Frantar et al., M-FAC, 2021 (arXiv 2107.03356), static algorithm;
        Benbaki et al., CHITA, 2023 (arXiv 2302.14623), section 3.

    Example:
        >>> import jax.numpy as jnp, woodjax as wj
        >>> fisher = wj.low_rank_fisher({"w": jnp.array([[[1.0, 0.0]]])}, damping=1.0)
        >>> fisher.inverse_diagonal()["w"].round(3).tolist()
        [[0.5, 1.0]]
    """
    layout, blocks = gradient_blocks(gradients, damping, block_size=block_size, select=select, batch_axes=batch_axes)
    stacked = blocks.swapaxes(0, 1)
    whitener = jax.vmap(linalg.whiten_gram, in_axes=(0, None))(stacked, damping)
    return LowRankFisher(layout, stacked, whitener)
