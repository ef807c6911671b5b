"""Pruned kernels as lists of coordinates and values: what `jax.experimental.sparse` computes with."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from woodjax.deployment._host import to_host
from woodjax.door import checked
from woodjax.tree import check_bool, check_like, path_name
from woodjax.typing import Masks, Params, PyTree


@checked
def to_bcoo(params: Params, masks: Masks) -> PyTree:
    """Pruned matrices as `BCOO`; other leaves stay dense, zero where they are pruned.

    A survivor takes its value and two indices, each of the smallest unsigned dtype that holds the sides of the leaf
    (JAX writes the side itself where it pads): for float32 4 + 2 bytes up to sides of 255, 4 + 4 up to 65,535, and
    4 + 8 above. So the leaf is smaller than the dense one below a density of 2/3, 1/2 and 1/3. It is not a promise of
    speed: XLA has no fast path for it on CPU, measure it by `measure`.

    Args:
        params: A params-tree.
        masks: A params-tree of bool. A leaf of two axes becomes sparse if something of it is pruned.

    Returns:
        A tree like `params` with `jax.experimental.sparse.BCOO` in it, indices sorted and unique. Every survivor is
        stored, zeros too. `x @ leaf` computes with it, as does code under `jax.experimental.sparse.sparsify`.

    Raises:
        ValueError: Masks that are not bool or not shaped like `params`; a traced leaf: the number of survivors has to
            be known.

    Cost:
        A copy of the leaves on the host.

    Example:
        >>> import jax.numpy as jnp, woodjax as wj
        >>> params, masks = {"w": jnp.array([[1.0, 2.0]])}, {"w": jnp.array([[False, True]])}
        >>> sparse = wj.to_bcoo(params, masks)["w"]
        >>> sparse.nse, str(sparse.indices.dtype), (jnp.ones((1, 1)) @ sparse).tolist()
        (1, 'uint8', [[0.0, 2.0]])
    """
    from jax.experimental.sparse import BCOO

    check_like(masks, params, "masks")
    check_bool(masks, "masks")

    def convert(path: Any, leaf: Array, mask: Array) -> Any:
        name = path_name(path)
        values, kept = to_host(name, leaf), to_host(name, mask)
        if values.ndim != 2 or kept.all():
            return jnp.where(kept, leaf, 0)
        sides = np.min_scalar_type(max(values.shape))
        dtype = sides if sides.itemsize <= 2 else np.dtype(np.int32)
        where = np.argwhere(kept).astype(dtype)
        pair = jnp.asarray(values[kept]), jnp.asarray(where)
        return BCOO(pair, shape=values.shape, indices_sorted=True, unique_indices=True)

    return jax.tree_util.tree_map_with_path(convert, params, masks)


@checked
def from_bcoo(tree: PyTree) -> Params:
    """Dense leaves again, in and out of `jit`.

    Args:
        tree: A tree with `BCOO` leaves.

    Returns:
        The tree with a dense array for each of them; other leaves as they are.

    Cost:
        A scatter for each sparse leaf.

    Example:
        >>> import jax.numpy as jnp, woodjax as wj
        >>> params, masks = {"w": jnp.array([[1.0, 2.0]])}, {"w": jnp.array([[False, True]])}
        >>> wj.from_bcoo(wj.to_bcoo(params, masks))["w"].tolist()
        [[0.0, 2.0]]
    """
    from jax.experimental.sparse import BCOO

    def is_sparse(leaf: Any) -> bool:
        return isinstance(leaf, BCOO)

    return jax.tree.map(lambda leaf: leaf.todense() if is_sparse(leaf) else leaf, tree, is_leaf=is_sparse)
