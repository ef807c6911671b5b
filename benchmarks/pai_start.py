"""Where a study of pruning at initialization starts: data, a network with its first weights, examples to score with."""

from collections.abc import Iterator
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

import woodjax as wj
from woodjax.adapters import nnx as bridge
from woodjax.datasets import Dataset, TrainingData, load_dataset, stream_imagenet
from woodjax.models import NETWORKS, torch_init
from woodjax.typing import ApplyFn, Batch, Params, Select

WARM_UP_BATCH = 500
IMAGENET_CLASSES = 1000


class Start(NamedTuple):
    """A network before training, and the examples that it is scored with."""

    model: nnx.Module
    apply_fn: ApplyFn
    cold_fn: ApplyFn  # with batch statistics as they begin: what needs no data asks this one
    params: Params
    batch: Batch
    select: Select


def load(dataset: str, data_dir: Path | None, *, image_size: int | None, examples: int | None) -> TrainingData:
    """The data, whole or the first train examples of it, in images of their own size or of another.

    Smaller images are averages, larger ones repeat pixels and a grey channel. ImageNet is streamed as it is.
    """
    if dataset == "imagenet":
        return stream_imagenet(data_dir, size=image_size or 224)
    data = load_dataset(dataset, data_dir)
    if examples is not None:
        data = data._replace(train_inputs=data.train_inputs[:examples], train_labels=data.train_labels[:examples])
    if image_size is None:
        return data
    resized = (_resize(images, image_size) for images in (data.train_inputs, data.test_inputs))
    return data._replace(**dict(zip(("train_inputs", "test_inputs"), resized, strict=True)))


def _resize(images: np.ndarray, to: int) -> np.ndarray:
    n, size, _, channels = images.shape
    if max(size, to) % min(size, to):
        raise SystemExit(f"--image-size {to} and images of {size}×{size}: one has to divide the other.")
    if to > size:
        images = images.repeat(to // size, axis=1).repeat(to // size, axis=2)
    else:
        k = size // to
        images = images.reshape(n, to, k, to, k, channels).mean(axis=(2, 4)).astype(np.float32)
    return images.repeat(3 // channels, axis=3)


def start(network: str, data: TrainingData, seed: int, *, warm: bool, per_class: int) -> Start:
    """A network with torch's initial weights, its batch statistics warm or as they begin."""
    rngs = nnx.Rngs(seed)
    classes = int(data.train_labels.max()) + 1 if isinstance(data, Dataset) else IMAGENET_CLASSES
    options: dict[str, Any] = {} if classes == 10 else {"classes": classes}
    if isinstance(data, Dataset) and "image_size" in signature(NETWORKS[network]).parameters:
        options["image_size"] = data.train_inputs.shape[1]
    model = NETWORKS[network](rngs, **options | ({} if isinstance(data, Dataset) else {"stem": "imagenet"}))
    torch_init(model, rngs)
    model.eval()
    cold_fn, _ = bridge.functional(model)
    if warm:
        bridge.warm_up_batch_stats(model, one_pass(data, seed))
    model.eval()
    apply_fn, params = bridge.functional(model)
    batch = of_each_class(data, classes, per_class, seed)
    return Start(model, apply_fn, cold_fn, params, batch, wj.hidden_kernels(apply_fn, params, batch[0]))


def one_pass(data: TrainingData, seed: int) -> Iterator[Any]:
    """The train split in large batches of one size, for batch statistics."""
    return (data.normalise(images) for images, _ in _batches(data, seed))


def of_each_class(data: TrainingData, classes: int, count: int, seed: int) -> Batch:
    """The first so many train examples of each class, in the order of a pass that training does not make."""
    images, labels, missing = [], [], np.full(classes, count)
    for some, names in _batches(data, seed + 10_000):
        for image, label in zip(np.asarray(some), np.asarray(names), strict=True):
            if missing[label]:
                missing[label] -= 1
                images.append(image)
                labels.append(label)
        if not missing.any():
            break
    return data.normalise(np.stack(images)), jnp.asarray(labels)


def _batches(data: TrainingData, seed: int) -> Iterator[Any]:
    parts = max(1, data.num_train // WARM_UP_BATCH)
    return data.train_batches(batch_size=data.num_train // parts, seed=seed, epoch=0)
