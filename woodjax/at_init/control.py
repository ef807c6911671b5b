"""Is it the ranking or the layer budget? The control that tells."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from woodjax.door import checked
from woodjax.placement import on_any_axes
from woodjax.tree import check_bool, is_kernel, make_layout
from woodjax.typing import Masks, Select


@checked
@on_any_axes
def shuffle_masks(masks: Masks, key: Key[Array, ""], *, select: Select = is_kernel) -> Masks:
    """Masks that keep as many weights of every leaf, but random ones.

    What of a criterion's accuracy is left with them is due to how it shares out the budget among layers, not to which
    weights it finds.

    Args:
        masks: A params-tree of bool.
        key: PRNG key.
        select: Which leaves are prunable; the others stay as they are.

    Returns:
        A params-tree of bool.

    Raises:
        ValueError: A mask that is not bool; no leaf selected, or an empty one.

    Cost:
        A sort of every leaf.

    References:
        Frankle et al., Pruning neural networks at initialization: why are we missing the mark? 2021
        (arXiv 2009.08576), section 5.

    Example:
        >>> import jax, jax.numpy as jnp, woodjax as wj
        >>> masks = wj.shuffle_masks({"w": jnp.array([[True, False, False, True]])}, jax.random.key(0))
        >>> int(masks["w"].sum())
        2
    """
    check_bool(masks, "masks")
    shapes = jax.tree.map(lambda mask: jax.ShapeDtypeStruct(jnp.shape(mask), jnp.float32), masks)
    layout = make_layout(shapes, select=select)
    shuffled = [
        jax.random.permutation(jax.random.fold_in(key, i), jnp.ravel(mask)).reshape(spec.shape)
        if spec.selected
        else mask
        for i, (spec, mask) in enumerate(zip(layout.leaves, jax.tree.leaves(masks), strict=True))
    ]
    return jax.tree.unflatten(layout.treedef, shuffled)
