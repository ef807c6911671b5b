"""Sparsities: fractions of weights to prune, and the exact counts that they stand for."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from woodjax.door import checked

CEIL_SLACK = 1e-3  # of a weight: a floor of 0.1 keeps 1 of 10 weights although 0.1 is a bit more than a tenth


class ExactSparsity(NamedTuple):
    """A sparsity in a compiled program without the rounding of a float32. Made by `exact_sparsity`."""

    head: Int[Array, ""] | int  # the nearest multiple of 2⁻¹², times 2¹²
    tail: Float[Array, ""] | float  # the rest, times 2¹²

    @property
    def value(self) -> Float[Array, ""]:
        """As one float."""
        return (jnp.asarray(self.head, jnp.float32) + self.tail) / 4096


Fraction: TypeAlias = float | Float[Array, ""] | ExactSparsity
Sparsity: TypeAlias = Fraction | Mapping[str, Fraction]


@checked
def prune_count(sparsity: Fraction, size: Int[Array, "..."]) -> Int[Array, "..."]:
    """`round(sparsity · size)`, halves to even, without the rounding error of a float32 product.

    The head of the sparsity, a multiple of 2⁻¹², is multiplied in integers and only the tail in
    floats: exact below 2³¹ weights but for products within float error of a half.

    Args:
        sparsity: A number in [0, 1]; a traced one is clipped, NaN counts as 0; or an exact one.
        size: Number of weights, any shape.

    Returns:
        Integers of the shape of `size`.

    Raises:
        ValueError: As `check_sparsity`.

    Cost:
        None to speak of.

    Example:
        >>> import woodjax as wj
        >>> int(wj.prune_count(0.9, 32_360))
        29124
    """
    check_sparsity(sparsity)
    if not isinstance(sparsity, ExactSparsity):
        if not isinstance(sparsity, float | int):
            sparsity = jnp.clip(jnp.nan_to_num(jnp.asarray(sparsity, jnp.float32), nan=0.0), 0, 1)
        head = round(sparsity * 4096)
        sparsity = ExactSparsity(head, sparsity * 4096 - head)
    base, rest = _product(sparsity, size)
    odd = base % 2  # halves to even are those of the sum, not of the rest
    return base - odd + jnp.round(rest + odd).astype(jnp.int32)


def exact_sparsity(sparsity: float) -> ExactSparsity:
    """A sparsity that keeps its value in a compiled program: for tables of them.

    Args:
        sparsity: A number in [0, 1].

    Returns:
        Two numbers; `make_masks` and `prune_count` take them for one.

    Raises:
        ValueError: Outside [0, 1].

    Cost:
        None.
    """
    check_sparsity(sparsity)
    head = round(sparsity * 4096)
    return ExactSparsity(head, sparsity * 4096 - head)


def check_sparsity(sparsity: Sparsity) -> None:
    """Raise unless every sparsity that is known lies in [0, 1].

    Args:
        sparsity: A number, a traced scalar, or a mapping of them.

    Raises:
        ValueError: Outside [0, 1], NaN, or not a scalar.

    Cost:
        None.
    """
    if isinstance(sparsity, Mapping):
        for value in sparsity.values():
            check_sparsity(value)
        return
    if isinstance(sparsity, ExactSparsity):
        return  # was checked when it was made
    if jnp.ndim(sparsity) != 0:
        raise ValueError(f"sparsity has shape {jnp.shape(sparsity)}: pass one number, or a mapping by leaf path.")
    if not isinstance(sparsity, jax.core.Tracer) and not 0 <= float(sparsity) <= 1:
        raise ValueError(f"sparsity is {float(sparsity)}: it is the fraction to prune, between 0 and 1.")


class Group(NamedTuple):
    """Leaves that share a sparsity."""

    pattern: str | None  # None: no mapping, or no pattern of it matches
    sparsity: Fraction
    members: list[int]  # numbers of the leaves


def sparsity_groups(sparsity: Sparsity, names: list[str]) -> list[Group]:
    """Sparsities, each with the leaves that it is for: all of them, or those of a pattern.

    Args:
        sparsity: As in `make_masks`.
        names: Paths of the leaves.

    Returns:
        Groups, none of them empty.

    Raises:
        ValueError: A pattern that matches no leaf.
    """
    if not isinstance(sparsity, Mapping):
        return [Group(None, sparsity, list(range(len(names))))]
    for pattern in sparsity:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"sparsity names '{pattern}', which matches no leaf of {names}.")
    members: dict[str | None, list[int]] = {None: []} | {pattern: [] for pattern in sparsity}
    for i, name in enumerate(names):
        matches = [pattern for pattern in sparsity if fnmatchcase(name, pattern)]
        members[matches[-1] if matches else None].append(i)
    return [Group(key, 0.0 if key is None else sparsity[key], group) for key, group in members.items() if group]


def ceil_count(floor: float, size: Int[Array, "..."]) -> Int[Array, "..."]:
    """`ceil(floor · size)`, up to rounding.

    Args:
        floor: A number in [0, 1].
        size: Number of weights, any shape.

    Returns:
        Integers of the shape of `size`, at most `size`.

    Cost:
        None to speak of.
    """
    base, rest = _product(exact_sparsity(floor), size)
    return jnp.minimum(base + jnp.ceil(rest - CEIL_SLACK).astype(jnp.int32), size)


def _product(sparsity: ExactSparsity, size: Int[Array, "..."]) -> tuple[Int[Array, "..."], Float[Array, "..."]]:
    """`sparsity · size` as an integer and what is left."""
    head, tail = jnp.asarray(sparsity.head, jnp.int32), jnp.asarray(sparsity.tail, jnp.float32)
    size = jnp.asarray(size, jnp.int32)
    low = head * (size % 4096)
    base = head * (size // 4096) + low // 4096
    return base, ((low % 4096).astype(jnp.float32) + tail * size.astype(jnp.float32)) / 4096
