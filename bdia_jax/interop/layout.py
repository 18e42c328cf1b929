"""Which tensor of Hugging Face is which parameter here: one table, to read and to write."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from flax import nnx


class Entry(NamedTuple):
    """One parameter of ours and the tensors that hold it.

    Attributes:
        path: of the parameter, dotted: "stack.blocks.attention.qkv.kernel".
        names: of the tensors. With "{}", the block's index, the parameter is stacked: its
            leading axis counts blocks, and each tensor is of one block. Several names are parts
            of our last axis, in this order.
        sizes: of the parts, where there are several.
        axes: the order in which a tensor has our axes (those of one block), where it is another.
    """

    path: str
    names: tuple[str, ...]
    sizes: tuple[int, ...] = ()
    axes: tuple[int, ...] = ()

    def views(self, array: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """(name, the part of `array` that the tensor of this name holds, in its shape).

        Nothing is copied, so assigning to a view reads a tensor, and taking it writes one.

        Args:
            array: the whole parameter, stacked if the entry is.
        """
        if "{}" not in self.names[0]:
            yield from self._parts(array, self.names)
            return
        for k, block in enumerate(array):
            yield from self._parts(block, tuple(name.format(k) for name in self.names))

    def _parts(self, block, names):
        ends = np.cumsum(self.sizes or block.shape[-1:])
        if len(ends) != len(names) or ends[-1] != block.shape[-1]:
            raise ValueError(
                f"{self.path} is {block.shape[-1]} wide, but the table cuts it into "
                f"{self.sizes or block.shape[-1:]} for {names}; such a model cannot be exchanged"
            )
        for name, part in zip(names, np.split(block, ends[:-1], axis=-1), strict=True):
            yield name, part.transpose(self.axes) if self.axes else part


class Table(NamedTuple):
    """All tensors of a model.

    Attributes:
        entries: one for every parameter.
        prefix: of names; a file may leave it out ("transformer." of GPT-2), as that of a model
            without a head does.
        ignored: regular expressions, from where the prefix ends, of tensors that may be in a
            file and are no parameter here: buffers, the pooler.
        tied: name -> name of the same tensor: a file may have the first too, if it is equal.
    """

    entries: tuple[Entry, ...]
    prefix: str = ""
    ignored: tuple[str, ...] = ()
    tied: Mapping[str, str] = {}


class Format(NamedTuple):
    """How an architecture is exchanged with Hugging Face folders.

    Attributes:
        model: its class here.
        arguments: config.json -> arguments of `model`. Raises ValueError for a setting that is
            not implemented, with its name and value (`check_settings` for the simple ones).
        config: (model, config.json of the source or {}) -> all fields of config.json that the
            model decides, "model_type" and "architectures" too; other fields of the source stay.
        table: of a model, which may be abstract.
    """

    model: type[nnx.Module]
    arguments: Callable[[Mapping[str, Any]], dict[str, Any]]
    config: Callable[[Any, Mapping[str, Any]], dict[str, Any]]
    table: Callable[[Any], Table]


def tensor(path: str, *names: str, sizes=(), axes=()) -> tuple[Entry, ...]:
    """A parameter alone. Args: as in `Entry`."""
    return (Entry(path, names, tuple(sizes), tuple(axes)),)


def linear(
    path: str, *names: str, sizes=(), bias: bool = True, out_first: bool = True
) -> tuple[Entry, ...]:
    """kernel (and bias) of an `nnx.Linear` from the weight (and bias) of the layers `names`.

    Args:
        path, names, sizes: as in `Entry`, without ".kernel", ".weight": "vit.layers.{}.mlp.fc1".
        bias: whether there is one.
        out_first: whether a weight is [out, in], as in torch.nn.Linear; ours are [in, out].
    """
    axes = (1, 0) if out_first else ()
    weights = [f"{name}.weight" for name in names]
    entries = tensor(f"{path}.kernel", *weights, sizes=sizes, axes=axes)
    if bias:
        entries += tensor(f"{path}.bias", *[f"{name}.bias" for name in names], sizes=sizes)
    return entries


def norm(path: str, name: str, bias: bool = True) -> tuple[Entry, ...]:
    """scale (and bias) of an `nnx.LayerNorm` or `nnx.RMSNorm` from weight (and bias)."""
    entries = tensor(f"{path}.scale", f"{name}.weight")
    return entries + (tensor(f"{path}.bias", f"{name}.bias") if bias else ())


def param_shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """Dotted path -> shape of all parameters of a model, which may be abstract."""
    flat = nnx.state(model, nnx.Param).flat_state()
    return {".".join(map(str, path)): variable.shape for path, variable in flat}


def check_settings(config: Mapping[str, Any], implemented: Mapping[str, tuple[Any, ...]]) -> None:
    """Raises ValueError for a setting that is present with a value not implemented here.

    Args:
        config: config.json.
        implemented: setting -> the values that are; an absent one has a value that is.
    """
    for name, values in implemented.items():
        if name in config and config[name] not in values:
            raise ValueError(
                f"config.json has {name} = {config[name]!r}, which is not implemented; "
                f"expected {' or '.join(map(repr, values))}"
            )
