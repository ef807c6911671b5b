"""What a run leaves behind: a record of each result, a table, and arrays on disk."""

import json
import platform
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.table import Table
from safetensors.numpy import save_file

from woodjax.tree import path_name
from woodjax.typing import Masks, Params

__all__ = ["Result", "Run", "environment", "leaf_density", "save_arrays"]


@dataclass(frozen=True)
class Result:
    """One pruned network."""

    method: str
    title: str
    column: str  # "mask", "update", "staged" or "first_order"
    sparsity: float  # asked
    reached: float
    accuracy: float
    seconds: float  # compilation included
    predicted_loss_change: float | None  # sum over stages; None where no curvature was used
    measured_loss_change: float | None  # on the examples of each stage, summed
    leaf_density: dict[str, float]  # kept fraction of each prunable leaf


@dataclass
class Run:
    """Results of a whole run."""

    network: str
    dataset: str
    seed: int
    dense_accuracy: float
    config: dict[str, Any]
    results: list[Result] = field(default_factory=list)

    def save(self, file: Path) -> None:
        """Write the run as JSON, with the environment it was made in.

        Args:
            file: Where to.
        """
        file.write_text(json.dumps({**asdict(self), "environment": environment()}, indent=1) + "\n")

    def table(self) -> Table:
        """Test accuracy: a row a method, a column a sparsity."""
        levels = sorted({result.sparsity for result in self.results})
        title = f"{self.network} on {self.dataset}: test accuracy in %, dense {100 * self.dense_accuracy:.2f}"
        caption = "One big step leaves the region where the quadratic model holds: at high sparsity use stages."
        table = Table("method", "column", title=title, caption=caption)
        for level in levels:
            table.add_column(f"{100 * level:g} %", justify="right")
        for method in dict.fromkeys(result.method for result in self.results):
            rows = [result for result in self.results if result.method == method]
            cells = {result.sparsity: f"{100 * result.accuracy:.2f}" for result in rows}
            table.add_row(rows[0].title, rows[0].column, *(cells.get(level, "") for level in levels))
        return table


def environment() -> dict[str, str]:
    """Versions and device that numbers depend on.

    Returns:
        Names and values, for records.

    Example:
        >>> from woodjax.records import environment
        >>> sorted(environment())
        ['device', 'jax', 'platform', 'python', 'woodjax']
    """
    return {
        "woodjax": version("woodjax"),
        "jax": jax.__version__,
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
        "platform": platform.machine(),
    }


def leaf_density(masks: Masks) -> dict[str, float]:
    """Kept fraction of each leaf of two or more axes, by path.

    Args:
        masks: A params-tree of bool.

    Returns:
        Fractions in [0, 1].

    Example:
        >>> import jax.numpy as jnp
        >>> from woodjax.records import leaf_density
        >>> leaf_density({"kernel": jnp.array([[True, False]]), "bias": jnp.array([True])})
        {'kernel': 0.5}
    """
    leaves = jax.tree_util.tree_leaves_with_path(masks)
    return {path_name(path): float(np.mean(mask)) for path, mask in leaves if np.ndim(mask) >= 2}


def save_arrays(file: Path, params: Params, masks: Masks) -> None:
    """Write parameters and masks to one safetensors file, as `params/...` and `masks/...`.

    Args:
        file: Where to.
        params: A params-tree.
        masks: A params-tree of bool.
    """
    arrays = {}
    for prefix, tree in (("params", params), ("masks", masks)):
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            arrays[f"{prefix}/{path_name(path)}"] = np.asarray(leaf, order="C")
    save_file(arrays, file)
