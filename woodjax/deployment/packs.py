"""N:M kernels as the values that are kept and their positions in the groups."""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped, UInt8

from woodjax.deployment._host import to_host
from woodjax.door import checked
from woodjax.patterns import NM
from woodjax.tree import check_bool, check_like, path_name
from woodjax.typing import Masks, Params, PyTree


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PackedNM:
    """An N:M kernel: a pytree of two arrays. Made by `pack_nm`.

    The grouped axis comes last, as in the matrices `[out, in]` of sparse matrix units. Leading axes (layers stacked
    for a scan) can be sliced off both arrays.
    """

    values: Float[Array, "*rows kept"]
    """`n` of every group, in the order of the kernel: `kept` is `n` times the number of groups."""
    positions: UInt8[Array, "*rows bytes"]
    """Where in their group they stand, in rising order: `⌈log₂ m⌉` bits each, lowest bit first; a row begins a byte."""
    pattern: NM = field(metadata={"static": True})
    axis: int = field(default=-2, metadata={"static": True})
    """Of the kernel, from its end: the grouped one."""


@checked
def pack_nm(params: Params, masks: Masks, pattern: NM, *, axis: int = -2) -> PyTree:
    """Kernels under N:M masks as values and positions; other leaves stay dense, zero where they are pruned.

    Of float32 2:4 kernels 53 % of the bytes are left, of bfloat16 ones 56 %. The layout is that of PyTorch's
    semi-structured tensors before their metadata is interleaved for a tensor core. It saves bytes: XLA has no fast path
    for it, and `unpack_nm` makes the dense kernel.

    Args:
        params: A params-tree, or one array.
        masks: A params-tree of bool. A leaf is packed if something of it is pruned and it has the axis.
        pattern: The N:M pattern that the masks follow.
        axis: The grouped axis, from the end: -2 is the input axis of Flax's kernels, as in `NM`.

    Returns:
        A tree like `params` with `PackedNM` in it. A group with fewer than `n` survivors is filled with zeros.

    Raises:
        ValueError: A group with more than `n` survivors; an axis that is no multiple of `m`; an axis that does not
            count from the end; masks that are not bool or not shaped like `params`; a traced leaf.

    Cost:
        A stable sort of the groups on the host: 8 bytes a weight.

    References:
        Mishra et al. 2021 (arXiv 2104.08378), section 3: values and 2-bit indices of the 2:4 format.

    Example:
        >>> import jax.numpy as jnp, woodjax as wj
        >>> kernel = jnp.array([[1.0], [2.0], [3.0], [4.0]])
        >>> packed = wj.pack_nm(kernel, jnp.array([[False], [True], [False], [True]]), wj.NM(2, 4))
        >>> packed.values.tolist(), packed.positions.tolist()  # 1 and 3: bits 10 11
        ([[2.0, 4.0]], [[13]])
        >>> wj.unpack_nm(packed)[:, 0].tolist()
        [0.0, 2.0, 0.0, 4.0]
    """
    if axis >= 0:
        raise ValueError(f"axis is {axis}: count it from the end, -2 for the input axis.")
    check_like(masks, params, "masks")
    check_bool(masks, "masks")

    def convert(path: Any, leaf: Array, mask: Array) -> Any:
        name = path_name(path)
        values, kept = to_host(name, leaf), to_host(name, mask)
        if kept.all() or kept.ndim < -axis:
            return jnp.where(kept, leaf, 0)
        return _pack(name, values, kept, pattern, axis)

    return jax.tree_util.tree_map_with_path(convert, params, masks)


@checked
def unpack_nm(tree: PyTree) -> Params:
    """Dense leaves again, bit by bit, in and out of `jit`.

    Args:
        tree: A tree with `PackedNM` in it, or one of them.

    Returns:
        The tree with a dense array for each of them; other leaves as they are.

    Cost:
        A scatter for each packed leaf, and the bits of its positions as bytes.
    """

    def is_packed(leaf: Any) -> bool:
        return isinstance(leaf, PackedNM)

    return jax.tree.map(lambda leaf: _unpack(leaf) if is_packed(leaf) else leaf, tree, is_leaf=is_packed)


def _pack(
    name: str, values: Float[np.ndarray, "..."], kept: Bool[np.ndarray, "..."], pattern: NM, axis: int
) -> PackedNM:
    rows, mask = np.moveaxis(values, axis, -1), np.moveaxis(kept, axis, -1)
    if rows.shape[-1] % pattern.m:
        raise ValueError(
            f"Leaf '{name}' has {rows.shape[-1]} weights along axis {axis}, no multiple of {pattern.m}, and is pruned: "
            "pack the leaves that follow the pattern alone."
        )
    mask = mask.reshape(*mask.shape[:-1], -1, pattern.m)
    most = mask.sum(-1).max(initial=0)
    if most > pattern.n:
        raise ValueError(
            f"Leaf '{name}' has a group of {pattern.m} with {most} survivors, more than {pattern.n} for {pattern}: "
            "make its mask by pattern_masks with this pattern and axis."
        )
    # Survivors first, then as many others as fill the group.
    positions = np.sort(np.argsort(~mask, axis=-1, kind="stable")[..., : pattern.n], axis=-1)
    masked = np.where(mask, rows.reshape(mask.shape), np.zeros((), rows.dtype))
    chosen = np.take_along_axis(masked, positions, axis=-1)
    bits = positions[..., None] >> np.arange(_width(pattern)) & 1
    packed = np.packbits(bits.astype(np.uint8).reshape(*rows.shape[:-1], -1), axis=-1, bitorder="little")
    return PackedNM(jnp.asarray(chosen.reshape(*rows.shape[:-1], -1)), jnp.asarray(packed), pattern, axis)


def _unpack(packed: PackedNM) -> Shaped[Array, "..."]:
    n, m, width = packed.pattern.n, packed.pattern.m, _width(packed.pattern)
    *rows, kept = packed.values.shape
    bits = jnp.unpackbits(packed.positions, axis=-1, count=kept * width, bitorder="little")
    positions = _numbers(bits.reshape(*rows, kept // n, n, width))
    dense = jnp.zeros((*rows, kept // n, m), packed.values.dtype)
    dense = jnp.put_along_axis(dense, positions, packed.values.reshape(positions.shape), axis=-1, inplace=False)
    return jnp.moveaxis(dense.reshape(*rows, kept // n * m), -1, packed.axis)


def _numbers(bits: UInt8[Array, "*shape width"]) -> Int[Array, "*shape"]:
    return jnp.sum(bits.astype(jnp.int32) << jnp.arange(bits.shape[-1]), axis=-1)


def _width(pattern: NM) -> int:
    return (pattern.m - 1).bit_length()
