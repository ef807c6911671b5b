"""Diagonal empirical Fisher: the mean squared per-example gradient, plus damping.

Memory: `d`. Flops: `2md`.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from woodjax import linalg
from woodjax.curvature._blocked import Blocked, gradient_blocks
from woodjax.tree import is_kernel
from woodjax.typing import Gradients, Params, Select


@partial(jax.tree_util.register_dataclass, data_fields=["blocks", "damping"], meta_fields=["layout"])
@dataclass(frozen=True)
class DiagonalFisher(Blocked):
    """Diagonal `h = λ + mean g²` as one row `[1, d]`. Made by `diagonal_fisher`."""

    blocks: Float[Array, "nb b"]
    damping: Float[Array, " nb"]

    def diagonal(self) -> Params:
        """`h` as a tree, for `obd_scores`; `+inf` on leaves that are not prunable."""
        return self.layout.to_tree(jnp.where(jnp.isfinite(self.blocks), self.blocks, jnp.nan), fill=jnp.inf)

    def block_inverse_diagonal(self) -> Float[Array, "nb b"]:
        """`1/h`."""
        return 1 / self.blocks

    def block_solve(self, blocks: Float[Array, "nb b"]) -> Float[Array, "nb b"]:
        """`v/h`."""
        return blocks / self.blocks

    def block_matvec(self, blocks: Float[Array, "nb b"]) -> Float[Array, "nb b"]:
        """`h·v`."""
        return blocks * self.blocks

    def block_compensate(
        self,
        weights: Float[Array, "nb b"],
        kept: Bool[Array, "nb b"],
        gradient: Float[Array, "nb b"] | None,
    ) -> Float[Array, "nb b"]:
        """`−ḡ/h` on survivors: a diagonal sees no correlation to make use of."""
        step = jnp.zeros_like(weights) if gradient is None else -gradient / self.blocks
        return jnp.where(kept, step, -weights)


def diagonal_fisher(
    gradients: Gradients,
    *,
    damping: Float[Array, ""] | float = 1e-5,
    select: Select = is_kernel,
    batch_axes: int = 0,
) -> DiagonalFisher:
    """Diagonal empirical Fisher.

    Args:
        gradients: Per-example gradients, leaves `[m, *leaf.shape]`.
        damping: `λ > 0`, in units of squared gradients.
        select: Which leaves are prunable, asked as `select(path, leaf)`.
        batch_axes: Leading axes that stack layers.

    Returns:
        A curvature.

    Raises:
        ValueError: Damping not positive; gradients of unequal length; a selected leaf that is
            empty or not floating.

    Cost:
        Memory `d`; flops `2md`.

    References:
        Theis et al. 2018 (arXiv 1801.05787), equation 6.

    Example:
        >>> import jax.numpy as jnp, woodjax as wj
        >>> fisher = wj.diagonal_fisher({"w": jnp.array([[[1.0, 3.0]]])}, damping=1.0)
        >>> fisher.diagonal()["w"].tolist()
        [[2.0, 10.0]]
    """
    layout, blocks = gradient_blocks(gradients, damping, block_size=None, select=select, batch_axes=batch_axes)
    squares = linalg.contract("mnb,mnb->nb", blocks, blocks) / blocks.shape[0]
    return DiagonalFisher(layout, squares + damping, jnp.full(1, damping))
