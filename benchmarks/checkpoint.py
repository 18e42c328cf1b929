"""What |gamma| does to a checkpoint before any step: python -m benchmarks.checkpoint FOLDER

FOLDER is a language model as Hugging Face keeps it, with tokenizer.json; the text is Python's
documentation. For each |gamma| the loss in training mode, the exactness of the rebuild and the
guard bits it takes; beside them the loss in eval mode by fixed-point states of several frac_bits
and in floating point, and how large the states of each block are. At last, which blocks bear 1/2
badly: the first, middle and last third of them at 1/2, the others at 1/16.
"""

import dataclasses
import statistics
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from bdia_jax import FixedPoint, bdia_scan, interop
from bdia_jax.nnx import BDIAStack, pure_blocks
from benchmarks import record
from train.data.text import load_text
from train.data.tokens import open_tokenizer
from train.loop.guard_bits import Recorded

FRAC_BITS = (5, 9, 12)


@dataclasses.dataclass(frozen=True)
class Size:
    """Of the batch; powers: of |gamma| = 2^-p; draws: of its signs."""

    batch: int = 4
    tokens: int = 96
    powers: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7)
    draws: int = 3


TOY = Size(batch=2, tokens=16, powers=(1, 4), draws=2)


def measure(folder: str, tokens: Any, size: Size) -> dict[str, Any]:
    """Losses in nats a token. tokens: int32 [B, T + 1]."""
    model: Any = interop.load(folder, rngs=nnx.Rngs(0))
    x, consts = _stack_inputs(model, tokens)
    results: dict[str, Any] = {"depth": model.stack.depth, "eval_loss": {}}
    results |= {"gammas": {}, "half_in": {}}
    model.eval()
    for frac_bits in FRAC_BITS:
        model.stack.fixed_point = FixedPoint(frac_bits, gamma_bits=4)  # of load
        results["eval_loss"][f"frac_bits_{frac_bits}"] = _loss(model, tokens)
    model.stack.fixed_point, model.stack.backprop = None, "store"
    results["eval_loss"]["float"] = _loss(model, tokens)
    results["largest_state"] = _largest_states(model.stack, x, consts)
    model.train()
    model.stack.backprop = "reversible"
    for power in size.powers:
        model.stack.magnitude = 2.0**-power
        model.stack.fixed_point = FixedPoint(gamma_bits=power)
        row = results["gammas"][str(2.0**-power)] = _with_gamma(model, tokens, x, consts, size)
        print(f"gamma {2.0**-power:<10g}" + str(row), flush=True)
    depth = model.stack.depth
    model.stack.fixed_point = FixedPoint(gamma_bits=4)
    for third, name in enumerate(("first", "middle", "last")):
        is_half = [third * depth // 3 <= k < (third + 1) * depth // 3 for k in range(depth)]
        model.stack.magnitude = [0.5 if half else 0.0625 for half in is_half]
        losses = [_loss(model, tokens, nnx.Rngs(draw)) for draw in range(size.draws)]
        results["half_in"][name] = {"losses": losses, "loss": statistics.mean(losses)}
        print(f"1/2 in the {name} third: {losses}", flush=True)
    return results


def _with_gamma(model: Any, tokens: Any, x: Any, consts: Any, size: Size) -> dict[str, Any]:
    losses = [_loss(model, tokens, nnx.Rngs(draw)) for draw in range(size.draws)]
    audits = [model.stack.audit(x, *consts, rngs=nnx.Rngs(draw)) for draw in range(size.draws)]
    return {
        "losses": losses,
        "loss": statistics.mean(losses),
        "side_bits": model.stack.fixed_point.side_bits,
        "elements": sum(each.elements * len(each.mismatches) for each in audits),
        "mismatches": int(sum(each.mismatches.sum() for each in audits)),
        "max_drift": max(each.max_drift for each in audits),
        "suggested_guard_bits": [each.suggested_guard_bits for each in audits],
        "largest": max(each.largest for each in audits),
    }


def _loss(model: Any, tokens: Any, rngs: Any = None) -> float:
    graphdef, state = nnx.split(model)

    @jax.jit
    def mean(state, tokens, rngs):
        here = nnx.merge(graphdef, state)
        return here.loss(here.features(tokens[:, :-1], rngs=rngs), tokens[:, 1:]).mean()

    return float(mean(state, tokens, rngs))


def _stack_inputs(model: Any, tokens: Any) -> tuple[jax.Array, tuple[Any, ...]]:
    """(x, consts) that the model calls its stack with."""
    model.eval()
    model.stack.__class__ = Recorded
    model.features(tokens[:, :-1])
    x, consts = model.stack.inputs
    model.stack.__class__ = BDIAStack
    del model.stack.inputs
    return x, consts


def _largest_states(stack: BDIAStack, x: jax.Array, consts: Any) -> list[float]:
    """max |x_k|, k = 0 .. K, in eval mode and floating point."""
    pure = pure_blocks(stack, stack.rngs)

    def body(x, params_k):
        alone = jax.tree.map(lambda leaf: leaf[None], params_k)  # a stack of this one block
        options: dict[str, Any] = {"fixed_point": None, "backprop": "store", "has_aux": True}
        return bdia_scan(pure.block_fns[0], alone, x, None, *consts, **options)[0], abs(x).max()

    last, largest = jax.jit(lambda x: jax.lax.scan(body, x, pure.params))(x)
    return [*map(float, largest), float(abs(last).max())]


def main(argv: list[str]) -> dict[str, Any]:
    """Measures and records."""
    options = record.parser(__doc__)
    options.add_argument("folder", help="config.json, model.safetensors, tokenizer.json")
    args = record.parse(options, argv)
    size = TOY if args.toy else Size()
    tokenizer = open_tokenizer("bytes" if args.toy else "checkpoint", args.folder)
    windows = load_text("pydoc", "validation", "", tokenizer, size.tokens)
    tokens = jnp.asarray(windows[:: len(windows) // size.batch][: size.batch])
    results = measure(args.folder, tokens, size)
    config = dataclasses.asdict(size) | {"model": Path(args.folder).name}
    record.write("checkpoint", results, config, argv=argv, args=args)
    return results


if __name__ == "__main__":
    main(sys.argv[1:])
