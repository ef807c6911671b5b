"""Where the survivors are: how much every leaf keeps, and where in a kernel."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.image import AxesImage

BLUE = "#0072b2"  # Okabe & Ito; readable on white and on black
# Transparent where nothing survives: a picture stands on any background.
SURVIVORS = LinearSegmentedColormap.from_list("survivors", [(0.0, 0.45, 0.7, 0.0), (0.0, 0.45, 0.7, 1.0)])
MOST_CELLS = 64


def draw_kept(axes: Axes, density: Mapping[str, float]) -> None:
    """Draw the kept fraction of each leaf, a bar each, the first leaf on top.

    Args:
        axes: Where to.
        density: Fractions in [0, 1] by name of the leaf.

    Raises:
        ValueError: No leaves.
    """
    if not density:
        raise ValueError("density has no leaves to draw: pass fractions by name, as leaf_density(masks) gives them.")
    percent = [100 * value for value in density.values()]
    rows = range(len(percent))
    axes.barh(rows, percent, color=BLUE, height=0.7)
    for row, value in zip(rows, percent, strict=True):
        axes.text(value + 1, row, f"{value:.3g}", va="center", size="small")
    axes.set_yticks(rows, list(density), parse_math=False)
    axes.set_ylim(len(percent) - 0.4, -0.6)
    axes.set_xlim(0, 112)  # room for the number of a leaf that keeps all
    axes.set_xticks(range(0, 101, 25))
    axes.set_xlabel("kept, %")
    axes.spines[["top", "right"]].set_visible(False)


def kept_cells(mask: Bool[np.ndarray, "..."], cells: int = MOST_CELLS) -> Float[np.ndarray, "rows columns"]:
    """Kept fraction of a kernel, by input and output channel, in at most `cells` by `cells` cells.

    Args:
        mask: A mask of two or more axes, the last two those of inputs and outputs as Flax has them; axes before them
            (a filter's height and width, stacked layers) are averaged.
        cells: Most cells along a side; a longer side is cut into as many runs of equal length, to one.

    Returns:
        Fractions in [0, 1].

    Raises:
        ValueError: Fewer than two axes, an empty mask, or one that is not bool.

    Example:
        >>> import numpy as np
        >>> from woodjax.plots import kept_cells
        >>> kept_cells(np.eye(4, dtype=bool), cells=2).tolist()
        [[0.5, 0.0], [0.0, 0.5]]
    """
    mask = np.asarray(mask)
    if mask.dtype != bool or mask.ndim < 2 or not mask.size:
        raise ValueError(f"mask is {mask.dtype} {mask.shape}: pass the bool mask of a kernel, two or more axes.")
    kept = mask.reshape(-1, *mask.shape[-2:]).mean(axis=0, dtype=np.float32)
    for axis in range(2):
        size = kept.shape[axis]
        starts = np.arange(min(size, cells)) * size // min(size, cells)
        lengths = np.diff([*starts, size])
        kept = np.add.reduceat(kept, starts, axis=axis) / np.expand_dims(lengths, 1 - axis)
    return kept


def draw_mask(axes: Axes, mask: Bool[np.ndarray, "..."], cells: int = MOST_CELLS) -> AxesImage:
    """Draw what a kernel keeps, darker where more survives: outputs to the right, inputs downwards.

    Full colour is the densest cell, or a sparse kernel would be blank.

    Args:
        axes: Where to.
        mask: As for `kept_cells`.
        cells: As there.

    Returns:
        The picture, for a colour bar.

    Raises:
        ValueError: As `kept_cells`.
    """
    kept = kept_cells(mask, cells)
    rows, columns = np.shape(mask)[-2:]
    image = axes.imshow(
        kept,
        cmap=SURVIVORS,
        vmin=0,
        vmax=float(kept.max()) or 1.0,
        interpolation="none",
        aspect="auto",
        extent=(0, columns, rows, 0),
    )
    axes.set_xticks([0, columns])
    axes.set_yticks([0, rows])
    axes.set_xlabel("output", labelpad=-6)
    axes.set_ylabel("input", labelpad=-6)
    return image
