"""How much damping: a number, a fraction of the mean diagonal, or what held-out gradients ask for.

| `damping=` | `λ` |
|---|---|
| a positive number | as given, in units of squared gradients: the papers' form |
| `Relative(alpha)` | `α · mean F_qq`: does not change when the loss or the gradients are scaled |
| `"auto"` | the most likely one for held-out gradients under `g ~ N(0, F + λI)` |

The mean is taken over coordinates that some gradient touches: pruned weights, padding and dead inputs
do not dilute it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from woodjax import linalg
from woodjax.curvature._blocked import INVERSION_BYTES, after, map_blocks, map_chunks
from woodjax.door import checked
from woodjax.tree import Layout

DECADES, STEPS = 10, 401  # the search for "auto": from 1e-8 to 1e2 of the mean diagonal, 1/40 of a decade apart


@checked
@dataclass(frozen=True)
class Relative:
    """Damping as a fraction of the mean diagonal of the Fisher: `λ = α · mean F_qq`.

    Example:
        >>> import jax.numpy as jnp, woodjax as wj
        >>> gradients = {"w": jnp.array([[[1.0, 3.0]]])}  # F_qq is 1 and 9, 5 on average
        >>> wj.low_rank_fisher(gradients, damping=wj.Relative(0.1)).damping.tolist()
        [0.5]
    """

    alpha: float

    def __post_init__(self) -> None:
        """Check the fraction."""
        if not 0 < self.alpha < np.inf:
            raise ValueError(f"alpha is {self.alpha}: a relative damping must be positive; 1e-3 to 1e-1 is usual.")
        object.__setattr__(self, "alpha", float(self.alpha))  # hashable, whatever kind of number it was


Damping = Float[Array, ""] | float | Relative | Literal["auto"]
Rule = Relative | Literal["auto"] | None
ONE_PERCENT = Relative(1e-2)  # the default


class Spectrum(NamedTuple):
    """Eigenvalues of the Fisher of some examples, and what others have in the same directions."""

    eigenvalues: Float[Array, "..."]
    held_out: Float[Array, "..."]  # mean squared held-out gradient along each eigenvector
    weight: Float[Array, "..."]  # 1 where the direction counts, else 0
    null_size: Float[Array, ""]  # directions without an eigenvalue
    null_held_out: Float[Array, ""]  # mean squared held-out gradient in all of them


def check_damping(damping: Damping) -> None:
    """Raise unless the damping is positive, relative, `"auto"`, or not known before the program runs.

    Args:
        damping: `λ`.

    Raises:
        ValueError: `damping` is zero, negative, not finite or not a scalar.
    """
    if isinstance(damping, Relative) or (isinstance(damping, str) and damping == "auto"):
        return
    if isinstance(damping, str):
        raise ValueError(f"damping is {damping!r}: pass a positive number, woodjax.Relative(alpha) or 'auto'.")
    if jnp.ndim(damping) != 0:
        raise ValueError(f"damping has shape {jnp.shape(damping)}: pass one positive number.")
    if not isinstance(damping, jax.core.Tracer) and not 0 < np.float32(damping) < np.inf:
        raise ValueError(
            f"damping is {float(damping)}: it must be positive and finite, the Fisher of fewer examples than "
            "weights is singular without it. woodjax.Relative(1e-2) is a fraction of the mean diagonal."
        )


def mean_diagonal(squares: Float[Array, "..."], axes: tuple[str, ...] = ()) -> Float[Array, ""]:
    """Mean of the diagonal of the Fisher over the coordinates that some gradient touches.

    Args:
        squares: `F_qq` for every coordinate.
        axes: As in `linalg.gram`.

    Returns:
        A positive scalar; 1 where all gradients are zero.

    Cost:
        `2n` flops.
    """
    live = (squares > 0) & jnp.isfinite(squares)  # a broken leaf must not take the damping of the others along
    count = _count(live, axes)
    total = linalg.total_over(jnp.sum(jnp.where(live, squares, 0)), axes)
    return jnp.where(count > 0, total / jnp.maximum(count, 1), 1.0)


def _count(live: Bool[Array, "..."], axes: tuple[str, ...]) -> Float[Array, ""]:
    # In floats, but for the last axis: there may be more than 2³¹.
    return linalg.total_over(jnp.sum(jnp.sum(live, axis=-1, dtype=jnp.int32), dtype=jnp.float32), axes)


@jax.jit
def most_likely_damping(spectrum: Spectrum, scale: Float[Array, ""]) -> Float[Array, ""]:
    """Damping under which held-out gradients are most likely: `g ~ N(0, F + λI)`.

    `−2 log p = Σ_k log(s_k + λ) + q_k/(s_k + λ)`, with `s` the eigenvalues and `q` the mean squared
    held-out gradient along their eigenvectors: one factorisation serves every `λ`.

    Args:
        spectrum: Of all blocks together.
        scale: The mean diagonal; the search runs from 1e-8 to 1e2 of it.

    Returns:
        `λ`, to within 3 %.

    Cost:
        About 2,000 flops for each eigenvalue.

    References:
        The evidence of a Gaussian model with a known scatter matrix: Mardia, Kent & Bibby,
        Multivariate Analysis, 1979, section 4.1.
    """

    def surprise(damping: Array) -> Array:
        total = spectrum.eigenvalues + damping
        terms = jnp.where(spectrum.weight > 0, jnp.log(total) + spectrum.held_out / total, 0)
        return jnp.sum(terms) + spectrum.null_size * jnp.log(damping) + spectrum.null_held_out / damping

    candidates = scale * jnp.logspace(2 - DECADES, 2, STEPS, dtype=scale.dtype)
    return candidates[jnp.argmin(jax.lax.map(surprise, candidates))]


def spectrum_of_sums(
    fisher: Float[Array, "nb b b"], held_out: Float[Array, "nb b b"], live: Float[Array, ""] | int
) -> Spectrum:
    """Spectrum of dense blocks.

    Args:
        fisher: `(1/m) Σ g gᵀ` of some examples.
        held_out: The same of others.
        live: Coordinates that some gradient touches; padding and dead ones have the eigenvalue 0.

    Returns:
        A spectrum.

    Cost:
        About `10b³` flops a block.
    """
    sound = jnp.isfinite(fisher).all(axis=(1, 2)) & jnp.isfinite(held_out).all(axis=(1, 2))
    fisher, held_out = (jnp.where(sound[:, None, None], x, 0) for x in (fisher, held_out))  # a broken block has no say
    values, vectors = map_chunks(jnp.linalg.eigh, fisher, INVERSION_BYTES * fisher[0].size)
    along = linalg.contract("nij,nij->nj", vectors, linalg.contract("nij,njk->nik", held_out, vectors))
    dead = live - values.size  # not positive: takes the dead directions out again
    return Spectrum(
        jnp.maximum(values, 0), jnp.maximum(along, 0), jnp.ones_like(values), jnp.asarray(dead), jnp.zeros(())
    )


def spectrum_of_grams(grams: Float[Array, "nb m m"], live: Float[Array, ""]) -> Spectrum:
    """Spectrum from the Gram matrix of all examples: each half is held out from the other in turn.

    Args:
        grams: `GGᵀ`, block by block; even rows are one half, odd rows the other.
        live: Coordinates that some gradient touches.

    Returns:
        A spectrum of both halves together.

    Cost:
        About `3m³` flops a block.
    """
    one = _half_spectrum(grams, 0, live)
    other = _half_spectrum(after(grams, one.eigenvalues), 1, live)
    return Spectrum(
        jnp.concatenate([one.eigenvalues, other.eigenvalues], axis=-1),
        jnp.concatenate([one.held_out, other.held_out], axis=-1),
        jnp.concatenate([one.weight, other.weight], axis=-1),
        one.null_size + other.null_size,
        one.null_held_out + other.null_held_out,
    )


def split_damping(damping: Damping) -> tuple[Rule, Float[Array, ""] | float]:
    """What of a damping is known when a program is compiled, and the number that is not.

    Args:
        damping: As asked.

    Returns:
        The rule, or None for a number; and the number, or 0 for a rule.

    Raises:
        ValueError: As `check_damping`.
    """
    check_damping(damping)
    if isinstance(damping, Relative | str):
        return damping, 0.0
    return None, damping


def resolve_damping(
    rule: Rule,
    number: Float[Array, ""] | float,
    squares: Callable[[], Float[Array, "..."]],
    spectrum: Callable[[Float[Array, ""]], Spectrum] | None = None,
    axes: tuple[str, ...] = (),
) -> Float[Array, ""] | float:
    """The number that a damping stands for.

    Args:
        rule: From `split_damping`.
        number: From `split_damping`.
        squares: Makes `F_qq` of every coordinate; asked where it is needed.
        spectrum: Makes the spectrum, given the number of coordinates that some gradient touches; None where
            there is none.
        axes: Inside `shard_map`: mesh axes over which the coordinates are split.

    Returns:
        `λ`.

    Raises:
        ValueError: `"auto"` without a spectrum.

    Cost:
        None for a number.
    """
    if isinstance(rule, Relative):
        return rule.alpha * mean_diagonal(squares(), axes)
    if isinstance(rule, str):
        if spectrum is None:
            raise ValueError(
                'damping="auto" is not offered for this curvature, nor for blocks on several devices: pass '
                "woodjax.Relative(1e-2)."
            )
        diagonal = squares()
        sound = jnp.isfinite(diagonal).all(axis=-1, keepdims=True)
        live = _count((diagonal > 0) & sound, axes)
        return most_likely_damping(spectrum(live), mean_diagonal(diagonal, axes))
    return number


def count_raised(
    used: Float[Array, "..."], asked: Float[Array, "..."] | float, axes: tuple[str, ...] = ()
) -> Int[Array, ""]:
    """Number of blocks whose damping was raised, which goes by tens.

    Args:
        used: `λ` of each block, as used.
        asked: As asked for, for all or for each.
        axes: Inside `shard_map`: mesh axes over which the blocks are split.

    Returns:
        An integer scalar.
    """
    return linalg.total_over(jnp.sum(used > 1.5 * jnp.asarray(asked), dtype=jnp.int32), axes)


def damping_of_rows(
    rows: Float[Array, "m nb b"], rule: Rule, number: Float[Array, ""] | float, view: Layout
) -> Float[Array, ""] | float:
    """The number that a damping stands for, where the gradients themselves are at hand.

    Args:
        rows: Gradients in blocks.
        rule: From `split_damping`.
        number: From `split_damping`.
        view: Layout of the rows.

    Returns:
        `λ`.

    Raises:
        ValueError: `"auto"` with a single row, or for blocks on several devices.

    Cost:
        `2md` flops for a relative damping; about `m²d + nb·3m³` for `"auto"`.
    """
    m = rows.shape[0]
    if isinstance(rule, str):
        check_halves(m)
    grams = partial(linalg.gram, axes=view.column_axes)
    return resolve_damping(
        rule,
        number,
        lambda: jnp.sum(jnp.square(rows), axis=0) / m,
        None if view.mesh_axes and not view.whole else lambda live: spectrum_of_grams(map_blocks(grams, rows), live),
        view.mesh_axes,
    )


def check_halves(m: int) -> None:
    """Raise unless there are rows to hold out.

    Args:
        m: Rows.

    Raises:
        ValueError: There is only one.
    """
    if m < 2:
        raise ValueError('damping="auto" holds out half of the rows and needs at least two: pass a number.')


def _half_spectrum(grams: Float[Array, "nb m m"], even: int, live: Float[Array, ""]) -> Spectrum:
    grams = jnp.where(jnp.isfinite(grams).all(axis=(1, 2), keepdims=True), grams, 0)  # a broken block has no say
    known, others = grams[:, even::2], 1 - even
    size = known.shape[1]
    values, vectors = map_chunks(jnp.linalg.eigh, known[:, :, even::2], INVERSION_BYTES * size**2)
    # An eigenvalue below the noise of the Gram matrix is no direction: it is counted with the null space.
    sound = values > size * jnp.finfo(values.dtype).eps * values[:, -1:]
    squares = linalg.contract("nji,njk->nik", vectors, known[:, :, others::2]) ** 2
    along = jnp.where(sound, jnp.mean(squares, axis=-1) / jnp.where(sound, values, 1), 0)
    total = jnp.mean(jnp.diagonal(grams, axis1=1, axis2=2)[:, others::2], axis=-1)
    weight = sound.astype(values.dtype)
    rest = jnp.maximum(jnp.sum(total) - jnp.sum(along), 0)
    return Spectrum(jnp.where(sound, values, 0) / size, along, weight, live - jnp.sum(weight), rest)
