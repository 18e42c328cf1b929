"""Handwritten digits that come with scikit-learn: real images, no download."""

import numpy as np
import tensorflow_datasets as tfds
from sklearn.datasets import load_digits

from train.datasets.builder import Builder


class Digits(Builder):
    """1,797 images of 8 x 8 pixels, 16 grey levels; every fifth one is for validation.

    Source: https://archive.ics.uci.edu/dataset/80, its test part, which comes with scikit-learn.
    Licence: CC BY 4.0.
    """

    VERSION = tfds.core.Version("1.0.0")

    def features(self):
        return {
            "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
            "label": tfds.features.ClassLabel(num_classes=10),
        }

    def homepage(self) -> str:
        return "https://archive.ics.uci.edu/dataset/80"

    def examples(self):
        pixels, labels = load_digits(return_X_y=True)
        images = np.round(pixels * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8)
        held_out = np.arange(len(images)) % 5 == 4
        return {
            split: (
                (index, {"image": image, "label": int(label)})
                for index, (image, label) in enumerate(zip(images[of], labels[of], strict=True))
            )
            for split, of in {"train": ~held_out, "validation": held_out}.items()
        }
