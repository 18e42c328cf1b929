"""Image sets: read through TFDS without TensorFlow, normalized, evaluated."""

import sys

import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits

from train.tasks.images import load_images, normalize


def test_digits_are_scikit_learns(data_dir):
    train, classes = load_images("digits", "train", data_dir)
    validation, _ = load_images("digits", "validation", data_dir)
    assert train.images.shape == (1438, 8, 8, 1) and validation.images.shape == (359, 8, 8, 1)
    assert train.images.dtype == jnp.uint8 and classes == 10
    both = np.concatenate([train.images, validation.images]).reshape(-1, 64)
    pixels, labels = load_digits(return_X_y=True)
    expected = np.round(pixels * (255 / 16)).astype(np.uint8)

    def rows(images, targets):
        return sorted(map(tuple, np.column_stack([targets, images])))

    got = rows(both, np.concatenate([train.labels, validation.labels]))
    assert got == rows(expected, labels)
    assert "tensorflow" not in sys.modules


def test_normalize_is_minus_one_to_one():
    np.testing.assert_allclose(normalize(jnp.array([0, 255], jnp.uint8)), [-1.0, 1.0])
