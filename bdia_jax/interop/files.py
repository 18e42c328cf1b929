"""Hugging Face folders: config.json, and tensors in one safetensors file or several."""

import json
import reprlib
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from textwrap import shorten
from typing import Any

import ml_dtypes  # noqa: F401  gives NumPy bfloat16, which safetensors looks for
import numpy as np
from safetensors import SafetensorError, safe_open

CONFIG, TENSORS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"

_FLOATS = ("F64", "F32", "F16", "BF16")


class Tensors:
    """The tensors of a folder, read one at a time. A context manager: it keeps files open.

    Args:
        folder: holds model.safetensors, or model.safetensors.index.json and the files it names.

    Raises:
        FileNotFoundError: neither of the two, or a file the index names is not there.
        ValueError: a file that is no index, or a safetensors file that is truncated or damaged.

    Attributes:
        folder: the same.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._file_of: dict[str, Path] = {}
        self._open: dict[Path, Any] = {}
        self._stack = ExitStack()
        try:
            self._open_files()
        except BaseException:
            self._stack.close()
            raise

    @property
    def names(self) -> Iterable[str]:
        """Of all tensors."""
        return self._file_of.keys()

    def __enter__(self) -> "Tensors":
        return self

    def __exit__(self, *_) -> None:
        self._stack.close()

    def shape(self, name: str) -> tuple[int, ...]:
        """As the file's header has it; nothing is read."""
        return tuple(self._open[self._file_of[name]].get_slice(name).get_shape())

    def file(self, name: str) -> Path:
        """Where it is."""
        return self._file_of[name]

    def read(self, name: str) -> np.ndarray:
        """The tensor in float32.

        Raises:
            ValueError: it is not of floats, or one of its elements is NaN or infinite.
        """
        path = self._file_of[name]
        dtype = self._open[path].get_slice(name).get_dtype()
        if dtype not in _FLOATS:
            raise ValueError(
                f"{name} in {path} is of dtype {dtype}, expected one of {', '.join(_FLOATS)}; "
                "quantized checkpoints are to be converted to floats first"
            )
        with np.errstate(over="ignore"):  # of float64; seen below
            value = self._open[path].get_tensor(name).astype(np.float32, copy=False)
        check_finite(name, value, path)
        return value

    def _open_files(self):
        single, index = self.folder / TENSORS, self.folder / INDEX
        if single.is_file():
            self._add(single)
            return
        if not index.is_file():
            raise FileNotFoundError(
                f"{self.folder} holds neither {TENSORS} nor {INDEX}; "
                "save the model there with save_pretrained(..., safe_serialization=True)"
            )
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(
            isinstance(file, str) and _is_name(file) for file in weight_map.values()
        ):
            raise ValueError(
                f'{index} has no "weight_map" of tensor names to names of files beside it; '
                "copy the folder again"
            )
        for name in weight_map:
            _check_name(name, index)
        for file in sorted(set(weight_map.values())):
            if not (self.folder / file).is_file():
                raise FileNotFoundError(
                    f"{self.folder / file} is not there, but {INDEX} names it; "
                    "copy the missing file"
                )
            self._add(self.folder / file)
        for name, file in weight_map.items():
            if self._file_of.get(name) != self.folder / file:
                raise ValueError(f"{name} is not in {self.folder / file}, where {INDEX} says it is")

    def _add(self, path: Path):
        try:
            opened = self._stack.enter_context(safe_open(path, "numpy"))
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{path} is truncated or no safetensors file ({shorten(str(error), 200)}); "
                "copy it again"
            ) from error
        self._open[path] = opened
        for name in opened.keys():  # noqa: SIM118  no mapping
            _check_name(name, path)
            if name in self._file_of:
                raise ValueError(f"{name} is in both {self._file_of[name]} and {path}")
            self._file_of[name] = path


def _is_name(file: str) -> bool:
    """Whether it is a name alone, of nothing but what is beside the index."""
    return 0 < len(file) <= 255 and file != ".." and "\0" not in file and Path(file).name == file


def _check_name(name: str, path: Path) -> None:
    """Raises ValueError for a tensor's name that would not fit into a message."""
    if len(name) > 300 or not name.isprintable():
        raise ValueError(f"{path} has a tensor named {reprlib.repr(name)}; copy it again")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not JSON, or not an object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there; expected a Hugging Face folder")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); copy it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, expected a JSON object")
    return value


def check_finite(name: str, value: np.ndarray, where: Any) -> None:
    """Raises ValueError if an element is NaN or infinite, with its index."""
    finite = np.isfinite(value)
    if not finite.all():
        at = np.unravel_index(int(np.argmin(finite)), value.shape)
        raise ValueError(
            f"{name} in {where} has {finite.size - int(finite.sum())} elements that are NaN or "
            f"infinite, the first at {list(map(int, at))}; take an earlier checkpoint"
        )
