"""Hidden states of all sequences: on the host between layers, on the device a micro-batch at a time."""

from collections.abc import Callable, Iterator
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec, Sharding

from woodjax.layerwise.layers import Hidden
from woodjax.loss_rows import batch_size
from woodjax.tree import path_name
from woodjax.typing import Params, PyTree


class MicroBatches(NamedTuple):
    """How sequences are cut, and where they go."""

    size: int  # sequences
    microbatch_size: int  # on the device at once; the last micro-batch may have fewer
    sharding: Sharding | None  # of the first axis; None for the default device

    @classmethod
    def of(cls, hidden: Hidden, microbatch_size: int, sharding: Sharding | None) -> Self:
        """Of hidden states.

        Args:
            hidden: Leaves `[n, ...]`.
            microbatch_size: Sequences on the device at once.
            sharding: Of their first axis, or None.

        Returns:
            Micro-batches.

        Raises:
            ValueError: No sequences, or leaves of different lengths; `microbatch_size < 1`; a sharding by which a
                micro-batch, or the last one, does not divide, or one of an explicit mesh.
        """
        size = batch_size(hidden)
        if microbatch_size < 1:
            raise ValueError(f"microbatch_size is {microbatch_size}: pass at least 1.")
        if isinstance(sharding, NamedSharding) and AxisType.Explicit in sharding.mesh.axis_types:
            raise ValueError(
                "sharding is of an explicit mesh, where sums over sequences would have to name their layout: pass "
                "NamedSharding(Mesh(mesh.devices, mesh.axis_names), spec), a mesh whose axes are auto."
            )
        if sharding is not None:
            for count in {min(microbatch_size, size), size % microbatch_size} - {0}:
                _check_divides(sharding, count)
        return cls(size, microbatch_size, sharding)

    @property
    def everywhere(self) -> Sharding | None:
        """Where a copy is on every device that has sequences."""
        if isinstance(self.sharding, NamedSharding):
            return NamedSharding(self.sharding.mesh, PartitionSpec())
        return self.sharding

    def place(self, params: Params) -> Params:
        """Put the parameters of a layer where the micro-batches go.

        Args:
            params: Arrays of the host, copied to every device of the sharding; those of devices stay as they are.

        Returns:
            Arrays of devices.
        """
        return jax.tree.map(lambda x: x if isinstance(x, jax.Array) else jax.device_put(x, self.everywhere), params)

    def cut(self, tree: PyTree) -> Iterator[PyTree]:
        """Put one micro-batch after another on the device.

        Args:
            tree: Arrays of the host with one row for each sequence along their first axis, or as many rows for each,
                in the order of the micro-batches.

        Yields:
            Micro-batches.
        """

        def put(start: int) -> PyTree:
            end = min(start + self.microbatch_size, self.size)

            def part(x: np.ndarray) -> np.ndarray:
                rows = len(x) // self.size
                return x[rows * start : rows * end]

            return jax.device_put(jax.tree.map(part, tree), self.sharding)

        ready = put(0)
        for start in range(self.microbatch_size, self.size, self.microbatch_size):
            current, ready = ready, put(start)  # the next one travels while this one is computed
            yield current
        yield ready

    def map(self, function: Callable[[PyTree], PyTree], tree: PyTree) -> PyTree:
        """Apply a function to all micro-batches.

        Args:
            function: Of a micro-batch.
            tree: Arrays of the host.

        Returns:
            Results on the host, one after another along the first axis.
        """
        parts: list[PyTree] = []
        for part in self.cut(tree):
            parts.append(function(part))
            if len(parts) > 1:
                parts[-2] = jax.device_get(parts[-2])  # while the next one is computed
        parts[-1] = jax.device_get(parts[-1])
        return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


def _check_divides(sharding: Sharding, count: int) -> None:
    try:
        sharding.shard_shape((count,))
    except ValueError as error:
        raise ValueError(
            f"A micro-batch of {count} sequences does not divide among the devices of {sharding}: choose the number of "
            "sequences and microbatch_size as multiples of them."
        ) from error


def to_host(hidden: Hidden) -> Hidden:
    """A copy on the host.

    Args:
        hidden: Arrays of the host or of devices.

    Returns:
        NumPy arrays.
    """
    return jax.tree.map(np.array, jax.device_get(hidden))


def check_finite(tree: PyTree, what: str, mend: str) -> None:
    """Raise unless all values are finite.

    Args:
        tree: Arrays of the host.
        what: They are.
        mend: What to do.

    Raises:
        ValueError: NaN or infinities.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if jnp.issubdtype(leaf.dtype, jnp.floating) and not np.isfinite(leaf).all():
            name = f" (leaf '{path_name(path)}')" if path else ""
            raise ValueError(f"{what}{name} hold NaN or infinities: {mend}")
