"""Where arrays lie on a mesh of devices, and how the columns of a curvature are shared out over them.

Parameters stay where they are. Each device cuts the shards of the leaves that it holds into blocks; a shard that
several devices hold alike is shared out among them. So every device owns as many columns as any other, what is asked of
single columns or blocks is answered where they are, and only sums travel.

| file | what |
|---|---|
| `mesh` | on which mesh axes the leaves and the examples lie |
| `layout` | which columns a device owns, and how gradients come to it |
| `explicit` | meshes with explicit axes |
| `rows` | micro-batches of examples that are split over devices |
"""

from woodjax.placement.explicit import on_any_axes
from woodjax.placement.layout import ShardedLayout, sharded_layout
from woodjax.placement.mesh import Placement, placement_of
from woodjax.placement.rows import (
    Microbatches,
    all_true,
    as_gradients,
    as_params,
    place_rows,
    placed_like,
    take_examples,
)

__all__ = [
    "Microbatches",
    "Placement",
    "ShardedLayout",
    "all_true",
    "as_gradients",
    "as_params",
    "on_any_axes",
    "place_rows",
    "placed_like",
    "placement_of",
    "sharded_layout",
    "take_examples",
]
