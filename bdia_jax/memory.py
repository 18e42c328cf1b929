"""memory_report and residual_bytes: what a function needs in memory, known before it runs."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bdia_jax.compiled import targets

_MIB = 2**20


@dataclasses.dataclass(frozen=True)
class MemoryReport:
    """Bytes of one compiled program on one device, as the compiler has planned them.

    Attributes:
        arguments: parameters, optimizer state, batch.
        outputs: everything returned.
        aliased: the part of the outputs that is written over donated arguments.
        temporaries: all else: activations, residuals, gradients that are not returned, work
            space of kernels. This is what `backprop` changes.

    `report - other` is the difference, attribute by attribute.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int

    @property
    def total(self) -> int:
        """What the device must have: arguments + outputs - aliased + temporaries."""
        return self.arguments + self.outputs - self.aliased + self.temporaries

    def __sub__(self, other: "MemoryReport") -> "MemoryReport":
        names = [field.name for field in dataclasses.fields(self)]
        return MemoryReport(**{name: getattr(self, name) - getattr(other, name) for name in names})

    def __str__(self) -> str:
        rows = [
            ("arguments", self.arguments),
            ("outputs", self.outputs),
            ("aliased", -self.aliased),
            ("temporaries", self.temporaries),
            ("total", self.total),
        ]
        return "\n".join(f"{name:11s} {size / _MIB:10,.2f} MiB" for name, size in rows)


def memory_report(
    fn: Callable[..., Any], *args: Any, device: str | None = None, **kwargs: Any
) -> MemoryReport:
    """What fn(*args, **kwargs) needs in memory. Compiles it and runs nothing.

    Args:
        fn: a training step, a gradient, any function of arrays. One made by `jax.jit` or
            `nnx.jit` is taken as it is, with its donated and static arguments; another is
            compiled by `nnx.jit`, which returns the state of modules too. A program lowered
            or compiled already (`jax.stages.Lowered`, `jax.stages.Compiled`) goes without args.
        *args, **kwargs: arrays, `jax.ShapeDtypeStruct`s (so nothing has to exist, see
            `jax.eval_shape`), NNX modules, or pytrees of them.
        device: None for the one at hand; or a GPU that need not be there, "h100" or another of
            `bdia_jax.compiled.targets`, for which XLA compiles it. That takes the extra `gpu-plan`.

    Returns:
        A `MemoryReport`; print it. If the program is sharded, it is that of one device.

    Raises:
        ValueError: arguments, or a device, for a lowered or compiled program; a backend that
            reports nothing; an unknown device, or none that can be compiled for here.

    Example:
        >>> step = jax.jit(lambda w, x: (w - 0.1 * x.sum(), x @ w), donate_argnums=0)
        >>> w, x = jnp.ones((64, 64)), jax.ShapeDtypeStruct((8, 64), jnp.float32)
        >>> report = memory_report(step, w, x)
        >>> report.arguments, report.outputs >= 18432, report.aliased
        (18432, True, 16384)
    """
    if device is not None:
        return memory_report(_compiled_for(device, fn, args, kwargs))
    program: Any = fn
    is_lowered = not callable(fn) and hasattr(fn, "compile")
    if not is_lowered and not hasattr(fn, "memory_analysis"):
        jitted: Any = fn if hasattr(fn, "lower") else nnx.jit(fn)
        program, is_lowered = jitted.lower(*args, **kwargs), True
    elif args or kwargs:
        raise ValueError(
            f"got a {'lowered' if is_lowered else 'compiled'} program and "
            f"{len(args) + len(kwargs)} arguments; its shapes are fixed, so pass it alone, or "
            "pass the function"
        )
    compiled = program.compile() if is_lowered else program
    analysis = compiled.memory_analysis()
    if analysis is None:
        raise ValueError(
            f"the backend {jax.default_backend()!r} reports no memory analysis; "
            "compile for a CPU or GPU (JAX_PLATFORMS=cpu)"
        )
    # not peak_memory_in_bytes: on a CPU it leaves the temporaries out
    return MemoryReport(
        arguments=analysis.argument_size_in_bytes,
        outputs=analysis.output_size_in_bytes,
        aliased=analysis.alias_size_in_bytes,
        temporaries=analysis.temp_size_in_bytes,
    )


def _compiled_for(device: str, fn: Any, args: Any, kwargs: Any) -> jax.stages.Compiled:
    if not callable(fn):
        raise ValueError(
            f"device is {device!r}, but {type(fn).__name__} is a program for a device already; "
            "pass the function"
        )
    (there,) = targets.devices(device)
    graphdef, state = nnx.split((args, kwargs))
    args, kwargs = nnx.merge(graphdef, jax.tree.map(_shape, state))
    jitted: Any = fn if hasattr(fn, "lower") else nnx.jit(fn)
    with jax.default_device(there):
        return targets.compile(jitted.lower(*args, **kwargs))


def _shape(leaf: Any) -> Any:
    """An array's, without the device that has it; of an array that is none yet, all it says."""
    is_array = isinstance(leaf, jax.Array | np.ndarray)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if is_array else leaf


def residual_bytes(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> dict[str, int]:
    """What `jax.vjp(fn, *args)` holds from the forward pass to the backward pass.

    Where the memory of training goes: these arrays live while everything else comes and goes.
    Blocks in a scan show as one array with their number in front. Arguments are not counted,
    nothing is executed, and no compiler is asked: it may still fuse some of it away.

    Args:
        fn: a loss or a model; not its gradient.
        *args, **kwargs: as in `memory_report`. Float leaves are differentiated.

    Returns:
        Bytes of all residuals of a dtype and shape, the largest first; their sum is the whole.

    Example:
        >>> w, x = jnp.ones((64, 64)), jnp.ones((8, 64))
        >>> residual_bytes(lambda w, x: jnp.sum(jnp.exp(x @ w)), w, x)
        {'float32[8, 64]': 2048}
    """
    leaves, treedef = jax.tree.flatten((args, kwargs))

    def held(leaves):
        is_float = [jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in leaves]

        def of_floats(floats):
            floats = iter(floats)
            mixed = [next(floats) if f else leaf for leaf, f in zip(leaves, is_float, strict=True)]
            args, kwargs = treedef.unflatten(mixed)
            return fn(*args, **kwargs)

        floats = [leaf for leaf, f in zip(leaves, is_float, strict=True) if f]
        arguments = {id(leaf) for leaf in leaves}
        residuals = jax.tree.leaves(jax.vjp(of_floats, floats)[1])
        unique = {id(leaf): leaf for leaf in residuals if id(leaf) not in arguments}
        return list(unique.values())

    sizes: dict[str, int] = {}
    for leaf in (leaf for leaf in jax.eval_shape(held, leaves) if leaf.size):
        name = f"{leaf.dtype}{list(leaf.shape)}"
        sizes[name] = sizes.get(name, 0) + leaf.size * leaf.dtype.itemsize
    return dict(sorted(sizes.items(), key=lambda item: -item[1]))
