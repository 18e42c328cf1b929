"""Parameters of a model from a Hugging Face folder."""

import re
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from bdia_jax.fixed_point import FixedPoint
from bdia_jax.interop.architectures import format_of, read_architecture
from bdia_jax.interop.files import Tensors
from bdia_jax.interop.layout import Table, dotted, params_of
from bdia_jax.nnx import BDIAStack

# |gamma| at which a network trained without one still is what it was
CHECKPOINT_GAMMA = 2.0**-4
_STACK = partial(BDIAStack, magnitude=CHECKPOINT_GAMMA, fixed_point=FixedPoint(gamma_bits=4))


def load(folder: str | Path, *, rngs: nnx.Rngs, keep: Iterable[str] = (), **overrides) -> Any:
    """The model of a Hugging Face folder, in training mode.

    Args:
        folder: config.json with model.safetensors, or with its index and shards.
        rngs: seeds dropout and gamma, and initializes what `keep` names.
        keep: as in `read_params`.
        **overrides: arguments of the model in place of what config.json says, and those it does
            not know: `stack`, `dtype`, `dropout_rate`, `num_classes`. The stack is a `BDIAStack` by
            default, with |gamma| = `CHECKPOINT_GAMMA` in training: the usual 1/2 takes blocks apart
            that never saw one (docs/gamma.md).

    Returns:
        GPT2, ViT or Llama of `bdia_jax.models`.

    Raises:
        ValueError, FileNotFoundError: as `read_architecture` and `read_params`.

    Example:
        model = interop.load("gpt2-medium", rngs=nnx.Rngs(0))
        images = interop.load("vit-base", rngs=nnx.Rngs(0), num_classes=10, keep=("head",))
    """
    architecture = read_architecture(folder)
    arguments = {"stack": _STACK} | architecture.arguments | overrides
    build: Any = architecture.model
    make = lambda rngs: build(**arguments, rngs=rngs)  # noqa: E731
    abstract = nnx.eval_shape(make, rngs)
    params = read_params(folder, abstract, keep)
    read = {path for path, _ in nnx.to_flat_state(params)}
    # compiled, what is not asked for is not computed: no second set of parameters
    rest = nnx.jit(lambda rngs: nnx.state(make(rngs), lambda path, _: path not in read))(rngs)
    return nnx.merge(nnx.graphdef(abstract), params, rest)


def read_params(folder: str | Path, model: Any, keep: Iterable[str] = ()) -> nnx.State:
    """The parameters of a folder, for `nnx.update(model, ...)` or `nnx.merge`.

    Names and shapes of all tensors are checked before the first is read; then one is read at a
    time, into place, so that no more than one tensor of all blocks is held twice.

    Args:
        folder: as in `load`.
        model: the parameters' shapes and dtypes; it may be abstract (`nnx.eval_shape`).
        keep: dotted paths, of parameters or of modules with all parameters in them, that are not
            to be read: ("head",) for another number of classes.

    Raises:
        FileNotFoundError: no tensors, or a shard is missing.
        ValueError: a model that cannot be exchanged; a truncated file; a tensor that is missing,
            of another shape, not finite, or not for this model. With its name and file.
    """
    table = format_of(model).table(model)
    params = params_of(model)
    check_covered(table, params)
    kept = _kept(params, keep)
    entries = [entry for entry in table.entries if not kept.issuperset(entry.paths)]
    read: dict[str, Any] = {}
    with Tensors(folder) as tensors:
        found = _find(table, tensors)
        _check_names_and_shapes(table, params, entries, tensors, found)
        _check_tied(table, tensors, found)
        for entry in entries:
            arrays = [np.empty(params[path].shape, params[path].dtype) for path in entry.paths]
            for name, parts in entry.views(arrays):
                ends = np.cumsum([part.shape[-1] for part in parts])
                values = np.split(tensors.read(found[name]), ends[:-1], axis=-1)
                for part, value in zip(parts, values, strict=True):
                    part[...] = value
            read |= zip(entry.paths, map(jnp.asarray, arrays), strict=True)
    return nnx.from_flat_state(
        (path, param.replace(read[dotted(path)]))
        for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param))
        if dotted(path) in read.keys() - kept
    )


def check_covered(table: Table, paths: Iterable[str]) -> None:
    """Raises ValueError unless the table is of just these parameters."""
    difference = sorted({path for entry in table.entries for path in entry.paths} ^ set(paths))
    if difference:
        raise ValueError(
            f"{', '.join(difference)}: parameters of the model or of its Hugging Face format, but "
            "not of both; merge adapters first, and take the standard attention and MLP"
        )


def _kept(paths: Iterable[str], keep: Iterable[str]) -> set[str]:
    kept = set()
    for prefix in keep:
        below = {path for path in paths if f"{path}.".startswith(f"{prefix}.")}
        if not below:
            raise ValueError(
                f"keep has {prefix!r}, where the model has no parameter; it has {', '.join(paths)}"
            )
        kept |= below
    return kept


def _find(table: Table, tensors: Tensors) -> dict[str, str]:
    """Name in the format -> name in the folder, for all tensors there but those to ignore."""
    names = {entry.name for entry in table.entries} | set(table.tied)
    roots = {name.split(".")[0] for name in names}
    found = {}
    for name in tensors.names:
        if any(re.fullmatch(ignored, name.removeprefix(table.prefix)) for ignored in table.ignored):
            continue
        full = name if name.split(".")[0] in roots else table.prefix + name
        if full in found:
            raise ValueError(
                f"{name} in {tensors.file(name)} is there as {found[full]} too; remove one"
            )
        found[full] = name
    for second, first in table.tied.items():
        if first not in found and second in found:
            found[first] = found.pop(second)
    return found


def _check_names_and_shapes(table, params, read, tensors: Tensors, found) -> None:
    """Raises ValueError for a tensor that is missing, unexpected or of another shape."""
    known = set(table.tied)
    _check_depth(table, params, read, tensors, found)
    for entry in table.entries:
        shapes = entry.shapes(params)
        known |= shapes.keys()
        ours = ", ".join(entry.paths)
        for name, shape in shapes.items() if entry in read else ():
            if name not in found:
                raise ValueError(
                    f"{name} is missing in {tensors.folder}; take a complete checkpoint of this "
                    f"architecture, or leave {ours} as initialized: keep={entry.paths}"
                )
            actual = tensors.shape(found[name])
            if actual != shape:
                raise ValueError(
                    f"{found[name]} in {tensors.file(found[name])} has shape {list(actual)}, but "
                    f"{list(shape)} would fit {ours} of the model; build the model that "
                    "config.json describes (interop.read_architecture), or leave this as "
                    f"initialized: keep={entry.paths}"
                )
    for full, name in found.items():
        if full not in known:
            raise ValueError(
                f"{name} in {tensors.file(name)} is no tensor of this model; does config.json "
                "belong to it, and is the model as deep as it says?"
            )


def _check_depth(table: Table, params, read, tensors: Tensors, found) -> None:
    """Raises ValueError for more blocks than the files have, before each of them is looked for."""
    for entry in read:
        before, is_stacked, _ = entry.name.partition("{}")
        if not is_stacked:
            continue
        there = {name[len(before) :].split(".")[0] for name in found if name.startswith(before)}
        depth = params[entry.paths[0]].shape[0]
        if depth > len(there):
            first = next(k for k in range(depth) if str(k) not in there)
            raise ValueError(
                f"{entry.name.format(first)} is missing in {tensors.folder}: the model has {depth} "
                f"blocks, the files {len(there)}; take a complete checkpoint, or correct "
                f"{table.depth} in config.json"
            )
        return  # the entries of a block are as many


def _check_tied(table: Table, tensors: Tensors, found: dict[str, str]) -> None:
    """Raises ValueError for a second tensor that is not the first; both may be read."""
    for second, first in table.tied.items():
        if second in found and not np.array_equal(
            tensors.read(found[second]), tensors.read(found[first])
        ):
            raise ValueError(
                f"{second} in {tensors.file(found[second])} is not equal to {first}: an untied "
                "output projection, which this model has not; take a checkpoint with tied ones"
            )
