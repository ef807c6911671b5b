"""Block-diagonal empirical Fisher with dense inverse blocks: WoodFisher's curvature.

`F = λI + (1/m) Σ gᵢgᵢᵀ` inside each block of `b` coordinates, zero between blocks.

Memory: `nb·b²` for the inverse, `m·nb·b` for the gradients while it is built.
Flops: those of the engine, for each block; see `woodjax.linalg`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from woodjax import linalg
from woodjax.curvature._blocked import Blocked, gradient_blocks
from woodjax.tree import is_kernel
from woodjax.typing import Gradients, Select

Engine = Literal["auto", "scan", "rank_k", "primal", "dual"]


def _as_asked(scan: Callable[..., Array]) -> Callable[..., linalg.DampedInverse]:
    return lambda gradients, damping: linalg.DampedInverse(scan(gradients, damping), jnp.asarray(damping))


ENGINES = {
    "scan": _as_asked(linalg.woodbury_scan),
    "rank_k": _as_asked(linalg.woodbury_scan_rank_k),
    "primal": linalg.primal_inverse,
    "dual": linalg.dual_inverse,
}


@partial(jax.tree_util.register_dataclass, data_fields=["inverse", "damping"], meta_fields=["layout"])
@dataclass(frozen=True)
class BlockFisher(Blocked):
    """Inverse Fisher blocks `[nb, b, b]`. Made by `block_fisher`."""

    inverse: Float[Array, "nb b b"]
    damping: Float[Array, " nb"]  # as used: raised where a factor failed

    def block_inverse_diagonal(self) -> Float[Array, "nb b"]:
        """Read the diagonals."""
        return jnp.diagonal(self.inverse, axis1=-2, axis2=-1)

    def block_solve(self, blocks: Float[Array, "nb b"]) -> Float[Array, "nb b"]:
        """`2b²` flops a block."""
        return linalg.contract("nij,nj->ni", self.inverse, blocks)

    def block_matvec(self, blocks: Float[Array, "nb b"]) -> Float[Array, "nb b"]:
        """Solve with the inverse: `b³/3` flops a block."""
        return jax.vmap(linalg.solve_cholesky)(self.inverse, blocks)

    def block_compensate(
        self,
        weights: Float[Array, "nb b"],
        kept: Bool[Array, "nb b"],
        gradient: Float[Array, "nb b"] | None,
    ) -> Float[Array, "nb b"]:
        """`b³/3` flops a block."""
        return jax.vmap(linalg.joint_step_inverse)(self.inverse, weights, kept, gradient)


def block_fisher(
    gradients: Gradients,
    *,
    block_size: int = 128,
    damping: Float[Array, ""] | float = 1e-5,
    engine: Engine = "auto",
    select: Select = is_kernel,
    batch_axes: int = 0,
) -> BlockFisher:
    """Inverse empirical Fisher, block by block.

    Args:
        gradients: Per-example gradients, leaves `[m, *leaf.shape]`.
        block_size: Coordinates in a block `b`, clipped to the largest layer. Blocks are
            contiguous in the row-major flattened leaf and do not cross leaves.
        damping: `λ > 0`, in units of squared gradients, not divided by `m`. Where it is too
            small for the precision at hand the engines with a Cholesky factor raise it by tens:
            see the result's `damping`.
        engine: How the inverse is made: `"scan"` (the paper's rank-1 recursion), `"rank_k"`,
            `"primal"` (Cholesky of the block), `"dual"` (Cholesky of the Gram matrix), or
            `"auto"`: primal if `m >= b`, else dual. All give the same matrix up to rounding, which
            is best for `"primal"` where gradients are large against the damping.
        select: Which leaves are prunable, asked as `select(path, leaf)`.
        batch_axes: Leading axes that stack layers; no block straddles two layers.

    Returns:
        A curvature.

    Raises:
        ValueError: Unknown engine; damping not positive; gradients of unequal length; a selected
            leaf that is empty or not floating; `block_size < 1`.

    Cost:
        Memory `nb·b² + m·nb·b`; flops per block as in `woodjax.linalg`.

    References:
        Singh & Alistarh, WoodFisher, 2020 (arXiv 2004.14340), equations 5 and 6.

    Example:
        >>> import jax.numpy as jnp, woodjax as wj
        >>> fisher = wj.block_fisher({"w": jnp.array([[[1.0, 3.0]]])}, block_size=1, damping=1.0)
        >>> fisher.inverse_diagonal()["w"].round(3).tolist()  # 1 / (1 + g²)
        [[0.5, 0.10000000149011612]]
    """
    layout, blocks = gradient_blocks(gradients, damping, block_size=block_size, select=select, batch_axes=batch_axes)
    if engine == "auto":
        engine = "primal" if blocks.shape[0] >= layout.block_size else "dual"
    if engine not in ENGINES:
        raise ValueError(f"engine is {engine!r}: choose one of {['auto', *ENGINES]}.")
    inverse, used = jax.vmap(ENGINES[engine], in_axes=(1, None))(blocks, damping)
    return BlockFisher(layout, inverse, used)
