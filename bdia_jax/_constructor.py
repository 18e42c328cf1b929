"""What an NNX stack makes its blocks of: a constructor and random keys, checked."""

import contextlib
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from flax import linen, nnx


def maker(make_block: Any) -> Callable[[nnx.Rngs], nnx.Module]:
    """make_block as (rngs) -> nnx.Module, checked; one that names rngs is called by that name.

    Raises:
        ValueError: it is something else than a function of rngs alone, or what it returns is.
    """
    is_linen = isinstance(make_block, type) and issubclass(make_block, linen.Module)
    if is_linen or not callable(make_block) or isinstance(make_block, nnx.Module | linen.Module):
        raise ValueError(
            f"make_block is {_shortened(make_block)}, expected what makes each of the blocks: a "
            "class of NNX, or a function such as lambda rngs: Block(8, rngs=rngs)"
        )
    by_name = _takes_by_name(make_block)

    def make_one(rngs: nnx.Rngs) -> nnx.Module:
        block = make_block(rngs=rngs) if by_name else make_block(rngs)
        if not isinstance(block, nnx.Module):
            raise ValueError(
                f"make_block returned {_shortened(block)}, expected an nnx.Module; for modules of "
                "Linen there is bdia_jax.linen.BDIAStack"
            )
        return block

    return make_one


def _takes_by_name(make_block: Callable[..., Any]) -> bool:
    """Whether its one argument goes by the name rngs; ValueError if there is more to give."""
    fn, args, kwargs = make_block, (), {}
    if isinstance(fn, partial):
        fn, args, kwargs = fn.func, fn.args, fn.keywords
    name = getattr(fn, "__name__", repr(fn))
    if isinstance(fn, type):  # Flax's own metaclass hides what their __init__ takes
        fn, args = fn.__init__, (None, *args)
    try:
        signature = inspect.signature(fn)
    except ValueError:  # written in C
        return False
    named = signature.parameters.get("rngs")
    is_named = named is not None and named.kind != inspect.Parameter.POSITIONAL_ONLY
    for by_name in (True, False) if is_named else (False, True):
        with contextlib.suppress(TypeError):
            if by_name:
                signature.bind(*args, **(kwargs | {"rngs": None}))
            else:
                signature.bind(*args, None, **kwargs)
            return by_name
    raise ValueError(
        f"make_block is {name}({', '.join(signature.parameters)}), which cannot be called with "
        "rngs alone; bind the rest: lambda rngs: Block(..., rngs=rngs)"
    )


def check_rngs(rngs: Any) -> nnx.Rngs:
    """rngs, if it is an nnx.Rngs; else a ValueError says how to make one."""
    if not isinstance(rngs, nnx.Rngs):
        given = _shortened(rngs)
        raise ValueError(f"rngs is {given}, expected streams of random keys: nnx.Rngs(0)")
    return rngs


def _shortened(value: Any) -> str:
    is_module = isinstance(value, nnx.Module | linen.Module)
    return f"a {type(value).__name__}" if is_module else " ".join(f"{value!r:.60}".split())
