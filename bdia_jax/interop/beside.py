"""What a Hugging Face folder holds beside its model: tokenizer, chat template, licence, ..."""

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bdia_jax.interop.files import CONFIG, read_json

_WEIGHTS = (
    "safetensors|bin|pt|pth|ckpt|h5|keras|msgpack|gguf|ggml|onnx|onnx_data|npz|npy|ot|pkl|pickle|"
    "joblib|tflite|pb|mlmodel|pdparams|nemo|zip|tar|gz|7z|index\\.json"
)
_CODE = "py|pyc|pyi|pyd|ipynb|sh|bat|ps1|exe|so|dll|dylib|js|jar|wasm"
_LEFT_BEHIND = re.compile(rf"\..*|.*\.({_WEIGHTS}|{_CODE})", re.IGNORECASE | re.DOTALL)
_NOT_BESIDE = (CONFIG, "adapter_config.json")  # transformers would look for the adapter
_TEMPLATES = "additional_chat_templates"  # a folder of transformers, for a tokenizer with several
_MOST_BYTES = 200 * 10**6  # what is larger are weights of another name
# Fields that name code, which is left behind; and how weights are packed that are floats now.
_NO_FIELDS = ("auto_map", "custom_pipelines", "quantization_config")


def copy_beside(source: str | Path, folder: str | Path) -> None:
    """Copies what is neither weights nor code, nor config.json.

    Weights and code are known by their names; a file of more than 200 MB counts as weights, and
    one whose name begins with a dot is left behind, too. Links are followed. Fields that name
    code ("auto_map") are taken out of tokenizer_config.json and its like.

    Args:
        source: a Hugging Face folder.
        folder: is there; files of the same names are replaced.

    Raises:
        ValueError: a file whose name ends in _config.json is no JSON.
    """
    for path in _beside(Path(source)):
        to = Path(folder) / path.relative_to(source)
        to.parent.mkdir(exist_ok=True)
        if path.name.endswith("_config.json") and without_code(value := read_json(path)) != value:
            write_json(to, without_code(value))
        else:
            shutil.copyfile(path, to)


def without_code(config: Mapping[str, Any]) -> dict[str, Any]:
    """Without the fields that name code, or say how weights were packed."""
    return {name: value for name, value in config.items() if name not in _NO_FIELDS}


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _beside(source: Path) -> Iterator[Path]:
    for path in (*source.iterdir(), *(source / _TEMPLATES).glob("*")):
        if path.name in _NOT_BESIDE or _LEFT_BEHIND.fullmatch(path.name) or not path.is_file():
            continue
        if path.stat().st_size <= _MOST_BYTES:
            yield path
