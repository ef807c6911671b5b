"""Real text that is embedded: the reference of the Python language, from every Python's own standard library."""

import hashlib
import platform
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

Bytes = UInt8[np.ndarray, " n"]
Topics = dict[str, str]


class TextDataset(NamedTuple):
    """A text as bytes, in two splits that share no paragraph. Made by `load_text`."""

    name: str
    source: str  # which edition: the text of another one is another data set
    train: Bytes
    validation: Bytes

    def rows(self, split: str, length: int) -> UInt8[np.ndarray, "n length"]:
        """Consecutive pieces of a split.

        Args:
            split: `"train"` or `"validation"`.
            length: Bytes in a piece.

        Returns:
            `[n, length]`; what does not fill a piece at the end is left out.

        Raises:
            ValueError: Another split; a length that no piece fills.
        """
        if split not in ("train", "validation"):
            raise ValueError(f"split is {split!r}: choose 'train' or 'validation'.")
        text = self.train if split == "train" else self.validation
        if not 1 <= length <= len(text):
            raise ValueError(f"length is {length}: the {split} split has {len(text)} bytes.")
        return text[: len(text) // length * length].reshape(-1, length)


def load_text(name: str = "python-reference") -> TextDataset:
    """Load a text by name.

    `python-reference` is the Python Language Reference as `help()` shows it, from `pydoc_data.topics` of the running
    interpreter: about 400 kB of English prose and examples, under the PSF licence (the examples also under 0BSD). It
    differs from one Python version to the next: `source` says which, and belongs in every record.

    A topic is in the validation split where the SHA-256 of its name begins with a byte below 32 (an eighth), in every
    version. Topics quote each other; a paragraph is kept where it stands first, topics of the validation split before
    all others, so that nothing of it is seen in training.

    Args:
        name: `python-reference`.

    Returns:
        Bytes of both splits.

    Raises:
        ValueError: Unknown name.
        ImportError: A Python without `pydoc_data`, as some distributions make it.

    Cost:
        Some milliseconds.

    References:
        The Python Language Reference, https://docs.python.org/3/reference/; licence:
        https://docs.python.org/3/license.html.

    Example:
        >>> from woodjax.datasets import load_text
        >>> text = load_text()
        >>> text.rows("train", 128).shape[1], len(text.train) > 5 * len(text.validation)
        (128, True)
    """
    if name not in TEXTS:
        raise ValueError(f"Unknown text {name!r}: choose one of {sorted(TEXTS)}.")
    source, topics = TEXTS[name]()
    held_out = [topic for topic in sorted(topics) if hashlib.sha256(topic.encode()).digest()[0] < 32]
    seen: set[str] = set()
    validation = _paragraphs([topics[topic] for topic in held_out], seen)
    train = _paragraphs([topics[topic] for topic in sorted(topics) if topic not in held_out], seen)
    return TextDataset(name, source, train, validation)


def _paragraphs(texts: list[str], seen: set[str]) -> Bytes:
    """Paragraphs that were not seen before; those that are get known."""
    kept = []
    for text in texts:
        for paragraph in text.split("\n\n"):
            words = " ".join(paragraph.split())  # quoted ones may be indented
            if words and words not in seen:
                seen.add(words)
                kept.append(paragraph.strip("\n"))
    return np.frombuffer("\n\n".join(kept).encode(), np.uint8)


def _python_reference() -> tuple[str, Topics]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise ImportError("This Python has no pydoc_data: install the whole standard library.") from error
    return f"Python {platform.python_version()}", topics


TEXTS: dict[str, Callable[[], tuple[str, Topics]]] = {"python-reference": _python_reference}
