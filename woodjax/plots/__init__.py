"""Pictures of pruning. Every `draw_*` function draws on axes that are given."""

from woodjax.plots.comparison import draw_accuracy, draw_leaf_density, summary_figure

__all__ = ["draw_accuracy", "draw_leaf_density", "summary_figure"]
