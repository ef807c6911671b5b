"""Data sets for the examples and the benchmarks.

| file | what |
|---|---|
| `registry` | `load_dataset`: by name |
| `dataset` | `Dataset` in memory, and what training asks of any data |
| `augment` | random crops and flips of a batch |
"""

from woodjax.datasets.augment import augment
from woodjax.datasets.dataset import Dataset, Normalise, TrainingData
from woodjax.datasets.registry import READERS, load_dataset

__all__ = ["READERS", "Dataset", "Normalise", "TrainingData", "augment", "load_dataset"]
