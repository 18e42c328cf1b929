"""Which tensor of Hugging Face is which parameter here: one table, to read and to write."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from flax import nnx


class Entry(NamedTuple):
    """A tensor of theirs and the parameters of ours that it holds.

    Attributes:
        paths: of the parameters, dotted: "stack.blocks.attention.out.kernel". Several lie side by
            side along the tensor's last axis.
        name: of the tensor. With "{}", the block's index, the parameters are stacked: their
            leading axis counts blocks, and each block has a tensor.
        axes: the order in which a tensor has our axes (those of one block), where it is another.
    """

    paths: tuple[str, ...]
    name: str
    axes: tuple[int, ...] = ()

    def views(self, arrays: Sequence[np.ndarray]) -> Iterator[tuple[str, list[np.ndarray]]]:
        """(name of a tensor, its parts in their axes), in the order of `paths`.

        Nothing is copied: assigning to the parts reads a tensor, and joining them writes one.

        Args:
            arrays: the whole parameters, stacked if the entry is.
        """
        stacked = "{}" in self.name
        for k, block in enumerate(zip(*arrays, strict=True) if stacked else [arrays]):
            parts = [part.transpose(self.axes) if self.axes else part for part in block]
            yield self.name.format(k), parts

    def shapes(self, params: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Name -> shape of each tensor.

        Args:
            params: path -> parameter, which may be abstract.
        """
        stacked = "{}" in self.name
        shapes = [tuple(params[path].shape) for path in self.paths]
        parts = [shape[1:] if stacked else shape for shape in shapes]
        parts = [tuple(part[axis] for axis in self.axes) if self.axes else part for part in parts]
        shape = (*parts[0][:-1], sum(part[-1] for part in parts))
        return {self.name.format(k): shape for k in range(shapes[0][0] if stacked else 1)}


class Table(NamedTuple):
    """All tensors of a model.

    Attributes:
        entries: have every parameter once.
        prefix: of names; a file may leave it out ("transformer." of GPT-2), as that of a model
            without a head does.
        ignored: regular expressions, from where the prefix ends, of tensors that may be in a
            file and are no parameter here: buffers, the pooler.
        tied: name -> name of the same tensor: a file may have the first too, if it is equal.
        depth: the field of config.json that has the number of blocks.
    """

    entries: tuple[Entry, ...]
    prefix: str = ""
    ignored: tuple[str, ...] = ()
    tied: Mapping[str, str] = {}
    depth: str = "num_hidden_layers"


class Format(NamedTuple):
    """How an architecture is exchanged with Hugging Face folders.

    Attributes:
        model: its class here.
        arguments: config.json -> arguments of `model`. Raises ValueError for a field of a wrong
            type or range, or with a value that is not implemented, with its name and value
            (`bdia_jax.interop.fields`).
        config: (model, config.json of the source or {}) -> all fields of config.json that the
            model decides, "model_type" and "architectures" too; other fields of the source stay.
        table: of a model, which may be abstract.
    """

    model: type[nnx.Module]
    arguments: Callable[[Mapping[str, Any]], dict[str, Any]]
    config: Callable[[Any, Mapping[str, Any]], dict[str, Any]]
    table: Callable[[Any], Table]


def tensor(path: str, name: str, axes: tuple[int, ...] = ()) -> tuple[Entry, ...]:
    """A parameter that is a tensor of its own. Args: as in `Entry`."""
    return (Entry((path,), name, axes),)


def linear(path: str, name: str, bias: bool = True, out_first: bool = True) -> tuple[Entry, ...]:
    """kernel (and bias) of an `nnx.Linear` from the weight (and bias) of the layer `name`.

    Args:
        path, name: as in `Entry`, without ".kernel", ".weight": "vit.layers.{}.mlp.fc1".
        bias: whether there is one.
        out_first: whether the weight is [out, in], as in torch.nn.Linear; ours are [in, out].
    """
    entries = tensor(f"{path}.kernel", f"{name}.weight", (1, 0) if out_first else ())
    return entries + (tensor(f"{path}.bias", f"{name}.bias") if bias else ())


def norm(path: str, name: str, bias: bool = True) -> tuple[Entry, ...]:
    """scale (and bias) of an `nnx.LayerNorm` or `nnx.RMSNorm` from weight (and bias)."""
    entries = tensor(f"{path}.scale", f"{name}.weight")
    return entries + (tensor(f"{path}.bias", f"{name}.bias") if bias else ())


def params_of(model: Any) -> dict[str, nnx.Param]:
    """Dotted path -> parameter of a model, which may be abstract."""
    return {dotted(path): param for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def dotted(path: tuple[Any, ...]) -> str:
    """("stack", "blocks") -> "stack.blocks"."""
    return ".".join(map(str, path))
