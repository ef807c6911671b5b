"""Tiny ImageNet, from the folder that its zip file unpacks to: TFDS has no builder of it."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from jaxtyping import Integer, UInt8

Split = tuple[UInt8[np.ndarray, "n 64 64 3"], Integer[np.ndarray, " n"]]

NAME = "tiny-imagenet-200"


def find_tiny_imagenet(folder: Path) -> Path:
    """The folder with `wnids.txt`.

    Args:
        folder: That folder, or the one that holds it under its usual name.

    Returns:
        It.

    Raises:
        FileNotFoundError: Neither; says how to get it.
    """
    roots = [root for root in (folder / NAME, folder) if (root / "wnids.txt").is_file()]
    if not roots:
        raise FileNotFoundError(
            f"No {NAME} in {folder}: expected {folder / NAME / 'wnids.txt'}. Get it once: curl -O "
            f"http://cs231n.stanford.edu/{NAME}.zip && unzip -q {NAME}.zip -d {folder}"
        )
    return roots[0]


def read_tiny_imagenet(root: Path) -> tuple[Split, Split]:
    """All of it: the labelled `val` split is the test split, as the labels of `test` were never published.

    Args:
        root: As `find_tiny_imagenet` returns.

    Returns:
        Train and test images `[n, 64, 64, 3]` uint8, grey ones as three equal channels, and labels: the positions of
        the WordNet ids in alphabetical order.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: An annotation of a class that is not in `wnids.txt`.

    Cost:
        110,000 JPEG files decoded; 1.35 GB.
    """
    classes = {wnid: label for label, wnid in enumerate(sorted((root / "wnids.txt").read_text().split()))}
    train = [
        (file, label) for wnid, label in classes.items() for file in sorted((root / "train" / wnid).rglob("*.JPEG"))
    ]
    test = []
    for line in (root / "val" / "val_annotations.txt").read_text().splitlines():
        name, wnid, *_ = line.split("\t")
        if wnid not in classes:
            raise ValueError(
                f"{root / 'val' / 'val_annotations.txt'} has {name!r} of class {wnid!r}: not in wnids.txt."
            )
        test.append((root / "val" / "images" / name, classes[wnid]))
    for split, files in (("train", train), ("val", test)):
        if not files:
            raise FileNotFoundError(f"{root / split} has no images: unpack {NAME}.zip again.")
    return _decode(train), _decode(test)


def _decode(files: list[tuple[Path, int]]) -> Split:
    from PIL import Image

    images = np.empty((len(files), 64, 64, 3), np.uint8)

    def read(number: int) -> None:
        with Image.open(files[number][0]) as image:
            images[number] = np.asarray(image.convert("RGB"))

    with ThreadPoolExecutor() as threads:
        list(threads.map(read, range(len(files))))
    return images, np.array([label for _, label in files])
