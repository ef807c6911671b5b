"""Distributions: the weights before and after, and how far the survivors moved."""

from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Float, Shaped
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from woodjax.plots.layers import BLUE
from woodjax.plots.stages import ORANGE

BINS = 60
Arrays = Sequence[Shaped[np.ndarray, "..."]]


def draw_weights(axes: Axes, before: Arrays, after: Arrays) -> None:
    """Draw how many weights have which value: all of them before, the survivors after.

    Args:
        axes: Where to.
        before: Weights of any number of leaves, before the pruning.
        after: The survivors alone, after it.

    Raises:
        ValueError: No weights; a value that is not finite.
    """
    edges = _edges([*before, *after])
    axes.stairs(_counts(before, edges), edges, color=ORANGE, label="all, before")
    axes.stairs(_counts(after, edges), edges, color=BLUE, fill=True, alpha=0.6, label="survivors, after")
    _finish(axes, "weight")


def draw_updates(axes: Axes, updates: Arrays) -> None:
    """Draw how far the survivors moved to make up for what went.

    Args:
        axes: Where to.
        updates: Survivors after less before, of any number of leaves.

    Raises:
        ValueError: No updates; a value that is not finite.
    """
    edges = _edges(updates)
    axes.stairs(_counts(updates, edges), edges, color=BLUE, fill=True, alpha=0.6, label="survivors")
    _finish(axes, "move of the weight")


def _edges(arrays: Arrays) -> Float[np.ndarray, " edges"]:
    largest = [float(np.abs(array).max()) for array in arrays if array.size]
    if not largest:
        raise ValueError("There are no weights to draw: pass at least one leaf that is not empty.")
    if not np.isfinite(largest).all():
        raise ValueError("A weight is not finite: no axis can show it. Find it by jnp.isfinite.")
    reach = max(largest) or 1.0
    return np.linspace(-reach, reach, BINS + 1)


def _counts(arrays: Iterable[Shaped[np.ndarray, "..."]], edges: Float[np.ndarray, " edges"]) -> np.ndarray:
    # A leaf at a time: a copy of all weights in one array is not needed.
    return sum((np.histogram(array, edges)[0] for array in arrays), np.zeros(BINS, np.int64))


def _finish(axes: Axes, label: str) -> None:
    axes.set_yscale("log")  # the tails are few and matter
    axes.set_ylim(bottom=0.7)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlabel(label)
    axes.set_ylabel("number")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
