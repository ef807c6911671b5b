"""What all criteria at initialization share: leaves that are not asked score `+inf`."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from woodjax.loss_rows import batch_size
from woodjax.tree import make_layout
from woodjax.typing import Batch, Params, Scores, Select


def keep_selected(params: Params, scores: Params, select: Select, *, others: float = jnp.inf) -> Scores:
    """Scores of the selected leaves; the others are held fixed.

    Args:
        params: A params-tree of floating leaves.
        scores: A params-tree of numbers.
        select: Which leaves are prunable.
        others: What the others get.

    Returns:
        Scores; an infinite one becomes NaN, because `+inf` means "never prune".

    Raises:
        ValueError: As `make_layout`.
    """
    layout = make_layout(params, select=select)
    kept = [
        jnp.where(jnp.isfinite(x), x, jnp.nan) if spec.selected else jnp.full_like(x, others)
        for spec, x in zip(layout.leaves, jax.tree.leaves(scores), strict=True)
    ]
    return jax.tree.unflatten(layout.treedef, kept)


def inputs_of(batch: Batch) -> Any:
    """The inputs of `(inputs, labels)`, or of a batch that is inputs alone."""
    batch_size(batch)
    return batch[0] if isinstance(batch, tuple) and len(batch) == 2 else batch


def wide(w: Float[Array, "..."]) -> Float[Array, "..."]:
    """At least float32."""
    w = jnp.asarray(w)
    return w.astype(jnp.promote_types(w.dtype, jnp.float32))
