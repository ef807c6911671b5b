"""Stages of one-shot pruning on disk, so that a run that was killed goes on to the same bits."""

import json
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import numpy as np

from woodjax.checkpoints import Checkpoints, write_json
from woodjax.door import checked
from woodjax.one_shot import OneShotInfo, Stage
from woodjax.typing import Params
from woodjax.update_search import UpdateChoice


@checked
class StageCheckpoints:
    """A folder with the last stages of one run of `prune_one_shot`.

    Arrays are written by Orbax, each process its own shards; what a stage did is a small JSON file of its own. The
    folder must be one that all processes see. A run that was killed, and is started again with the same arguments, goes
    on from the last stage that was written whole.

    Args:
        folder: Where; made if it is not there.
        params: The network that is pruned: stages are restored where its leaves lie, on as many devices as these are.
        settings: What a run has to agree in to go on from here, as JSON: what the caller would not want to mix up.
        keep: Number of stages whose arrays stay.

    Raises:
        ImportError: No Orbax (`pip install orbax-checkpoint`).
        ValueError: The folder is of a run with other settings.

    Cost:
        For each stage the bytes of the parameters, and one for each mask entry, written before the next begins.

    Example:
        >>> import tempfile, jax.numpy as jnp, woodjax as wj
        >>> loss, params, x = lambda w, x: 0.5 * (w * x).sum() ** 2, jnp.array([[1.0, 2.0, 3.0]]), jnp.eye(3)
        >>> with tempfile.TemporaryDirectory() as folder, wj.StageCheckpoints(folder, params) as saved:
        ...     pruned, masks, info = wj.prune_one_shot(
        ...         loss, params, x, 0.3, stages=2, on_stage=saved.save, resume=saved.last()
        ...     )
        ...     len(saved.last().infos)
        2
    """

    def __init__(
        self,
        folder: str | PathLike[str],
        params: Params,
        *,
        settings: dict[str, Any] | None = None,
        keep: int = 2,
    ) -> None:
        """Open or make a folder."""
        self._records = Path(folder).absolute()
        self._like = params, jax.tree.map(_mask_like, params)
        self._checkpoints = Checkpoints(folder, settings or {}, keep=keep)

    def __enter__(self) -> Self:
        """Nothing more."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the folder."""
        self._checkpoints.__exit__(kind, error, trace)

    def save(self, stage: Stage) -> None:
        """Write a stage: pass this as `on_stage`. It is on disk when this returns.

        Args:
            stage: As `prune_one_shot` hands it out.

        Raises:
            ValueError: A stage that saw no data, and so cannot be gone on from.
        """
        if stage.info is None:
            raise ValueError("The stage saw no data: only stages of prune_one_shot can be gone on from.")
        number = len(stage.infos)
        # First what was done, then the arrays: what is found later has both.
        record = {"stages": stage.stages, "initial": _told(stage.initial), "info": _told(stage.info)}
        write_json(self._record(number), record)
        self._checkpoints.save(number, (stage.params, stage.masks))

    def last(self) -> Stage | None:
        """Read the last stage: pass it as `resume`.

        Returns:
            The stage, where the parameters lie; None where there is none.
        """
        found = self._checkpoints.restore(self._like)
        if found is None:
            return None
        number, (params, masks) = found
        records = [json.loads(self._record(i).read_text()) for i in range(1, number + 1)]
        infos = tuple(_info(record["info"]) for record in records)
        initial, stages = (records[-1][name] for name in ("initial", "stages"))
        return Stage(params, masks, infos[-1], infos, _array(initial), stages)

    def _record(self, number: int) -> Path:
        return self._records / f"stage-{number}.json"


def _mask_like(leaf: Any) -> Any:
    if isinstance(leaf, jax.Array):
        return jax.ShapeDtypeStruct(leaf.shape, bool, sharding=leaf.sharding)
    return np.zeros(np.shape(leaf), bool)


def _told(value: Any) -> Any:
    # Numbers of float32 are those of their float64, which JSON writes without loss.
    if value is None:
        return None
    if isinstance(value, OneShotInfo | UpdateChoice):
        return {name: _told(field) for name, field in value._asdict().items()}
    array = np.asarray(value)
    return {"dtype": array.dtype.name, "values": array.tolist()}


def _info(record: dict[str, Any]) -> OneShotInfo:
    fields = {name: _array(field) for name, field in record.items() if name != "choice"}
    choice = record["choice"] and UpdateChoice(**{name: _array(field) for name, field in record["choice"].items()})
    return OneShotInfo(**fields, choice=choice)


def _array(record: dict[str, Any] | None) -> Any:
    return None if record is None else np.asarray(record["values"], record["dtype"])
