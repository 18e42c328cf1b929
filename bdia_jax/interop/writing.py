"""A model as a Hugging Face folder."""

import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from bdia_jax.baselines import FloatBDIAStack
from bdia_jax.interop.architectures import format_of
from bdia_jax.interop.beside import copy_beside, without_code, write_json
from bdia_jax.interop.fields import COMMON, read_fields, told_of
from bdia_jax.interop.files import CONFIG, INDEX, TENSORS, check_finite, read_json
from bdia_jax.interop.layout import Entry, params_of
from bdia_jax.interop.reading import check_covered
from bdia_jax.nnx import BDIAStack


def save(
    model: nnx.Module,
    folder: str | Path,
    *,
    source: str | Path | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes a folder that transformers' `from_pretrained` and `interop.load` read.

    The network is the model at inference, gamma = 0, in float32. `load` gives the same bits
    back; others compute without the stack's fixed point, so that their logits differ by what
    rounding the states to 2^-frac_bits does.

    Args:
        model: GPT2, ViT or Llama of `bdia_jax.models`, in training mode or not.
        folder: where to; it must not exist, or be empty. It appears when it is complete: the
            files are written into a folder beside it first, which is removed if that fails.
        source: the Hugging Face folder the model came from. Fields of its config.json that do
            not describe the model (special tokens, names of classes) are taken over, and all
            files that are neither weights nor code (`copy_beside`): tokenizer, chat template,
            generation_config.json, licence. What names code ("auto_map") is not.
        max_shard_bytes: model.safetensors is split into files of at most so many bytes (a
            tensor is never split). One is in memory at a time, beside a copy of the parameters
            where they are on another device.

    Raises:
        ValueError: a folder with something in it, a model that has no Hugging Face format, whose
            stack is not the plain transformer at inference, or a parameter that is not finite.
            Fields of the source's config.json of another type than transformers takes.
        FileNotFoundError: a source without config.json.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not empty; choose another folder or remove it")
    layout = format_of(model)
    _check_stack(model.stack)  # pyright: ignore[reportAttributeAccessIssue]
    params = {path: param[...] for path, param in params_of(model).items()}
    table = layout.table(model)
    check_covered(table, params)
    inherited = {} if source is None else _read_inherited(Path(source) / CONFIG)
    config = inherited | layout.config(model, inherited) | {"dtype": "float32"}
    config.pop("torch_dtype", None)  # the older name of dtype
    _write_whole(folder, table.entries, params, config, source, max_shard_bytes)


def _read_inherited(path: Path) -> dict[str, Any]:
    config = without_code(read_json(path))
    with told_of(path):
        read_fields(config, COMMON)
    return config


def _check_stack(stack: Any) -> None:
    if not isinstance(stack, BDIAStack | FloatBDIAStack):
        raise ValueError(
            f"the stack is a {type(stack).__name__}, another network than the transformer of its "
            "blocks; only BDIAStack and FloatBDIAStack have a Hugging Face format"
        )
    gamma = getattr(stack, "inference_gamma", 0.0)
    if gamma != 0:
        raise ValueError(
            f"stack.inference_gamma is {gamma}, which the format cannot say: others compute with "
            "0; set it to 0"
        )


def _write_whole(folder: Path, entries, params, config, source, max_shard_bytes) -> None:
    """Writes all files into a folder beside `folder`, then renames that."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}.unfinished")
    unfinished.mkdir()
    try:
        write_json(unfinished / CONFIG, config)
        _write_tensors(unfinished, entries, params, max_shard_bytes)
        if source is not None:
            copy_beside(source, unfinished)
        if folder.exists():
            folder.rmdir()  # empty; not every system renames onto it
        unfinished.rename(folder)
    except BaseException:
        shutil.rmtree(unfinished)
        raise


def _write_tensors(folder: Path, entries, params, max_shard_bytes: int) -> None:
    shards = _shards(entries, params, max_shard_bytes)
    if len(shards) == 1:
        _write_shard(folder / TENSORS, shards[0], params)
        return
    weight_map, stem = {}, TENSORS.removesuffix(".safetensors")
    for index, shard in enumerate(shards):
        file = f"{stem}-{index + 1:05}-of-{len(shards):05}.safetensors"
        _write_shard(folder / file, shard, params)
        weight_map |= dict.fromkeys(shard, file)
    total = sum(4 * param.size for param in params.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(folder / INDEX, index)


def _shards(entries, params, max_shard_bytes: int) -> list[dict[str, Entry]]:
    """The tensors of each file and the entries they belong to, filled in order."""
    shards, room = [], 0
    for entry in entries:
        for name, shape in entry.shapes(params).items():
            num_bytes = 4 * math.prod(shape)
            if not shards or num_bytes > room:
                shards.append({})
                room = max_shard_bytes
            shards[-1][name] = entry
            room -= num_bytes
    return shards


def _write_shard(file: Path, shard: Mapping[str, Entry], params: Mapping[str, Any]) -> None:
    values = {}
    for entry in dict.fromkeys(shard.values()):
        for name, parts in entry.views([np.asarray(params[path]) for path in entry.paths]):
            if name in shard:
                # one alone is not copied
                value = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)
                values[name] = np.ascontiguousarray(value, np.float32)
                check_finite(name, values[name], "the model")
    save_file(values, file, metadata={"format": "pt"})  # transformers asks for it
    shutil.copymode(file.with_name(CONFIG), file)  # safetensors lets only the owner read it
