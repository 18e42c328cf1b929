"""Is h computed by the same kernels in the forward and in the reverse loop, as compiled for a GPU?

Where it is, the rebuild sees the same bits. Where a kernel of the forward loop has no twin in the
reverse loop (same operations, shapes, layouts and configuration), a rounding may come out different
there: that is what could drift, and what guard bits are for. Blocks of GPT-2 medium, and of a Llama
of its width, in float32 and in bfloat16. Nothing runs.
"""

import re
import sys
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from bdia_jax.compiled import targets
from bdia_jax.compiled.hlo import Instruction, Program, read
from bdia_jax.models.blocks import PreNormBlock, SwiGLU
from bdia_jax.models.rope import RotaryAttention
from bdia_jax.nnx import BDIAStack
from benchmarks import record
from benchmarks.gpt2_memory import MEDIUM
from benchmarks.stack import TOY, Shape

_CONFIGURATION = r'"(?:force_earliest_schedule|reification_cost|\w*operation_queue\w*)":[^,}]*,?'


def llama(shape: Shape, dtype: Any, rngs: nnx.Rngs, shared: int = 2) -> PreNormBlock:
    """Rotary attention, `shared` heads of queries to one of keys; RMSNorm, SwiGLU."""
    sizes = (shape.width, shape.num_heads, shape.mlp_dim)
    attention = partial(RotaryAttention, num_kv_heads=shape.num_heads // shared)
    parts = {"attention": attention, "mlp": SwiGLU, "norm": nnx.RMSNorm}
    return PreNormBlock(*sizes, dtype=dtype, **parts, rngs=rngs)


def transformer(shape: Shape, dtype: Any, rngs: nnx.Rngs) -> PreNormBlock:
    """LayerNorm, attention of all tokens, GELU."""
    sizes = (shape.width, shape.num_heads, shape.mlp_dim)
    return PreNormBlock(*sizes, dtype=dtype, rngs=rngs)


KINDS = ("products", "attention", "reductions", "elementwise")
BLOCKS = {"transformer": transformer, "llama": llama}


def compile_gradient(make_block: Any, shape: Shape, dtype: Any, target: str) -> Program:
    """The gradient of four such blocks, for a GPU."""

    def make():
        return BDIAStack(partial(make_block, shape, dtype), 4, rngs=nnx.Rngs(0))

    graphdef, params, rest = nnx.split(nnx.eval_shape(make), nnx.Param, ...)

    def loss(params, rest, x):
        return jnp.mean(nnx.merge(graphdef, params, rest)(x, rngs=nnx.Rngs(1)) ** 2)

    x = jax.ShapeDtypeStruct((shape.batch, shape.tokens, shape.width), jnp.float32)
    with jax.default_device(targets.devices(target)[0]):
        lowered = jax.jit(jax.grad(loss)).lower(params, rest, x)
    return read(targets.compile(lowered).as_text() or "")


def twins(program: Program) -> dict[str, Any]:
    """Of each kind of kernel: how many make h in the forward loop, and which have no twin."""
    loops = [one for one in program.computations[program.entry] if one.opcode == "while"]
    forward, reverse = (dict(loop.called)["body"] for loop in loops)
    known = Counter(described for _, _, described in _kernels(program, reverse))
    found: dict[str, Any] = {kind: {"kernels": 0, "without_twin": []} for kind in KINDS}
    for kind, name, described in _kernels(program, forward):
        row = found[kind]
        row["kernels"] += 1
        if not known[described]:
            row["without_twin"].append(name)
    return found


def _kernels(program: Program, body: str) -> Iterator[tuple[str, str, str]]:
    """(kind, name, all that it does) of those in a loop that make floats."""
    for one in program.computations[body]:
        if one.opcode not in ("custom-call", "fusion"):
            continue
        if any(array.dtype in ("s32", "u32", "u8") and array.bytes > 4 for array in one.arrays):
            continue  # the recurrence's own
        inner = program.computations[one.called[0][1]] if one.opcode == "fusion" else []
        described = [_plain(each) for each in inner] + [_plain(one)]
        yield _kind(one, inner), one.name, "\n".join(described)


def _kind(one: Instruction, inner: list[Instruction]) -> str:
    opcodes = {each.opcode for each in inner}
    if "fmha" in one.rest:
        return "attention"
    if one.opcode == "custom-call" or "dot" in opcodes:
        return "products"
    return "reductions" if "reduce" in opcodes else "elementwise"


def _plain(one: Instruction) -> str:
    """An instruction without the names of values, and without where it came from."""
    rest = re.sub(r"metadata=\{[^}]*\}|calls=%?[\w.\-]+", "", one.rest)
    rest = re.sub(_CONFIGURATION, "", re.sub(r"%[\w.\-]+", "%", rest))
    return f"{one.type} {one.opcode} {rest}"


def main(argv: list[str]) -> dict:
    """Compiles and records."""
    options = record.parser(__doc__)
    options.add_argument("--target", default="h100", choices=list(targets.TARGETS))
    args = record.parse(options, argv)
    shape = TOY if args.toy else MEDIUM
    results: dict[str, Any] = {}
    for name, make_block in BLOCKS.items():
        for dtype in ("float32", "bfloat16"):
            program = compile_gradient(make_block, shape, jnp.dtype(dtype), args.target)
            row = results.setdefault(name, {})[dtype] = twins(program)
            for kind, each in row.items():
                print(
                    f"{name} {dtype}: {each['kernels']} kernels for {kind}, "
                    f"{len(each['without_twin'])} without a twin: {each['without_twin']}"
                )
    record.write("gpu_loops", results, {"shape": shape}, argv=argv, args=args)
    return results


if __name__ == "__main__":
    main(sys.argv[1:])
