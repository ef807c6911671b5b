"""Random crops and flips, against windows cut by NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from woodjax.datasets import augment


def windows(image, padding):
    """Every crop of the padded image, and every flip of one: `[2, 2·padding + 1, 2·padding + 1, h, w, c]`."""
    height, width, _ = image.shape
    padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)))
    shifts = range(2 * padding + 1)
    crops = np.array([[padded[y : y + height, x : x + width] for x in shifts] for y in shifts])
    return np.stack([crops, crops[..., ::-1, :]])


def positions(key, images, padding, flip=True):
    """Of each output: which flip, row and column it is."""
    outputs = augment(key, images, padding=padding, flip=flip)
    assert outputs.shape == images.shape
    assert outputs.dtype == images.dtype
    found = []
    for image, output in zip(np.asarray(images), np.asarray(outputs), strict=True):
        same = (windows(image, padding) == output).all((-3, -2, -1))
        assert same.sum() == 1  # random pixels: no window is like another
        found.append(np.argwhere(same)[0])
    return np.array(found)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, jnp.bfloat16])
@given(seed=st.integers(0, 2**31 - 1))
def test_every_output_is_a_window_of_the_padded_image(seed, dtype):
    rng = np.random.default_rng(seed)
    images = jnp.asarray(rng.integers(1, 256, (8, 6, 5, 3)), dtype)
    positions(jax.random.key(seed), images, 2)


def test_windows_and_flips_are_equally_likely_and_independent():
    image = np.random.default_rng(0).integers(1, 256, (6, 5, 3)).astype(np.uint8)
    found = positions(jax.random.key(0), jnp.asarray(np.tile(image, (5000, 1, 1, 1))), 1)
    counts = np.zeros((2, 3, 3))
    np.add.at(counts, tuple(found.T), 1)
    expected = 5000 / 18
    assert ((counts - expected) ** 2 / expected).sum() < 40.8  # χ² with 17 degrees of freedom: 1 in 1,000


def test_the_key_decides_and_options_are_kept():
    images = jnp.asarray(np.random.default_rng(1).integers(1, 256, (16, 6, 5, 3)), jnp.uint8)
    once, again = augment(jax.random.key(3), images, padding=2), augment(jax.random.key(3), images, padding=2)
    inside = jax.jit(lambda key, x: augment(key, x, padding=2))(jax.random.key(3), images)
    np.testing.assert_array_equal(once, again)
    np.testing.assert_array_equal(once, inside)
    assert (np.asarray(once) != np.asarray(augment(jax.random.key(4), images, padding=2))).any()
    np.testing.assert_array_equal(augment(jax.random.key(3), images, padding=0, flip=False), images)
    assert not positions(jax.random.key(3), images, 2, flip=False)[:, 0].any()


def test_bad_shapes_are_refused():
    with pytest.raises(ValueError, match="padding=-1"):
        augment(jax.random.key(0), jnp.ones((1, 2, 2, 1)), padding=-1)
    with pytest.raises(ValueError, match=r"shape \(2, 2, 1\)"):
        augment(jax.random.key(0), jnp.ones((2, 2, 1)))
