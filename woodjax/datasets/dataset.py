"""What a training run and an evaluation ask of a data set, and the data set that is held in memory."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer, Shaped, UInt8

Images = UInt8[Array | np.ndarray, "n h w c"] | Float[Array | np.ndarray, "n h w c"]
Labels = Integer[Array | np.ndarray, " n"]


@dataclass(frozen=True)
class Normalise:
    """Bytes to floats, `(x / scale − mean) / std` by channel; floats are normalised already and stay as they are.

    Attributes:
        mean: By channel, of images in [0, 1]; one value for all is allowed.
        std: By channel.
        scale: The byte that is 1.
    """

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    scale: float = 255.0

    def __call__(self, images: Images) -> Float[Array, "n h w c"]:
        """Normalise a batch; works in and out of `jit`.

        Args:
            images: `[n, h, w, c]`, uint8 or floating.

        Returns:
            `[n, h, w, c]`, float32 for bytes.

        Example:
            >>> import numpy as np
            >>> from woodjax.datasets import Normalise
            >>> float(Normalise((0.5,), (0.5,))(np.full((1, 1, 1, 1), 255, np.uint8))[0, 0, 0, 0])
            1.0
        """
        if images.dtype != jnp.uint8:
            return jnp.asarray(images)
        mean, std = (np.asarray(values, np.float32) for values in (self.mean, self.std))
        return (jnp.asarray(images).astype(jnp.float32) / self.scale - mean) / std


class TrainingData(Protocol):
    """Batches of a data set: held in memory (`Dataset`) or streamed (`ImageStream`)."""

    @property
    def name(self) -> str:
        """Name, as `load_dataset` takes."""

    @property
    def num_train(self) -> int:
        """Examples in the train split."""

    @property
    def normalise(self) -> Normalise:
        """From the images of a batch to inputs of a network."""

    def train_batches(self, *, batch_size: int, seed: int, epoch: int) -> Iterator[tuple[Images, Labels]]:
        """Full batches of one epoch, an order that is a function of `seed` and `epoch` alone.

        Args:
            batch_size: Examples in a batch.
            seed: Not negative.
            epoch: From 0.

        Returns:
            Pairs of images and labels.
        """
        ...

    def test_batches(self, batch_size: int) -> Iterator[tuple[Images, Labels]]:
        """The test split in its order; the last batch may be smaller.

        Args:
            batch_size: Examples in a batch.

        Returns:
            Pairs of images and labels.
        """
        ...


class Dataset(NamedTuple):
    """A classification data set in memory: float images, normalised, or bytes that `normalise` is for."""

    name: str
    train_inputs: Images
    train_labels: Labels
    test_inputs: Images
    test_labels: Labels
    normalise: Normalise = Normalise()

    @property
    def num_train(self) -> int:
        """Examples in the train split."""
        return len(self.train_labels)

    def train_batches(self, *, batch_size: int, seed: int, epoch: int) -> Iterator[tuple[Images, Labels]]:
        """Full batches of one epoch, in an order that is a function of `seed` and `epoch` alone.

        Args:
            batch_size: Examples in a batch; those that do not fill one are left out of this epoch.
            seed: Not negative.
            epoch: From 0.

        Yields:
            Images and labels, gathered on the device where the split is there (`on_device`).
        """
        steps = self.num_train // batch_size
        order = np.random.default_rng((seed, epoch)).permutation(self.num_train)[: steps * batch_size]
        take = _take if isinstance(self.train_inputs, Array) else lambda x, y, chosen: (x[chosen], y[chosen])
        for chosen in order.astype(np.int32).reshape(steps, batch_size):
            yield take(self.train_inputs, self.train_labels, chosen)

    def test_batches(self, batch_size: int) -> Iterator[tuple[Images, Labels]]:
        """The test split in its order.

        Args:
            batch_size: Examples in a batch; the last may be smaller.

        Yields:
            Images and labels.
        """
        for start in range(0, len(self.test_labels), batch_size):
            part = slice(start, start + batch_size)
            yield self.test_inputs[part], self.test_labels[part]

    def on_device(self) -> "Dataset":
        """The train split on the default device, if it takes less than half of what is free there.

        Returns:
            A data set of the same values.

        Cost:
            One transfer.
        """
        device = jnp.zeros(()).devices().pop()
        memory = device.memory_stats()
        images = np.dtype(self.train_inputs.dtype).itemsize * self.train_inputs.size
        if memory and "bytes_limit" in memory and 2 * images > memory["bytes_limit"] - memory["bytes_in_use"]:
            return self
        return self._replace(train_inputs=jnp.asarray(self.train_inputs), train_labels=jnp.asarray(self.train_labels))


@jax.jit
def _take(
    inputs: Shaped[Array, "n ..."], labels: Shaped[Array, " n"], chosen: Integer[Array, " b"]
) -> tuple[Shaped[Array, "b ..."], Shaped[Array, " b"]]:
    return inputs[chosen], labels[chosen]
