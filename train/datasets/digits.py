"""Handwritten digits that come with scikit-learn: real images, no download."""

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from sklearn.datasets import load_digits


class Digits(tfds.core.GeneratorBasedBuilder):
    """1,797 images of 8 x 8 pixels, 16 grey levels; every fifth one is for validation.

    Source: https://archive.ics.uci.edu/dataset/80, its test part, which comes with scikit-learn.
    Licence: CC BY 4.0.
    """

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            description=__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://archive.ics.uci.edu/dataset/80",
        )

    def _split_generators(self, dl_manager):
        del dl_manager
        pixels, labels = load_digits(return_X_y=True)
        images = np.round(pixels * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8)
        held_out = np.arange(len(images)) % 5 == 4
        return {
            "train": self._generate_examples(images[~held_out], labels[~held_out]),
            "validation": self._generate_examples(images[held_out], labels[held_out]),
        }

    def _generate_examples(self, images, labels):
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            # a PIL image is encoded without TensorFlow, an array is not
            yield index, {"image": Image.fromarray(image), "label": int(label)}
