"""Real data sets as arrays: embedded, from a TFDS directory, a folder of images, or an npz file.

| name | where from | normalised by |
|---|---|---|
| `digits` | scikit-learn's UCI digits, inside the package: no network | 16 |
| `mnist` | TFDS directory `mnist/3.0.1` (`array_record`; TensorFlow is not needed) | mean .1307, std .3081 |
| `cifar10` | TFDS directory `cifar10/3.0.2` | ImageNet's means and deviations |
| `cifar100` | TFDS directory `cifar100/3.0.2`; fine labels | CIFAR-100's means and deviations |
| `tiny-imagenet` | the folder `tiny-imagenet-200` of its zip file; load it `as_bytes` | ImageNet's |
| `cifar10-subset` | `cifar10_exact_subset.npz`: original pixels, 3,805 train and 761 test images | ImageNet's |

ImageNet is streamed: `woodjax.datasets.stream_imagenet`.
"""

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from jaxtyping import Float, Integer, UInt8

from woodjax.datasets.dataset import Dataset, Normalise
from woodjax.datasets.imagenet import IMAGENET
from woodjax.datasets.prepared import find_prepared, read_split
from woodjax.datasets.tiny_imagenet import find_tiny_imagenet, read_tiny_imagenet

Images = UInt8[np.ndarray, "n h w c"]
Labels = Integer[np.ndarray, " n"]
Split = tuple[Images, Labels]

DIGITS = Normalise(scale=16)
MNIST = Normalise((0.1307,), (0.3081,))
CIFAR100 = Normalise((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))


def load_dataset(name: str, data_dir: str | os.PathLike[str] | None = None, *, as_bytes: bool = False) -> Dataset:
    """Load a data set by name.

    Args:
        name: `digits`, `mnist`, `cifar10`, `cifar100`, `tiny-imagenet` or `cifar10-subset`.
        data_dir: Folder that holds the TFDS directories (or a `tensorflow_datasets` folder with
            them) and the npz file; None reads the environment variable `WOODJAX_DATA_DIR`.
            `digits` needs none.
        as_bytes: Leave images as uint8, a quarter of the memory (Tiny ImageNet: 1.35 GB for 5.4 GB):
            `dataset.normalise(images)` makes inputs of a batch, as `woodjax.training.fit` does.

    Returns:
        Images `[n, h, w, c]`, float32 and normalised or uint8, and integer labels.

    Raises:
        ValueError: Unknown name, or no folder given.
        FileNotFoundError: The folder lacks the data set; says how to prepare it.
        ImportError: A TFDS directory without `tensorflow_datasets`.

    Cost:
        Decoded arrays are kept in the system's temporary folder for the next run.
    """
    if name not in READERS:
        raise ValueError(
            f"Unknown dataset {name!r}: choose one of {sorted(READERS)}. ImageNet is streamed: "
            "woodjax.datasets.stream_imagenet."
        )
    read, normalise = READERS[name]
    if name == "digits":
        folder = Path()
    else:
        given = data_dir or os.environ.get("WOODJAX_DATA_DIR")
        if not given:
            raise ValueError(f"Dataset {name!r} is read from a folder: pass --data-dir or set WOODJAX_DATA_DIR.")
        folder = Path(given)
    (train_x, train_y), (test_x, test_y) = read(folder)

    def inputs(images: Images) -> Images | Float[np.ndarray, "n h w c"]:
        if as_bytes:
            return images
        scaled = images.astype(np.float32) / np.float32(normalise.scale)
        return (scaled - np.asarray(normalise.mean, np.float32)) / np.asarray(normalise.std, np.float32)

    labels = train_y.astype(np.int32), test_y.astype(np.int32)
    return Dataset(name, inputs(train_x), labels[0], inputs(test_x), labels[1], normalise)


def _digits(folder: Path) -> tuple[Split, Split]:
    del folder
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8, 1).astype(np.uint8)
    order = np.random.default_rng(0).permutation(len(labels))
    train, test = order[:1347], order[1347:]
    return (images[train], labels[train]), (images[test], labels[test])


def _tfds(name: str) -> Callable[[Path], tuple[Split, Split]]:
    def read(folder: Path) -> tuple[Split, Split]:
        root = find_prepared(name, folder)
        return _cached(name, root / name, lambda: (read_split(name, "train", root), read_split(name, "test", root)))

    return read


def _tiny_imagenet(folder: Path) -> tuple[Split, Split]:
    root = find_tiny_imagenet(folder)
    return _cached("tiny-imagenet", root, lambda: read_tiny_imagenet(root))


def _cached(name: str, source: Path, make: Callable[[], tuple[Split, Split]]) -> tuple[Split, Split]:
    cache = Path(tempfile.gettempdir()) / f"woodjax-{os.getuid()}"
    cache.mkdir(mode=0o700, exist_ok=True)
    key = hashlib.sha256(str(source.resolve()).encode()).hexdigest()[:12]
    file = cache / f"{name}-{key}.npz"
    if not file.exists():
        (train_x, train_y), (test_x, test_y) = make()
        part = file.with_suffix(f".{os.getpid()}.npz")
        np.savez(part, train_x=train_x, train_y=train_y, test_x=test_x, test_y=test_y)
        part.replace(file)
    with np.load(file) as arrays:
        return (arrays["train_x"], arrays["train_y"]), (arrays["test_x"], arrays["test_y"])


def _subset(folder: Path) -> tuple[Split, Split]:
    file = folder / "cifar10_exact_subset.npz"
    if not file.is_file():
        raise FileNotFoundError(f"No {file.name} in {folder}.")
    try:
        with np.load(file) as arrays:
            train = arrays["train_images"], arrays["train_labels"]
            return train, (arrays["test_images"], arrays["test_labels"])
    except (ValueError, KeyError) as error:
        raise ValueError(f"{file} is not the npz file that is expected: it has no train and test images.") from error


READERS = {
    "digits": (_digits, DIGITS),
    "mnist": (_tfds("mnist"), MNIST),
    "cifar10": (_tfds("cifar10"), IMAGENET),
    "cifar100": (_tfds("cifar100"), CIFAR100),
    "tiny-imagenet": (_tiny_imagenet, IMAGENET),
    "cifar10-subset": (_subset, IMAGENET),
}
