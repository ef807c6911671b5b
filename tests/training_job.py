"""A training under masks that is killed in its third epoch: `python training_job.py FOLDER`."""

import os
import signal
import sys

import jax
import numpy as np
from flax import nnx

import woodjax as wj
from woodjax.adapters.nnx import functional
from woodjax.datasets import Dataset, Normalise, augment
from woodjax.training import fit, sgd_recipe

EPOCHS = 4
SETTINGS = {"optimizer": sgd_recipe(0.05, steps=8), "seed": 7, "batch_size": 16, "augment": augment}


class SmallNet(nnx.Module):
    """Batch statistics and random numbers: all that a checkpoint has to hold."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.drop = nnx.Dropout(0.2, rngs=rngs)
        self.out = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        return self.out(self.drop(nnx.relu(self.norm(self.conv(x)))).mean((1, 2)))


def network(seed):
    return SmallNet(nnx.Rngs(seed))


class Killing(Dataset):
    """Data that ends the process in the third epoch."""

    def train_batches(self, **options):
        for number, batch in enumerate(super().train_batches(**options)):
            if (options["epoch"], number) == (2, 1):
                os.kill(os.getpid(), signal.SIGKILL)
            yield batch

    def on_device(self):
        return self


def data(kind=Dataset):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (60, 8, 8, 3), np.uint8), rng.integers(0, 3, 60).astype(np.int32)
    return kind("noise", images[:41], labels[:41], images[41:], labels[41:], Normalise((0.5,), (0.3,)))


if __name__ == "__main__":
    model = network(0)
    masks = wj.make_masks(wj.magnitude_scores(functional(model)[1]), 0.5)
    jax.block_until_ready(masks)
    fit(model, data(Killing), epochs=EPOCHS, masks=masks, checkpoint_dir=sys.argv[1], **SETTINGS)
