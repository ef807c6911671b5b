"""ImageNet, streamed: decoded, cropped and put into batches by Grain, in processes of its own."""

import importlib
import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Integer, UInt8

from woodjax.datasets.dataset import Normalise
from woodjax.datasets.prepared import find_prepared, open_prepared

Pixels = UInt8[np.ndarray, "h w 3"]
ImageBatch = tuple[UInt8[np.ndarray, "n s s 3"], Integer[np.ndarray, " n"]]

IMAGENET = Normalise((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class ImageStream:
    """Batches of bytes from sources of encoded images of any size; `fit` and `evaluate` take it like a `Dataset`.

    Attributes:
        name: Of the data set.
        train: Random-access source of dicts with `image` (the bytes of a file) and `label`.
        test: The same, of the test split.
        size: Height and width of what comes out.
        workers: Processes that decode; 0 decodes in threads of this one.
        normalise: For the batches.
    """

    name: str
    train: Sequence[Any] = field(repr=False)
    test: Sequence[Any] = field(repr=False)
    size: int = 224
    workers: int = 0
    normalise: Normalise = IMAGENET

    def __post_init__(self) -> None:
        """Check the numbers, and that Grain is there.

        Raises:
            ValueError: `size` below 1 or `workers` below 0.
        """
        if self.size < 1 or self.workers < 0:
            raise ValueError(f"Found size={self.size} and workers={self.workers}: pass size >= 1 and workers >= 0.")
        _grain()

    @property
    def num_train(self) -> int:
        """Examples in the train split."""
        return len(self.train)

    def train_batches(self, *, batch_size: int, seed: int, epoch: int) -> Iterator[ImageBatch]:
        """Full batches of one epoch: random resized crops and flips, a function of `seed` and `epoch` alone.

        Args:
            batch_size: Examples in a batch; those that do not fill one are left out of this epoch.
            seed: Not negative.
            epoch: From 0.

        Returns:
            Batches of images and labels.
        """
        drawn = int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0])
        examples = _grain().MapDataset.source(self.train).seed(drawn).shuffle().random_map(_TrainView(self.size))
        return self._batches(examples, batch_size, drop_remainder=True)

    def test_batches(self, batch_size: int) -> Iterator[ImageBatch]:
        """The test split in its order: the centre, after the short side became 8/7 of `size` (256 for 224).

        Args:
            batch_size: Examples in a batch; the last may be smaller.

        Returns:
            Batches of images and labels.
        """
        examples = _grain().MapDataset.source(self.test).map(_TestView(self.size))
        return self._batches(examples, batch_size, drop_remainder=False)

    def _batches(self, examples: Any, batch_size: int, *, drop_remainder: bool) -> Iterator[ImageBatch]:
        grain = _grain()
        options = grain.ReadOptions(num_threads=min(16, os.cpu_count() or 1), prefetch_buffer_size=32)
        batches = examples.batch(batch_size, drop_remainder=drop_remainder).to_iter_dataset(options)
        if self.workers:
            flags = importlib.import_module("absl.flags").FLAGS
            if not flags.is_parsed():  # Grain reads its own when it starts processes; their defaults will do
                flags.mark_as_parsed()
            batches = batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=self.workers))
        return iter(batches)


def stream_imagenet(
    data_dir: str | os.PathLike[str] | None = None, *, size: int = 224, workers: int | None = None
) -> ImageStream:
    """ImageNet (ILSVRC 2012) from a TFDS directory `imagenet2012`, a batch at a time.

    Args:
        data_dir: As in `load_dataset`.
        size: Height and width of the images.
        workers: Processes that decode, started anew for each epoch: a script needs `if __name__ == "__main__":`. 0
            decodes in threads; None takes one process less than there are cores.

    Returns:
        Train and validation splits, the latter as the test split.

    Raises:
        ValueError: No folder given.
        FileNotFoundError: The folder lacks the data set; says the command that prepares it.
        ImportError: No Grain, or no TFDS.

    Cost:
        Nothing is read before the first batch. A core decodes and crops an image in a few milliseconds.

    References:
        Szegedy et al., Going deeper with convolutions, 2015 (arXiv 1409.4842), section 6: random resized crops; He et
        al. 2015 (arXiv 1512.03385), section 3.4: the centre crop.
    """
    given = data_dir or os.environ.get("WOODJAX_DATA_DIR")
    if not given:
        raise ValueError("ImageNet is read from a folder: pass data_dir or set WOODJAX_DATA_DIR.")
    name = "imagenet2012"
    root = find_prepared(name, Path(given))
    _grain()
    import tensorflow_datasets as tfds

    encoded = {"image": tfds.decode.SkipDecoding()}
    train, test = (open_prepared(name, split, root, decoders=encoded) for split in ("train", "validation"))
    workers = max(0, (os.cpu_count() or 1) - 1) if workers is None else workers
    return ImageStream(name, train, test, size=size, workers=workers)


def random_resized_box(width: int, height: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """A box of 8 to 100 % of the area and an aspect ratio of 3/4 to 4/3, drawn log-uniformly.

    Args:
        width: Of the image.
        height: Of the image.
        rng: Decides.

    Returns:
        Left, upper, right and lower edge. After ten draws that do not fit, the largest centred box of an aspect ratio
        in the range.

    Example:
        >>> import numpy as np
        >>> from woodjax.datasets.imagenet import random_resized_box
        >>> left, upper, right, lower = random_resized_box(500, 375, np.random.default_rng(0))
        >>> 0 <= left < right <= 500 and 0 <= upper < lower <= 375
        True
    """
    for _ in range(10):
        area = width * height * rng.uniform(0.08, 1)
        ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, upper = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, upper, left + w, upper + h
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    left, upper = (width - w) // 2, (height - h) // 2
    return left, upper, left + w, upper + h


@dataclass(frozen=True)
class _TrainView:
    size: int

    def __call__(self, example: dict[str, Any], rng: np.random.Generator) -> tuple[Pixels, int]:
        from PIL import Image

        image = Image.open(io.BytesIO(example["image"])).convert("RGB")
        box = random_resized_box(*image.size, rng)
        pixels = np.asarray(image.resize((self.size, self.size), Image.Resampling.BILINEAR, box=box))
        return (pixels[:, ::-1] if rng.random() < 0.5 else pixels), example["label"]


@dataclass(frozen=True)
class _TestView:
    size: int

    def __call__(self, example: dict[str, Any]) -> tuple[Pixels, int]:
        from PIL import Image

        image = Image.open(io.BytesIO(example["image"])).convert("RGB")
        side = min(image.size) * 7 / 8
        left, upper = (image.width - side) / 2, (image.height - side) / 2
        box = (left, upper, left + side, upper + side)
        return np.asarray(image.resize((self.size, self.size), Image.Resampling.BILINEAR, box=box)), example["label"]


def _grain() -> Any:
    try:
        return importlib.import_module("grain")
    except ImportError as error:
        raise ImportError("Streamed images need Grain: pip install 'woodjax[imagenet]'.") from error
