"""Pictures of pruning. Every `draw_*` function draws on axes that are given."""

from woodjax.plots.comparison import draw_accuracy, draw_leaf_density, nearest_level, summary_figure
from woodjax.plots.layers import draw_kept, draw_mask, kept_cells
from woodjax.plots.stages import draw_predicted_loss
from woodjax.plots.weights import draw_updates, draw_weights

__all__ = [
    "draw_accuracy",
    "draw_kept",
    "draw_leaf_density",
    "draw_mask",
    "draw_predicted_loss",
    "draw_updates",
    "draw_weights",
    "kept_cells",
    "nearest_level",
    "summary_figure",
]
