"""Data sets for the examples and the benchmarks.

| file | what |
|---|---|
| `registry` | `load_dataset`: by name |
| `dataset` | `Dataset` in memory, and what training asks of any data |
| `prepared` | TFDS directories, without TensorFlow |
| `tiny_imagenet` | Tiny ImageNet, from its folder |
| `imagenet` | ImageNet, streamed |
| `text` | `load_text`: bytes of a text, by name |
| `augment` | random crops and flips of a batch |
"""

from woodjax.datasets.augment import augment
from woodjax.datasets.dataset import Dataset, Normalise, TrainingData
from woodjax.datasets.imagenet import ImageStream, stream_imagenet
from woodjax.datasets.registry import READERS, load_dataset
from woodjax.datasets.text import TEXTS, TextDataset, load_text

__all__ = [
    "READERS",
    "TEXTS",
    "Dataset",
    "ImageStream",
    "Normalise",
    "TextDataset",
    "TrainingData",
    "augment",
    "load_dataset",
    "load_text",
    "stream_imagenet",
]
