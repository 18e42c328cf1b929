"""CIFAR-10 and CIFAR-100 under their stock TFDS names, prepared without TensorFlow."""

import io
import pickle
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from train.datasets.builder import Example
from train.datasets.local_file import KnownFile, LocalFileBuilder


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles numpy arrays, containers, numbers and strings, and nothing that runs code."""

    _ALLOWED: ClassVar[dict[tuple[str, str], Any]] = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        # how Python 3 writes bytes for Python 2
        ("_codecs", "encode"): lambda text, _: text.encode("latin1"),
    }

    def find_class(self, module: str, name: str) -> Any:
        if name == "_reconstruct" and module.endswith("core.multiarray"):  # moved in numpy 2
            return np.zeros(0).__reduce__()[0]
        if (module, name) not in self._ALLOWED:
            raise ValueError(f"it asks for {module}.{name}, which no CIFAR file does")
        return self._ALLOWED[module, name]


def load_arrays(name: str, content: bytes) -> dict[str, Any]:
    """The dict in a CIFAR batch, safely: arrays and plain values only, keys as str.

    Raises:
        ValueError: no such pickle, or one that would run code.
    """
    try:
        batch = _ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()
        return {key.decode() if isinstance(key, bytes) else key: batch[key] for key in batch}
    except Exception as error:  # a damaged pickle may raise anything
        raise ValueError(f"{name} is not a batch of CIFAR images: {error!r}") from error


class _Layout(NamedTuple):
    """The files of each split, the file with the label names, and the labels.

    labels: TFDS feature -> (key of its labels in a batch, key of its names in meta, how many)
    """

    batches: dict[str, list[str]]
    meta: str
    labels: dict[str, tuple[str, str, int]]


class _Cifar(LocalFileBuilder, skip_registration=True):
    LAYOUT: ClassVar[_Layout]

    def features(self):
        labels = {
            feature: tfds.features.ClassLabel(num_classes=count)
            for feature, (_, _, count) in self.LAYOUT.labels.items()
        }
        for feature, names in (self.source.label_names if self.source else {}).items():
            labels[feature].names = names
        image = tfds.features.Image(shape=(32, 32, 3), encoding_format="png")
        return {"id": tfds.features.Text(), "image": image, **labels}

    @classmethod
    def parse(cls, files: dict[str, bytes]) -> dict[str, list[Example]]:
        splits = {}
        for split, batches in cls.LAYOUT.batches.items():
            found = (each for name in batches for each in cls._parse_batch(name, files[name]))
            splits[split] = [{"id": f"{split}_{n:05d}", **each} for n, each in enumerate(found)]
        return splits

    @classmethod
    def _parse_batch(cls, name: str, content: bytes) -> Iterator[dict[str, Any]]:
        batch = load_arrays(name, content)
        pixels = batch.get("data")
        if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8:
            raise ValueError(f"{name} has no uint8 array 'data'; its keys are {sorted(batch)}")
        if pixels.ndim != 2 or pixels.shape[1] != 3072:
            raise ValueError(f"{name}: 'data' has shape {pixels.shape}, expected [N, 3072]")
        labels = {}
        for feature, (key, _, count) in cls.LAYOUT.labels.items():
            labels[feature] = _list(name, batch, key)
            if len(labels[feature]) != len(pixels):
                raise ValueError(
                    f"{name} has {len(labels[feature])} {key} for {len(pixels)} images"
                )
            if not all(label in range(count) for label in labels[feature]):
                raise ValueError(f"{name}: {key} are not all in 0..{count - 1}")
        images = pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        for index, image in enumerate(images):
            yield {"image": image} | {f: int(labels[f][index]) for f in labels}

    @classmethod
    def label_names(cls, files: dict[str, bytes]) -> dict[str, list[str]]:
        file = cls.LAYOUT.meta
        meta = load_arrays(file, files[file])
        names = {}
        for feature, (_, key, count) in cls.LAYOUT.labels.items():
            found = [n.decode() if isinstance(n, bytes) else str(n) for n in _list(file, meta, key)]
            if len(set(found)) != count:
                raise ValueError(f"{file}: {key} are {found}, expected {count} different names")
            names[feature] = found
        return names


def _list(name: str, batch: dict[str, Any], key: str) -> list[Any]:
    values = batch.get(key)
    if not isinstance(values, list):
        raise ValueError(f"{name} has no list {key!r}; its keys are {sorted(batch)}")
    return values


# Not registered: the stock TFDS builder of the same name reads what these write.
class Cifar10(_Cifar, skip_registration=True):
    """CIFAR-10: 50,000 training and 10,000 test images of 32 x 32 pixels in 10 classes.

    Source: https://www.cs.toronto.edu/~kriz/cifar.html, file cifar-10-python.tar.gz (md5
    c58f30108f718f92721af3b95e74349a; the files in it are checked). Krizhevsky, "Learning
    multiple layers of features from tiny images", 2009. Licence: none stated.
    """

    VERSION = tfds.core.Version("3.0.2")
    KNOWN = KnownFile(
        url="https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
        files={
            "data_batch_1": "c99cafc152244af753f735de768cd75f",
            "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
            "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
            "data_batch_4": "634d18415352ddfa80567beed471001a",
            "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
            "test_batch": "40351d587109b95175f43aff81a1287e",
            "batches.meta": "5ff9c542aee3614f3951f8cda6e48888",
        },
        counts={"train": 50_000, "test": 10_000},
    )
    LAYOUT = _Layout(
        batches={"train": [f"data_batch_{n}" for n in range(1, 6)], "test": ["test_batch"]},
        meta="batches.meta",
        labels={"label": ("labels", "label_names", 10)},
    )


class Cifar100(_Cifar, skip_registration=True):
    """CIFAR-100: 50,000 training and 10,000 test images in 100 classes, 20 superclasses.

    Source: https://www.cs.toronto.edu/~kriz/cifar.html, file cifar-100-python.tar.gz (md5
    eb9058c3a382ffc7106e4002c42a8d85; the files in it are checked). Krizhevsky, "Learning
    multiple layers of features from tiny images", 2009. Licence: none stated.
    """

    VERSION = tfds.core.Version("3.0.2")
    KNOWN = KnownFile(
        url="https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
        files={
            "train": "16019d7e3df5f24257cddd939b257f8d",
            "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
            "meta": "7973b15100ade9c7d40fb424638fde48",
        },
        counts={"train": 50_000, "test": 10_000},
    )
    LAYOUT = _Layout(
        batches={"train": ["train"], "test": ["test"]},
        meta="meta",
        labels={
            "label": ("fine_labels", "fine_label_names", 100),
            "coarse_label": ("coarse_labels", "coarse_label_names", 20),
        },
    )
