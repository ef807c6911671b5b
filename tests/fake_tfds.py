"""A TFDS directory of a few images, as `tfds build --file_format=array_record` would leave it."""

import io
import json

import numpy as np
from PIL import Image


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    file.seek(0)
    return file


def write(root, name, version, splits, *, classes, extra=()):
    """`splits`: name of the split -> (list of uint8 images, list of labels); `extra`: names of other text features."""
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordWriter

    shape = np.shape(next(iter(splits.values()))[0][0])
    fixed = all(np.shape(image) == shape for images, _ in splits.values() for image in images)
    image = tfds.features.Image(shape=shape if fixed else (None, None, 3), encoding_format="png")
    texts = {key: tfds.features.Text() for key in extra}
    features = tfds.features.FeaturesDict({
        "image": image,
        "label": tfds.features.ClassLabel(num_classes=classes),
        **texts,
    })
    folder = root / name / version
    folder.mkdir(parents=True)
    (folder / "features.json").write_text(json.dumps(features.to_json()))
    infos = []
    for split, (images, labels) in splits.items():
        writer = ArrayRecordWriter(str(folder / f"{name}-{split}.array_record-00000-of-00001"), "group_size:1")
        for number, (pixels, label) in enumerate(zip(images, labels, strict=True)):
            example = {"image": png(pixels), "label": int(label)} | dict.fromkeys(extra, f"{number}")
            writer.write(features.serialize_example(features.encode_example(example)))
        writer.close()
        infos.append({
            "name": split,
            "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
            "numBytes": "1",
            "shardLengths": [str(len(labels))],
        })
    info = {"name": name, "version": version, "fileFormat": "array_record", "splits": infos}
    (folder / "dataset_info.json").write_text(json.dumps(info))
