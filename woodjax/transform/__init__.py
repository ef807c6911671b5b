"""Gradual pruning inside an Optax chain.

| file | what |
|---|---|
| `prune` | `prune_transform`: holds pruned weights at zero, and prunes when the schedule says so |
| `refresh` | choose new masks and move the survivors, from data |
| `window` | the last gradients that the optimizer saw, as rows of an empirical Fisher |
| `explicit` | both of these under a mesh with explicit axes |
| `state` | what the transform keeps, and how to read and set it in any optimizer state |
"""

from woodjax.transform.prune import prune_transform
from woodjax.transform.refresh import refresh, refresh_masks
from woodjax.transform.state import (
    PruneState,
    RefreshInfo,
    find_state,
    get_info,
    get_masks,
    masks_from_params,
    set_masks,
)
from woodjax.transform.window import GradientWindow, gradient_window

__all__ = [
    "GradientWindow",
    "PruneState",
    "RefreshInfo",
    "find_state",
    "get_info",
    "get_masks",
    "gradient_window",
    "masks_from_params",
    "prune_transform",
    "refresh",
    "refresh_masks",
    "set_masks",
]
