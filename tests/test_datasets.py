"""Data sets from folders on disk: fakes of each layout, and the real CIFAR-10 where it is at hand."""

import sys
import tempfile

import numpy as np
import pytest
from fake_tfds import png, write
from flax import nnx
from PIL import Image

from woodjax.comparison import load_problem
from woodjax.datasets import ImageStream, Normalise, load_dataset, stream_imagenet
from woodjax.datasets.imagenet import random_resized_box
from woodjax.datasets.prepared import find_prepared, open_prepared
from woodjax.datasets.tiny_imagenet import read_tiny_imagenet
from woodjax.training import evaluate_model, fit, sgd_recipe

RNG = np.random.default_rng(0)


@pytest.fixture
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("cache")))


def pictures(count, height, width):
    return [RNG.integers(0, 256, (height, width, 3)).astype(np.uint8) for _ in range(count)]


def test_cifar100_from_a_prepared_folder(tmp_path, own_cache):
    train, test = pictures(5, 32, 32), pictures(3, 32, 32)
    splits = {"train": (train, [3, 99, 0, 7, 7]), "test": (test, [1, 2, 98])}
    write(tmp_path / "tensorflow_datasets", "cifar100", "3.0.2", splits, classes=100, extra=["id"])
    raw = load_dataset("cifar100", tmp_path, as_bytes=True)
    np.testing.assert_array_equal(raw.train_inputs, train)
    np.testing.assert_array_equal(raw.test_inputs, test)
    assert raw.train_labels.tolist() == [3, 99, 0, 7, 7]
    assert raw.test_labels.tolist() == [1, 2, 98]
    assert raw.train_inputs.dtype == np.uint8
    dataset = load_dataset("cifar100", tmp_path)  # now from the cache
    assert dataset.train_inputs.dtype == np.float32
    mean, std = np.array([0.5071, 0.4865, 0.4409]), np.array([0.2673, 0.2564, 0.2762])
    np.testing.assert_allclose(dataset.test_inputs, (np.array(test) / 255 - mean) / std, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(raw.normalise(raw.test_inputs), dataset.test_inputs, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(dataset.normalise(dataset.test_inputs), dataset.test_inputs)


def test_tiny_imagenet_from_its_folder(tmp_path, own_cache):
    root = tmp_path / "tiny-imagenet-200"
    (root / "val" / "images").mkdir(parents=True)
    (root / "wnids.txt").write_text("n02\nn01\n")
    grey = Image.fromarray(np.full((64, 64), 128, np.uint8))
    for wnid, level in (("n01", 40), ("n02", 200)):
        folder = root / "train" / wnid / "images"
        folder.mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (64, 64), (level, number, 0)).save(folder / f"{wnid}_{number}.JPEG", quality=95)
    Image.new("RGB", (64, 64), (200, 0, 0)).save(root / "val" / "images" / "val_0.JPEG", quality=95)
    grey.save(root / "val" / "images" / "val_1.JPEG", quality=95)
    (root / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn02\t0\t0\t9\t9\nval_1.JPEG\tn01\t0\t0\t9\t9\n")
    data = load_dataset("tiny-imagenet", tmp_path, as_bytes=True)
    assert data.train_inputs.shape == (4, 64, 64, 3)
    assert data.train_labels.tolist() == [0, 0, 1, 1]
    np.testing.assert_allclose(data.train_inputs[:, 0, 0, 0].astype(int), [40, 40, 200, 200], atol=3)
    assert data.test_labels.tolist() == [1, 0]
    np.testing.assert_allclose(data.test_inputs[1].astype(int), 128, atol=1)

    (root / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn77\t0\t0\t9\t9\n")
    with pytest.raises(ValueError, match=r"'val_0\.JPEG' of class 'n77'"):
        read_tiny_imagenet(root)


def test_what_is_missing_comes_with_the_command_that_prepares_it(tmp_path, monkeypatch):
    with pytest.raises(
        FileNotFoundError, match=f"tfds build cifar100 --file_format=array_record --data_dir={tmp_path}"
    ):
        load_dataset("cifar100", tmp_path)
    with pytest.raises(FileNotFoundError, match="unzip -q tiny-imagenet-200"):
        load_dataset("tiny-imagenet", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"tfds build imagenet2012 .* --manual_dir"):
        stream_imagenet(tmp_path)
    monkeypatch.delenv("WOODJAX_DATA_DIR", raising=False)
    with pytest.raises(ValueError, match="WOODJAX_DATA_DIR"):
        stream_imagenet()
    with pytest.raises(ValueError, match="ImageNet is streamed"):
        load_dataset("imagenet2012")
    with pytest.raises(ValueError, match="No network here fits 'cifar100'"):
        load_problem("cifar100")


def test_boxes_fit_and_are_of_the_ratio_and_area_that_they_should_be():
    rng = np.random.default_rng(0)
    boxes = np.array([random_resized_box(400, 300, rng) for _ in range(2000)])
    left, upper, right, lower = boxes.T
    assert (left >= 0).all()
    assert (upper >= 0).all()
    assert (right <= 400).all()
    assert (lower <= 300).all()
    area = (right - left) * (lower - upper) / 120_000
    ratio = (right - left) / (lower - upper)
    assert 0.078 < area.min() < 0.1
    assert 0.9 < area.max() <= 1
    assert 0.74 < ratio.min() < ratio.max() < 1.35
    assert random_resized_box(1000, 10, rng) == (493, 0, 506, 10)  # nothing of 8 % fits: 4/3, in the middle
    assert random_resized_box(10, 1000, rng) == (0, 493, 10, 506)


def encoded(images, labels):
    return [{"image": png(image).read(), "label": label} for image, label in zip(images, labels, strict=True)]


def test_a_stream_is_a_function_of_seed_and_epoch():
    pytest.importorskip("grain")
    shades = [np.full((20 + i, 30, 3), 20 * i, np.uint8) for i in range(11)]
    stream = ImageStream("shades", encoded(shades, range(11)), encoded(shades[:3], range(3)), size=8)
    epochs = [list(stream.train_batches(batch_size=4, seed=1, epoch=epoch)) for epoch in (0, 0, 1)]
    for images, labels in epochs[0]:
        assert images.shape == (4, 8, 8, 3)
        assert images.dtype == np.uint8
        np.testing.assert_array_equal(images, np.broadcast_to(20 * labels[:, None, None, None], images.shape))
    assert len(epochs[0]) == 2
    labels = [np.concatenate([labels for _, labels in batches]) for batches in epochs]
    assert len(set(labels[0])) == 8
    np.testing.assert_array_equal(labels[0], labels[1])
    assert (labels[0] != labels[2]).any()
    other = next(stream.train_batches(batch_size=8, seed=2, epoch=0))
    assert (other[1] != labels[0]).any()


def test_crops_and_flips_of_a_stream_are_drawn_anew_in_each_epoch():
    pytest.importorskip("grain")
    columns = np.tile(np.arange(0, 200, 2, dtype=np.uint8)[None, :, None], (60, 1, 3))  # brighter to the right
    stream = ImageStream("columns", encoded([columns] * 32, range(32)), [], size=16)
    once, again, later = (
        next(stream.train_batches(batch_size=32, seed=0, epoch=epoch))[0].astype(int) for epoch in (0, 0, 1)
    )
    np.testing.assert_array_equal(once, again)
    assert (once != later).any()
    slopes = (once[:, 8, -1, 0] - once[:, 8, 0, 0]) / 2
    flipped = (slopes < 0).sum()
    assert 6 <= flipped <= 26
    assert np.ptp(np.abs(slopes)) > 10  # boxes of many widths


def test_the_centre_of_a_test_image(tmp_path):
    pytest.importorskip("grain")
    image = np.zeros((64, 96, 3), np.uint8)
    image[4:60, 20:76] = 200  # the centre 56 of 64
    splits = {"train": ([image], [0]), "validation": ([image, image[:, :64]], [5, 6])}
    write(tmp_path, "imagenet2012", "5.1.0", splits, classes=1000, extra=["file_name"])
    stream = stream_imagenet(tmp_path, size=56, workers=0)
    assert stream.num_train == 1
    images, labels = next(stream.test_batches(2))
    np.testing.assert_array_equal(images[0], np.full((56, 56, 3), 200))
    assert labels.tolist() == [5, 6]
    assert [len(labels) for _, labels in stream.test_batches(1)] == [1, 1]


class Mean(nnx.Module):
    def __init__(self):
        self.out = nnx.Linear(3, 2, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.out(x.mean((1, 2)))


def test_a_stream_trains():
    pytest.importorskip("grain")
    shades = [np.full((20, 30, 3), 200 * (i % 2), np.uint8) for i in range(12)]
    examples = encoded(shades, [i % 2 for i in range(12)])
    stream = ImageStream("two shades", examples, examples[:4], size=8, normalise=Normalise((0.4,), (0.4,)))
    model = Mean()
    fit(model, stream, epochs=4, optimizer=sgd_recipe(0.5, steps=12), seed=0, batch_size=4)
    assert evaluate_model(model, stream) == 1
    with pytest.raises(ValueError, match="size=0"):
        ImageStream("none", [], [], size=0)


def test_grain_is_asked_for_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "grain", None)
    with pytest.raises(ImportError, match=r"woodjax\[imagenet\]"):
        ImageStream("none", [], [])


def test_cifar10(data_dir):
    source = open_prepared("cifar10", "test", find_prepared("cifar10", data_dir))
    assert len(source) == 10_000
    records = [source[i] for i in range(0, 10_000, 50)]
    assert {record["image"].shape for record in records} == {(32, 32, 3)}
    assert {int(record["label"]) for record in records} == set(range(10))
