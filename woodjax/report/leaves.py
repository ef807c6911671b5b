"""The leaves of the three trees side by side, checked."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from woodjax.tree import check_bool, check_floating, check_like, path_name
from woodjax.typing import Masks, Params


class Leaf(NamedTuple):
    """One leaf, on the host."""

    name: str
    before: Float[np.ndarray, "..."]
    after: Float[np.ndarray, "..."]
    mask: Bool[np.ndarray, "..."]
    itemsize: int  # bytes of a weight as it is stored
    counts: bool  # prunable: two or more axes, or pruned

    @property
    def kept(self) -> int:
        """Number of survivors."""
        return int(np.count_nonzero(self.mask))

    @property
    def density(self) -> float:
        """Fraction of survivors."""
        return self.kept / self.mask.size


def read_leaves(before: Params, after: Params, masks: Masks) -> list[Leaf]:
    """Bring three trees to the host, leaf by leaf.

    Args:
        before: A params-tree of floating leaves.
        after: The same, pruned.
        masks: A params-tree of bool.

    Returns:
        All leaves; those that are prunable have `counts`.

    Raises:
        ValueError: Trees that differ, leaves that are empty, not floating or not finite, masks that are not bool,
            pruned weights that are not zero, nothing prunable.
    """
    named = {"before": before, "after": after}
    for name, tree in named.items():
        check_floating(tree)
        check_like(tree, before, f"{name} (of a network made smaller, pass plan.expand of it)")
    check_like(masks, before, "masks")
    check_bool(masks, "masks")
    leaves = []
    trees = zip(*map(jax.tree.leaves, (before, after, masks)), strict=True)
    for (path, _), (old, new, mask) in zip(jax.tree_util.tree_leaves_with_path(before), trees, strict=True):
        name = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in path_name(path))
        itemsize = jnp.dtype(old.dtype).itemsize
        old, new, mask = _wide(old), _wide(new), np.asarray(mask)
        if not mask.size:
            raise ValueError(f"Leaf '{name}' has shape {mask.shape}, no weights: take it out of the trees.")
        for which, array in (("before", old), ("after", new)):
            if not np.isfinite(array).all():
                bad = int(np.count_nonzero(~np.isfinite(array)))
                raise ValueError(
                    f"{which}: leaf '{name}' has {bad} weights that are NaN or infinite: nothing can be said of such a "
                    "network. Look for the step that made them."
                )
        if (alive := int(np.count_nonzero(new[~mask]))) > 0:
            raise ValueError(
                f"after: leaf '{name}' has {alive} weights that masks prune and that are not zero: pass "
                "woodjax.apply_masks(after, masks)."
            )
        leaves.append(Leaf(name, old, new, mask, itemsize, mask.ndim >= 2 or not bool(mask.all())))
    if not any(leaf.counts for leaf in leaves):
        raise ValueError("Nothing is prunable: the trees need a leaf of two or more axes, or a mask with a False.")
    return leaves


def _wide(leaf: jax.Array | np.ndarray) -> np.ndarray:
    array = np.asarray(leaf)
    return array if array.dtype in (np.float32, np.float64) else array.astype(np.float32)
