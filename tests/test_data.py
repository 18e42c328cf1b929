"""Data: TFDS sets read without TensorFlow, batches by step number, augmentation."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds
from sklearn.datasets import load_digits

from train.data import augment, batch_indices, load_images, normalize


def test_digits_are_scikit_learns(tmp_path):
    train = load_images("digits", "train", str(tmp_path))
    validation = load_images("digits", "validation", str(tmp_path))
    assert train.images.shape == (1438, 8, 8, 1) and validation.images.shape == (359, 8, 8, 1)
    assert train.images.dtype == jnp.uint8 and train.num_classes == 10
    both = np.concatenate([train.images, validation.images]).reshape(-1, 64)
    pixels, labels = load_digits(return_X_y=True)
    expected = np.round(pixels * (255 / 16)).astype(np.uint8)

    def rows(images, targets):
        return sorted(map(tuple, np.column_stack([targets, images])))

    got = rows(both, np.concatenate([train.labels, validation.labels]))
    assert got == rows(expected, labels)
    assert "tensorflow" not in sys.modules


def test_slices_and_bad_names(tmp_path):
    assert len(load_images("digits", "train[:10%]", str(tmp_path)).images) == 144
    with pytest.raises(ValueError, match=r"no split 'test'; it has train, validation"):
        load_images("digits", "test", str(tmp_path))
    with pytest.raises(ValueError, match="dataset is 'no_such_set'"):
        load_images("no_such_set", "train", str(tmp_path))


def test_unprepared_set_names_the_command(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tfds build cifar100 --file_format=array_record"):
        load_images("cifar100", "train", str(tmp_path))


def test_every_epoch_sees_every_example_once():
    key = jax.random.key(0)
    batches = [batch_indices(key, jnp.int32(step), 20, 5) for step in range(8)]
    first, second = np.concatenate(batches[:4]), np.concatenate(batches[4:])
    assert sorted(first) == sorted(second) == list(range(20))
    assert list(first) != list(second)


def test_incomplete_batch_is_left_out():
    key = jax.random.key(0)
    epoch = np.concatenate([batch_indices(key, jnp.int32(step), 11, 4) for step in range(2)])
    assert len(set(epoch.tolist())) == 8
    assert sorted(batch_indices(key, jnp.int32(2), 11, 4)) != sorted(epoch[:4])


def test_augment_shifts_and_mirrors():
    image = np.arange(1, 65, dtype=np.uint8).reshape(1, 8, 8, 1)
    images = jnp.asarray(np.repeat(image, 256, 0))
    same = augment(jax.random.key(0), images, 0, False)
    assert (same == images).all()
    mirrored = np.asarray(augment(jax.random.key(0), images, 0, True))
    kinds = {m.tobytes() for m in mirrored}
    assert kinds == {image[0].tobytes(), image[0][:, ::-1].tobytes()}
    cropped = np.asarray(augment(jax.random.key(0), images, 1, False))
    padded = np.pad(image[0], ((1, 1), (1, 1), (0, 0)))
    windows = {padded[i : i + 8, j : j + 8].tobytes() for i in range(3) for j in range(3)}
    assert {c.tobytes() for c in cropped} == windows


def test_normalize_range():
    assert normalize(jnp.array([0, 255], jnp.uint8)).tolist() == [-1.0, 1.0]


class Mosaic(tfds.core.GeneratorBasedBuilder):
    """A set with CIFAR's features, made up."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(32, 32, 3), encoding_format="png"),
            "label": tfds.features.ClassLabel(num_classes=10),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        from PIL import Image

        rng = np.random.default_rng(0)
        for index in range(12):
            image = Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8))
            yield index, {"image": image, "label": index % 10}


def test_any_prepared_tfds_set_is_read(tmp_path):
    Mosaic(data_dir=str(tmp_path), file_format="array_record").download_and_prepare()
    data = load_images("mosaic", "train", str(tmp_path))
    assert data.images.shape == (12, 32, 32, 3) and data.num_classes == 10
    assert sorted(data.labels.tolist()) == [0, 0, 1, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    images = {np.asarray(image).tobytes() for image in data.images}
    rng = np.random.default_rng(0)
    assert images == {rng.integers(0, 256, (32, 32, 3), np.uint8).tobytes() for _ in range(12)}
