"""CIFAR-10 and CIFAR-100 under their stock TFDS names, prepared without TensorFlow."""

import io
import pickle
import re
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from train.datasets.builder import Example
from train.datasets.local_file import KnownFile, LocalFileBuilder


class _Made:
    """What a pickle wants to have called, with its arguments and state. Nothing is called."""

    def __init__(self, name: Any, arguments: Any):
        self.name, self.arguments = name, arguments
        self.state: Any = None


_Unpickler: Any = vars(pickle)["_Unpickler"]  # the one in Python, an opcode a method


class _Reader(_Unpickler):
    """Reads numbers, strings, lists, tuples and dicts with names; calls and imports nothing.

    Python's own reader of an opcode is taken for those that a CIFAR file has. The others, among
    them all that take memory by a number in the file, are refused.
    """

    _OPCODES = (
        b"\x80 \x95 . ( 0 } ] ) \x85 \x86 \x87 t e a N \x88 \x89 K M J \x8a "
        b"U T X \x8c B C \x8e c \x93 q r h j \x94"
    )
    dispatch: ClassVar[dict[int, Any]] = {
        opcode[0]: _Unpickler.dispatch[opcode[0]] for opcode in _OPCODES.split(b" ")
    }

    def find_class(self, module: str, name: str) -> Any:
        return f"{module}.{name}"[:100]

    def _reduce(self) -> None:
        arguments = self.stack.pop()
        name = self.stack[-1]
        if name == "_codecs.encode":  # how Python 3 writes bytes for Python 2
            self.stack[-1] = arguments[0].encode("latin1")
        else:
            self.stack[-1] = _Made(name, arguments)

    def _build(self) -> None:
        state = self.stack.pop()
        if not isinstance(self.stack[-1], _Made):
            raise ValueError("a state without an object")
        self.stack[-1].state = state

    def _set_items(self) -> None:
        items = self.pop_mark()
        _set(self.stack[-1], items)

    def _set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        _set(self.stack[-1], [key, value])

    dispatch |= {b"R"[0]: _reduce, b"b"[0]: _build, b"u"[0]: _set_items, b"s"[0]: _set_item}


def _set(target: Any, items: list[Any]) -> None:
    for key, value in zip(items[::2], items[1::2], strict=True):
        # the hash of a tuple of tuples of .. takes for ever
        if not (isinstance(target, dict) and isinstance(key, str | bytes)):
            raise ValueError("a key that is no string")
        target[key.decode() if isinstance(key, bytes) else key] = value


def load_arrays(name: str, content: bytes) -> dict[str, Any]:
    """The dict in a CIFAR batch, without running anything that it asks for.

    Returns:
        Keys as str; a list as it is; an array as uint8 [N, 3072].

    Raises:
        ValueError: no such pickle.
    """
    try:
        batch = _Reader(io.BytesIO(content), encoding="bytes").load()
        if not isinstance(batch, dict):
            raise TypeError(f"a {type(batch).__name__}, expected a dict")
        return {k: _array(v) if isinstance(v, _Made) else v for k, v in batch.items()}
    except Exception as error:  # a damaged pickle may raise anything
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        raise ValueError(f"{name} is not a batch of CIFAR images ({reason})") from error


def _array(made: _Made) -> np.ndarray:
    # numpy.core.multiarray, which numpy 2 calls numpy._core.multiarray
    if not re.fullmatch(r"numpy\._?core\.multiarray\._reconstruct", str(made.name)[:100]):
        raise ValueError(f"it asks for {str(made.name)[:100]}, which no CIFAR file does")
    _, shape, dtype, in_columns, data = made.state
    if dtype.name != "numpy.dtype" or dtype.arguments[0] not in ("u1", b"u1"):
        raise ValueError("an array that is not of dtype uint8")
    rows, columns = shape
    if columns != 3072 or not isinstance(data, bytes) or len(data) != rows * columns:
        raise ValueError(f"an array of {len(data)} bytes, expected shape [N, 3072]")
    return np.frombuffer(data, np.uint8).reshape(rows, columns, order="F" if in_columns else "C")


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
        if not isinstance(pixels, np.ndarray):
            raise ValueError(f"{name} has no array 'data'; its keys are {_keys(batch)}")
        labels = {}
        for feature, (key, _, count) in cls.LAYOUT.labels.items():
            labels[feature] = _list(name, batch, key)
            if len(labels[feature]) != len(pixels):
                raise ValueError(
                    f"{name} has {len(labels[feature])} {key} for {len(pixels)} images"
                )
            if not all(type(each) is int and 0 <= each < count for each in labels[feature]):
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
            listed = _list(file, meta, key)
            found = [n.decode("utf-8", "replace") if isinstance(n, bytes) else n for n in listed]
            if not all(isinstance(n, str) for n in found) or len(set(found)) != count:
                raise ValueError(
                    f"{file}: {key} has {len(found)} entries, expected {count} different names"
                )
            names[feature] = found
        return names


def _list(name: str, batch: dict[str, Any], key: str) -> list[Any]:
    values = batch.get(key)
    if not isinstance(values, list):
        raise ValueError(f"{name} has no list {key!r}; its keys are {_keys(batch)}")
    return values


def _keys(batch: dict[str, Any]) -> str:
    return ", ".join(sorted(batch))[:200]


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
