"""Layers on disk, one file each, for `woodjax.prune_layers`: the host holds one of them at a time as well."""

from os import PathLike
from pathlib import Path

from woodjax.deployment.files import load_arrays, save_arrays, save_masks
from woodjax.door import checked
from woodjax.layerwise.layers import LayerFn
from woodjax.typing import Masks, Params


@checked
class LayerFile:
    """A layer whose parameters are in a safetensors file and go, pruned, into another.

    Both files written are whole or not there: after a kill, the layers that have a file at `destination` are done.

    Args:
        apply: `apply(params, hidden) -> hidden`, of nested dicts as `load_arrays` makes them.
        source: File with the dense parameters; it is only read.
        destination: File for the pruned parameters.
        masks: File for the masks, as `load_masks` reads them; None to write none.

    Attributes:
        apply: As given.
        source: As given.
        destination: As given.
        masks: As given.

    Raises:
        ValueError: A destination that is the source: a run that was killed could not go on from it.

    Example:
        >>> import tempfile, numpy as np, woodjax as wj
        >>> apply = lambda params, x: x @ params["kernel"]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     wj.save_arrays(f"{folder}/0.safetensors", {"kernel": np.eye(4, dtype=np.float32)})
        ...     layers = [wj.LayerFile(apply, f"{folder}/0.safetensors", f"{folder}/0.pruned.safetensors")]
        ...     _ = wj.prune_layers(layers, np.ones((1, 4), np.float32), sparsity=0.75, method="magnitude")
        ...     wj.load_arrays(f"{folder}/0.pruned.safetensors")[0]["kernel"].diagonal().tolist()
        [1.0, 1.0, 1.0, 1.0]
    """

    def __init__(
        self,
        apply: LayerFn,
        source: str | PathLike[str],
        destination: str | PathLike[str],
        masks: str | PathLike[str] | None = None,
    ) -> None:
        """Read nothing yet."""
        self.apply: LayerFn = apply
        self.source: Path = Path(source)
        self.destination: Path = Path(destination)
        self.masks: Path | None = None if masks is None else Path(masks)
        if self.source.resolve() == self.destination.resolve():
            raise ValueError(
                f"source and destination are both {self.source}: write pruned layers elsewhere, or a killed run would "
                "prune them again."
            )

    def load(self) -> Params:
        """Read the dense parameters."""
        return load_arrays(self.source)[0]

    def store(self, params: Params, masks: Masks) -> None:
        """Write the pruned parameters and the masks."""
        if self.masks is not None:
            save_masks(self.masks, masks)
        save_arrays(self.destination, params)
