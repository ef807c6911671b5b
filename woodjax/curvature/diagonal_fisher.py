"""Diagonal curvatures: the mean squared per-example gradient, or any diagonal that is given, plus damping.

Memory: `d`. Flops: `2md`.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, Self

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from woodjax.curvature._blocked import Blocked
from woodjax.curvature.damping import (
    ONE_PERCENT,
    Damping,
    Spectrum,
    check_damping,
    resolve_damping,
    split_damping,
)
from woodjax.curvature.sums import Accumulator, check_finalize, layout_of, only_fresh, placed_layout, sum_up
from woodjax.door import checked
from woodjax.placement import on_any_axes
from woodjax.stream import GradientStream
from woodjax.tree import Layout, is_kernel, wide_dtype
from woodjax.typing import Gradients, Params, Select

Negative = Literal["clip", "absolute"]


@partial(jax.tree_util.register_dataclass, data_fields=["blocks", "damping"], meta_fields=["layout"])
@dataclass(frozen=True)
class DiagonalFisher(Blocked):
    """Diagonal `h`, damping included, as one row `[1, d]`. Made by `diagonal_fisher` or `diagonal_curvature`."""

    blocks: Float[Array, "nb b"]
    damping: Float[Array, " nb"]

    @property
    def raised(self) -> Int[Array, ""]:
        """A diagonal is never factored: 0."""
        return jnp.zeros((), jnp.int32)

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

    def shard_specs(self) -> Self:
        """Split along the columns."""
        return replace(self, blocks=self.layout.spread(int(self.layout.whole)), damping=PartitionSpec())

    def block_compensate(
        self,
        weights: Float[Array, "nb b"],
        kept: Bool[Array, "nb b"],
        gradient: Float[Array, "nb b"] | None,
    ) -> Float[Array, "nb b"]:
        """`−ḡ/h` on survivors: a diagonal sees no correlation to make use of."""
        step = jnp.zeros_like(weights) if gradient is None else -gradient / self.blocks
        return jnp.where(kept, step, -weights)

    def submatrices(self, part: int, places: Int[Array, "c q"]) -> Float[Array, "c q q"]:
        """`diag(1/h_Q)`."""
        inverse = 1 / self.blocks.reshape(-1)[places]
        return inverse[..., None] * jnp.eye(places.shape[1], dtype=inverse.dtype)

    def costs(self, part: int, places: Int[Array, "c q"], target: Float[Array, "c q"]) -> Float[Array, " c"]:
        """`½ Σ h t²`."""
        return 0.5 * jnp.sum(self.blocks.reshape(-1)[places] * target**2, axis=1)


@partial(jax.tree_util.register_dataclass, data_fields=["squares", "count"], meta_fields=["layout"])
@dataclass(frozen=True)
class DiagonalSums(Accumulator):
    """Sums of squares `Σ g²`, one for each weight: `[1, d]`."""

    squares: Float[Array, "nb b"]

    @classmethod
    def init(cls, params: Params, *, select: Select = is_kernel, batch_axes: int = 0) -> Self:
        """The state before any data.

        Args:
            params: Arrays or `jax.ShapeDtypeStruct`s; only shapes and dtypes are read.
            select: As in `diagonal_fisher`.
            batch_axes: As in `diagonal_fisher`.

        Returns:
            Zeros.

        Raises:
            ValueError: As `make_layout`.

        Cost:
            Memory `d`.
        """
        return cls.empty(placed_layout(params, select=select, batch_axes=batch_axes), wide_dtype(params))

    @classmethod
    def empty(cls, layout: Layout, dtype: DTypeLike = jnp.float32) -> Self:
        """The state before any data, of a layout that is there already."""
        shape = layout.num_blocks, layout.block_size
        return cls(layout, jnp.zeros((), jnp.int32), layout.zeros(shape, dtype, int(layout.whole)))

    def shard_specs(self) -> Self:
        """Split along the columns."""
        return replace(self, squares=self.layout.spread(int(self.layout.whole)), count=PartitionSpec())

    def add_rows(self, rows: Float[Array, "k nb b"], fresh: Bool[Array, " k"] | None = None) -> Self:
        """`2kd` flops."""
        rows, new = only_fresh(rows, fresh)
        squares = self.squares + jnp.sum(jnp.square(rows), axis=0)
        return replace(self, squares=squares, count=self.count + new)

    def _merged(self, other: Self) -> Self:
        return replace(self, squares=self.squares + other.squares, count=self.count + other.count)

    @on_any_axes
    def finalize(self, damping: Damping = ONE_PERCENT, *, held_out: Self | None = None) -> DiagonalFisher:
        """Divide, and damp.

        Args:
            damping: As in `diagonal_fisher`.
            held_out: For `damping="auto"`, and only then: sums of other examples, on which the damping is
                chosen. They are merged into the result.

        Returns:
            A curvature.

        Raises:
            ValueError: Bad damping; `"auto"` without held-out sums; no row added yet.

        Cost:
            Memory `d`; about 2,000 flops a weight for `"auto"`.
        """
        check_finalize(self, damping, held_out)
        whole = self if held_out is None else self.merge(held_out)
        squares = whole.squares / whole.count

        other = self if held_out is None else held_out

        def spectrum(live: Float[Array, ""]) -> Spectrum:
            known = self.squares / self.count
            return Spectrum(
                known,
                other.squares / other.count,
                ((squares > 0) & jnp.isfinite(squares)).astype(known.dtype),
                0 * live,
                jnp.zeros(()),
            )

        number = resolve_damping(*split_damping(damping), lambda: squares, spectrum)
        return DiagonalFisher(self.layout, squares + number, jnp.full(1, number))


@checked
@on_any_axes
def diagonal_fisher(
    gradients: Gradients | GradientStream,
    *,
    damping: Damping = ONE_PERCENT,
    select: Select = is_kernel,
    batch_axes: int = 0,
) -> DiagonalFisher:
    """Diagonal empirical Fisher.

    Args:
        gradients: Per-example gradients, leaves `[m, *leaf.shape]`, or a stream of them.
        damping: `λ`: a positive number in units of squared gradients, `Relative(alpha)`, or `"auto"`;
            see `woodjax.curvature.damping`.
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
    check_damping(damping)
    layout = layout_of(gradients, block_size=None, select=select, batch_axes=batch_axes)
    return sum_up(gradients, partial(DiagonalSums.empty, layout, wide_dtype(gradients)), damping)


@checked
@on_any_axes
def diagonal_curvature(
    diagonal: Params,
    *,
    damping: Damping = ONE_PERCENT,
    negative: Negative = "clip",
    select: Select = is_kernel,
    batch_axes: int = 0,
) -> DiagonalFisher:
    """Curvature from a diagonal that is known already, such as that of the Hessian.

    Args:
        diagonal: A params-tree: `gauss_newton_diagonal`, or `hutchinson_diagonal(...).diagonal`.
        damping: `λ`, added to every entry: a positive number in the units of the diagonal, or `Relative(alpha)`.
        negative: What a negative entry becomes. `"clip"`: zero, the nearest diagonal without negative curvature;
            right where it is noise, as it must be in a network of ReLUs. `"absolute"`: its absolute value,
            which takes strong negative curvature for strong curvature, as saddle-free Newton methods do.
        select: Which leaves are prunable, asked as `select(path, leaf)`.
        batch_axes: Leading axes that stack layers.

    Returns:
        A curvature. An entry that is not finite scores NaN.

    Raises:
        ValueError: Damping not positive, or `"auto"`; unknown `negative`; as `make_layout`.

    Cost:
        Memory `d`.

    References:
        LeCun, Denker & Solla, Optimal Brain Damage, 1989; `"absolute"`: Dauphin et al. 2014 (arXiv 1406.2572).

    Example:
        >>> import jax.numpy as jnp, woodjax as wj
        >>> curvature = wj.diagonal_curvature({"w": jnp.array([[3.0, -2.0]])}, damping=1.0)
        >>> curvature.diagonal()["w"].tolist()
        [[4.0, 1.0]]
    """
    if negative not in ("clip", "absolute"):
        raise ValueError(f"negative is {negative!r}: choose 'clip' or 'absolute'.")
    rule, number = split_damping(damping)
    layout = placed_layout(diagonal, select=select, batch_axes=batch_axes)
    blocks = layout.to_blocks(diagonal)
    blocks = jnp.abs(blocks) if negative == "absolute" else jnp.maximum(blocks, 0)
    used = jnp.asarray(resolve_damping(rule, number, lambda: blocks), blocks.dtype)
    return DiagonalFisher(layout, blocks + used, jnp.full(1, used))
