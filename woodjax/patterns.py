"""Patterns: which weights go together.

A pattern is a small hashable object. It cuts a leaf into groups of one size, each weight in exactly one group, from
its shape alone. Shapes are Flax's: the output axis last, the input axis before it, `[in, out]` or `[kh, kw, in, out]`.
A kernel whose output axis is not the last one (an embedding, the attention projections of Flax's `DenseGeneral`) has
other units along these axes: leave it out by `select=`, or accept that its groups mean something else.

| pattern | a group is | pruned are |
|---|---|---|
| `NM(2, 4)` | 4 consecutive weights along the input axis | all but 2 of every group |
| `Block(4)` | 4 consecutive weights along an axis | whole groups |
| `Rows()` | all weights from one input unit | whole groups |
| `Filters()` | all weights into one output unit | whole groups |
"""

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from woodjax.door import checked


@runtime_checkable
class Pattern(Protocol):
    """What cuts a leaf into groups. Hashable; an object of your own that answers this works everywhere."""

    def indices(self, shape: tuple[int, ...]) -> Int[np.ndarray, "groups size"]:
        """Groups of a leaf, as indices into the leaf flattened in row-major order; each weight exactly once.

        Args:
            shape: Shape of the leaf, without batch axes.

        Returns:
            `[groups, size]`.

        Raises:
            ValueError: The leaf does not divide into groups.
        """
        ...


@checked
@dataclass(frozen=True)
class NM:
    """N:M sparsity: of every `m` consecutive weights along the input axis `n` are kept. `NM(2, 4)` is 2:4.

    The input axis is the one that sparse matrix units contract: every output unit sees `m` neighbouring inputs of
    the same kernel position. Its length must be a multiple of `m`.

    Args:
        n: Weights kept in a group, at least 1.
        m: Weights in a group, more than `n`.

    Raises:
        ValueError: Not `1 <= n < m`.

    References:
        Mishra et al. 2021 (arXiv 2104.08378): 2:4 along the input channels.

    Example:
        >>> import woodjax as wj
        >>> wj.NM(2, 4).indices((4, 2)).tolist()
        [[0, 2, 4, 6], [1, 3, 5, 7]]
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        """Check the numbers."""
        if not 1 <= self.n < self.m:
            raise ValueError(f"NM({self.n}, {self.m}): keep at least 1 and fewer than all of a group, 1 <= n < m.")

    def indices(self, shape: tuple[int, ...]) -> Int[np.ndarray, "groups size"]:
        """Groups along the input axis: see `Pattern`."""
        return _runs(shape, self.m, -2, f"{self.n}:{self.m}")


@checked
@dataclass(frozen=True)
class Block:
    """Runs of `size` consecutive weights along an axis, kept or pruned as a whole.

    The default axis is the input axis: the 1×4 blocks of oBERT are four neighbours in a row of PyTorch's `[out, in]`,
    the four products that one VNNI dot product of int8 adds up. Kernels that broadcast one input to several
    output channels (1×N pruning, arXiv 2105.14713) want `axis=-1`.

    Args:
        size: Weights in a block, at least 1.
        axis: Along which they lie: -2 for inputs, -1 for outputs.

    Raises:
        ValueError: `size < 1`; another axis.

    References:
        Kurtić et al., oBERT, 2022 (arXiv 2203.07259), section 3.

    Example:
        >>> import woodjax as wj
        >>> wj.Block(2, axis=-1).indices((2, 4)).tolist()
        [[0, 1], [2, 3], [4, 5], [6, 7]]
    """

    size: int = 4
    axis: int = -2

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.size < 1:
            raise ValueError(f"Block(size={self.size}): pass at least 1 weight.")
        if self.axis not in (-2, -1):
            raise ValueError(f"Block(axis={self.axis}): pass -2 for the input axis or -1 for the output axis.")

    def indices(self, shape: tuple[int, ...]) -> Int[np.ndarray, "groups size"]:
        """Groups along the axis: see `Pattern`."""
        return _runs(shape, self.size, self.axis, f"blocks of {self.size}")


@dataclass(frozen=True)
class Rows:
    """All weights from one input unit: a row of a dense kernel, an input channel of a convolution.

    Example:
        >>> import woodjax as wj
        >>> wj.Rows().indices((2, 3)).tolist()
        [[0, 1, 2], [3, 4, 5]]
    """

    def indices(self, shape: tuple[int, ...]) -> Int[np.ndarray, "groups size"]:
        """One group for each input unit: see `Pattern`."""
        return _units(shape, -2, "rows")


@dataclass(frozen=True)
class Filters:
    """All weights into one output unit: a column of a dense kernel, a filter of a convolution.

    Example:
        >>> import woodjax as wj
        >>> wj.Filters().indices((2, 3)).tolist()
        [[0, 3], [1, 4], [2, 5]]
    """

    def indices(self, shape: tuple[int, ...]) -> Int[np.ndarray, "groups size"]:
        """One group for each output unit: see `Pattern`."""
        return _units(shape, -1, "filters")


def _flat(shape: tuple[int, ...], axis: int, name: str) -> Int[np.ndarray, "..."]:
    if len(shape) < -axis:
        raise ValueError(f"shape {shape} has no axis {axis} for {name}: leave the leaf out by select=.")
    return np.arange(math.prod(shape), dtype=np.int32).reshape(shape)


def _runs(shape: tuple[int, ...], size: int, axis: int, name: str) -> Int[np.ndarray, "groups size"]:
    flat = _flat(shape, axis, name)
    if shape[axis] % size:
        raise ValueError(
            f"axis {axis} of shape {shape} has {shape[axis]} weights, no multiple of {size} for {name}: leave the leaf "
            "out by select= where the curvature is made."
        )
    if axis == -1:
        return flat.reshape(-1, size)
    runs = flat.reshape(-1, size, shape[-1])  # neighbours along the input axis, for each output
    return np.moveaxis(runs, 1, 2).reshape(-1, size)


def _units(shape: tuple[int, ...], axis: int, name: str) -> Int[np.ndarray, "groups size"]:
    flat = _flat(shape, axis, name)
    return np.moveaxis(flat, axis, 0).reshape(shape[axis], -1)
