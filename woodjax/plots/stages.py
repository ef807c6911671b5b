"""What the quadratic model said a pruning would cost, and what it cost."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from woodjax.plots.layers import BLUE

ORANGE = "#d55e00"


def draw_predicted_loss(
    axes: Axes,
    predicted: Float[np.ndarray, " stages"] | Sequence[float],
    measured: Float[np.ndarray, " stages"] | Sequence[float],
    *,
    sparsity: Float[np.ndarray, " stages"] | Sequence[float],
) -> None:
    """Draw predicted and measured change of the loss, stage by stage.

    Args:
        axes: Where to.
        predicted: Change that the quadratic model predicts for each stage; NaN where there is none.
        measured: Change of the loss over the examples of the stage; NaN where it was not measured.
        sparsity: Sparsity after each stage, to name the stages by.

    Raises:
        ValueError: Lengths that differ, or no stages.
    """
    columns = [np.asarray(column, np.float64).reshape(-1) for column in (predicted, measured, sparsity)]
    if len({len(column) for column in columns}) != 1 or not len(columns[0]):
        sizes = [len(column) for column in columns]
        raise ValueError(f"predicted, measured and sparsity have {sizes} entries: pass one of each for every stage.")
    stages = np.arange(1, len(columns[0]) + 1)
    axes.axhline(0, color="0.6", linewidth=0.8)
    for values, style, color, label in ((columns[0], "o--", ORANGE, "predicted"), (columns[1], "s-", BLUE, "measured")):
        if np.isfinite(values).any():
            axes.plot(stages, values, style, color=color, markersize=4, linewidth=1.2, label=label)
    shown = np.unique(np.linspace(0, len(stages) - 1, min(len(stages), 6)).round().astype(int))
    axes.set_xticks(stages[shown], [f"{100 * columns[2][i]:.3g}" for i in shown])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    axes.set_xlabel("sparsity after the stage, %")
    axes.set_ylabel("change of the loss")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
