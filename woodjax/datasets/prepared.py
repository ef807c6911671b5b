"""Data sets that TFDS has prepared as `array_record`: read without TensorFlow."""

from pathlib import Path
from typing import Any

import numpy as np


def find_prepared(name: str, folder: Path) -> Path:
    """The TFDS folder that holds a data set.

    Args:
        name: Name of the TFDS builder.
        folder: A TFDS folder, or one with a `tensorflow_datasets` folder in it.

    Returns:
        The TFDS folder.

    Raises:
        FileNotFoundError: The data set is in neither; says the command that prepares it.
    """
    roots = [root for root in (folder, folder / "tensorflow_datasets") if (root / name).is_dir()]
    if not roots:
        raise FileNotFoundError(
            f"No {name} in {folder}: expected {folder / name} or {folder / 'tensorflow_datasets' / name}. Prepare it "
            f"once, where TensorFlow is installed: {_command(name, folder)}"
        )
    return roots[0]


def open_prepared(name: str, split: str, root: Path, **options: Any) -> Any:
    """Examples of a split, by their number.

    Args:
        name: Name of the TFDS builder.
        split: Name of the split.
        root: As `find_prepared` returns.
        **options: Of `tfds.data_source`.

    Returns:
        A random-access source of dicts.

    Raises:
        ImportError: No `tensorflow_datasets`.
        FileNotFoundError: Prepared in a format without random access.
    """
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ImportError("TFDS directories need tensorflow-datasets: pip install 'woodjax[data]'.") from error
    try:
        return tfds.data_source(name, split=split, data_dir=root, **options)
    except NotImplementedError as error:
        raise FileNotFoundError(
            f"{root / name} is not in the array_record format. Prepare it in that: {_command(name, root)}"
        ) from error


def read_split(name: str, split: str, root: Path) -> tuple[Any, Any]:
    """A whole split as arrays.

    Args:
        name: Name of the TFDS builder; all its images have one size.
        split: Name of the split.
        root: As `find_prepared` returns.

    Returns:
        Images `[n, h, w, c]` uint8 and labels `[n]`.
    """
    source = open_prepared(name, split, root)
    records = [source[i] for i in range(len(source))]
    return np.stack([r["image"] for r in records]), np.array([r["label"] for r in records])


def _command(name: str, folder: Path) -> str:
    manual = " --manual_dir=FOLDER_WITH_THE_ILSVRC2012_TAR_FILES" if name == "imagenet2012" else ""
    return f"tfds build {name} --file_format=array_record --data_dir={folder}{manual}"
