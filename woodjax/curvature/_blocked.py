"""What all Fishers share: the way from a tree to blocks `[nb, b]` and back.

A member computes on blocks; this file gives it the protocol's face, checks what comes in and
keeps padding and unselected leaves out of every answer.
"""

import abc
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from woodjax.curvature.protocol import check_damping
from woodjax.tree import Layout, make_layout
from woodjax.typing import Gradients, Masks, Params, Select, Updates


@dataclass(frozen=True)
class Blocked(abc.ABC):
    """A curvature that is block-diagonal in the blocks of a layout."""

    layout: Layout

    @abc.abstractmethod
    def block_inverse_diagonal(self) -> Float[Array, "nb b"]:
        """Diagonal of `H⁻¹`, block by block."""

    @abc.abstractmethod
    def block_solve(self, blocks: Float[Array, "nb b"]) -> Float[Array, "nb b"]:
        """`H⁻¹v`, block by block."""

    @abc.abstractmethod
    def block_matvec(self, blocks: Float[Array, "nb b"]) -> Float[Array, "nb b"]:
        """`Hv`, block by block."""

    @abc.abstractmethod
    def block_compensate(
        self,
        weights: Float[Array, "nb b"],
        kept: Bool[Array, "nb b"],
        gradient: Float[Array, "nb b"] | None,
    ) -> Float[Array, "nb b"]:
        """Constrained minimiser, block by block."""

    def inverse_diagonal(self) -> Params:
        """`[H⁻¹]_qq` for every coordinate; 0 on leaves that are not prunable."""
        diagonal = self.block_inverse_diagonal()
        # 0 says "held fixed": a prunable coordinate whose diagonal was lost must not be taken for that.
        return self.layout.to_tree(jnp.where(diagonal > 0, diagonal, jnp.nan), fill=0)

    def solve(self, tree: Params) -> Params:
        """`H⁻¹v`; 0 on leaves that are not prunable."""
        return self.layout.to_tree(self.block_solve(self.layout.to_blocks(tree)), fill=0)

    def matvec(self, tree: Params) -> Params:
        """`Hv`; 0 on leaves that are not prunable."""
        return self.layout.to_tree(self.block_matvec(self.layout.to_blocks(tree)), fill=0)

    def compensate(self, params: Params, masks: Masks, gradient: Params | None = None) -> Updates:
        """Minimiser of `ḡᵀδ + ½δᵀHδ` with `δ_Q = −w_Q`; 0 on leaves that are not prunable."""
        pruned = self.layout.to_blocks(jax.tree.map(jnp.logical_not, masks))  # padding is not pruned
        first_order = None if gradient is None else self.layout.to_blocks(gradient)
        blocks = self.block_compensate(self.layout.to_blocks(params), ~pruned, first_order)
        return self.layout.to_tree(blocks, fill=0)


def gradient_blocks(
    gradients: Gradients,
    damping: Float[Array, ""] | float,
    *,
    block_size: int | None,
    select: Select,
    batch_axes: int,
) -> tuple[Layout, Float[Array, "m nb b"]]:
    """Check per-example gradients and a damping, and cut them into blocks.

    Args:
        gradients: Leaves `[m, *leaf.shape]`.
        damping: `λ`.
        block_size: As in `make_layout`.
        select: As in `make_layout`.
        batch_axes: As in `make_layout`.

    Returns:
        The layout, and the gradients in it.

    Raises:
        ValueError: A leaf without an example axis, leaves that disagree on the number of
            examples, no example at all, or a damping that is known and not positive.
    """
    check_damping(damping)
    leaves = jax.tree.leaves(gradients)
    counts = {jnp.shape(leaf)[:1] for leaf in leaves}
    if len(counts) != 1 or () in counts or (0,) in counts:
        raise ValueError(
            f"Gradient leaves have leading sizes {sorted(counts)}: every leaf must be [m, *leaf.shape] with the "
            "same m >= 1, as woodjax.per_example_gradients returns them."
        )
    shapes = jax.tree.map(lambda g: jax.ShapeDtypeStruct(jnp.shape(g)[1:], jnp.result_type(g)), gradients)
    layout = make_layout(shapes, block_size=block_size, select=select, batch_axes=batch_axes)
    return layout, layout.to_blocks(gradients)
