"""Trees of parameters: names, checks, and how they become blocks and come back."""

from woodjax.tree.checks import apply_masks, check_bool, check_floating, check_like, wide_dtype
from woodjax.tree.layout import Layout, LeafSpec, make_layout
from woodjax.tree.names import is_kernel, path_name

__all__ = [
    "Layout",
    "LeafSpec",
    "apply_masks",
    "check_bool",
    "check_floating",
    "check_like",
    "is_kernel",
    "make_layout",
    "path_name",
    "wide_dtype",
]
