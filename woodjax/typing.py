"""Names for the kinds of value that travel between the floors.

Symbols used throughout the library:

| symbol | shape | meaning |
|---|---|---|
| `w` | `[d]` | parameters |
| `m`, `d`, `b`, `nb` | | examples, parameters, block size, number of blocks |
| `g_i`, `G` | `[d]`, `[m, d]` | gradient of example `i`, and the stack of all of them |
| `F`, `H` | `[d, d]` | damped Fisher, Hessian: never formed whole |
| `damping` | `[]` | the `λ` of `F = λI + GᵀG/m` |
| `q`, `Q`, `K` | | a pruned coordinate, the pruned set, the kept set |
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
from jaxtyping import Array, Shaped

if TYPE_CHECKING:
    PyTree: TypeAlias = Any  # jaxtyping's own is of unknown type to a type checker, and so would be all that takes one
else:
    from jaxtyping import PyTree

__all__ = [
    "ApplyFn",
    "Batch",
    "Example",
    "Gradients",
    "Groups",
    "LossFn",
    "Masks",
    "Params",
    "Scores",
    "Select",
    "Updates",
]

Params: TypeAlias = PyTree
"""Any pytree whose leaves are floating arrays."""

Gradients: TypeAlias = PyTree
"""A params-tree whose leaves have one more axis in front: `[m, *leaf.shape]`."""

Scores: TypeAlias = PyTree
"""A params-tree of floats: low = prune first, `+inf` = never prune, do not count."""

Masks: TypeAlias = PyTree
"""A params-tree of full-shape bool: True = survives."""

Groups: TypeAlias = PyTree
"""A params-tree of indices `[groups, size]` into each leaf, flattened; `[0, 0]` on leaves without groups."""

Updates: TypeAlias = PyTree
"""A params-tree for `optax.apply_updates`."""

Example: TypeAlias = PyTree
"""One example: a pytree without a batch axis."""

Batch: TypeAlias = PyTree
"""Examples stacked along the first axis of every leaf."""

LossFn: TypeAlias = Callable[[Params, Example], Shaped[Array, ""]]
"""`loss_fn(params, example) -> scalar` for ONE example, deterministic, eval mode."""

ApplyFn: TypeAlias = Callable[[Params, Any], Shaped[Array, "..."]]
"""`apply_fn(params, inputs) -> logits`, inputs and logits both with a batch axis."""

Select: TypeAlias = Callable[[str, jax.ShapeDtypeStruct], bool]
"""`select(path, leaf) -> bool`: is this leaf prunable? `leaf` is without batch axes."""
