"""Checkpoints by Orbax, so that a run that was killed goes on to the same bits.

With several processes every one of them calls the same methods: each writes the shards that it holds, into a folder
that all of them see.
"""

import json
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import jax
import jax.numpy as jnp

__all__ = ["Checkpoints", "write_json"]

State = TypeVar("State")


class Checkpoints:
    """The last checkpoints in a folder, and what they are of.

    Typed random keys are stored as their data. A save is finished when `save` returns.
    """

    def __init__(self, folder: str | PathLike[str], settings: dict[str, Any], *, keep: int = 2) -> None:
        """Open or make a folder.

        Args:
            folder: Where.
            settings: What a run has to agree in to go on from here, as JSON.
            keep: Number of checkpoints that stay.

        Raises:
            ImportError: No Orbax.
            ValueError: The folder is of a run with other settings.
        """
        try:
            import orbax.checkpoint as ocp
        except ImportError as error:
            raise ImportError("Checkpoints need Orbax: pip install orbax-checkpoint.") from error
        self._args = ocp.args
        root = Path(folder).absolute()
        root.mkdir(parents=True, exist_ok=True)
        record = root / "settings.json"
        if record.exists():
            found = json.loads(record.read_text())
            differ = {name: (found.get(name), value) for name, value in settings.items() if found.get(name) != value}
            if differ:
                pairs = ", ".join(f"{name} {was!r} there and {now!r} here" for name, (was, now) in differ.items())
                raise ValueError(f"{root} holds a run with other settings: {pairs}. Use another folder.")
        else:
            write_json(record, settings)
        self._manager = ocp.CheckpointManager(root / "steps", options=ocp.CheckpointManagerOptions(max_to_keep=keep))

    def __enter__(self) -> Self:
        """Nothing more."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the folder."""
        self._manager.close()

    def save(self, number: int, state: Any) -> None:
        """Write a checkpoint.

        Args:
            number: Greater than that of the last.
            state: A pytree of arrays.
        """
        leaves = jax.tree.leaves(_each_key(jax.random.key_data, state))
        self._manager.save(number, args=self._args.StandardSave(leaves))
        self._manager.wait_until_finished()

    def restore(self, like: State) -> tuple[int, State] | None:
        """Read the last checkpoint.

        Args:
            like: The pytree that was saved, of any values; shapes and dtypes are enough. Leaves that lie on a mesh
                are restored as they lie, whatever the number of devices that saved them.

        Returns:
            Its number and the state, in buffers of its own; None where there is none.
        """
        number = self._manager.latest_step()
        if number is None:
            return None
        plain = _each_key(jax.random.key_data, like)
        leaves: Any = self._manager.restore(number, args=self._args.StandardRestore(jax.tree.leaves(plain)))
        restored = jax.tree.unflatten(jax.tree.structure(plain), [jnp.array(leaf) for leaf in leaves])
        typed = jax.tree.map(
            lambda x, was: jax.random.wrap_key_data(x, impl=jax.random.key_impl(was)) if _is_key(was) else x,
            restored,
            like,
        )
        return number, typed


def write_json(file: Path, value: Any) -> None:
    """Write a file whole or not at all, once.

    Args:
        file: Where; of several processes the first one writes it.
        value: What, as JSON.
    """
    if jax.process_index() == 0:
        part = file.with_suffix(".part")
        part.write_text(json.dumps(value))
        part.replace(file)


def _each_key(function: Callable[[Any], Any], tree: Any) -> Any:
    return jax.tree.map(lambda x: function(x) if _is_key(x) else x, tree)


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key)
