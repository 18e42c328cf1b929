"""Loss by both inference paths: python -m train.evaluate --from runs/gpt2 [--out agreement.json]

--from is a workdir of `python -m train`, evaluated on the split it was evaluated on in training,
or another by --split or --dataset. Or a folder with a Hugging Face language model; then --dataset
says on which texts. The path in fixed point is the one of reversible training with gamma 0, the
path in floating point the one any other runtime takes. Printed: metrics by both, and how far the
states are apart in quanta, after the whole stack and after one block of it. The last is at most
half a quantum: the paths agree to the quantum.
"""

import argparse
import dataclasses
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from flax import nnx

from bdia_jax import FixedPoint
from bdia_jax.nnx import BDIAStack
from train.cli import parse_args, told
from train.data.text import load_text
from train.generate import check_vocabulary, choose_tokenizer
from train.inference.agreement import Agreement, compare
from train.inference.open_run import open_run
from train.loop.log import origin
from train.tasks import load_task
from train.tasks.language import Sequences, text_metrics
from train.tasks.task import group_size


def evaluate(args: argparse.Namespace) -> tuple[dict[str, Any], Agreement]:
    """(what was evaluated, the result).

    Raises:
        FileNotFoundError: no such folder, or the data set is not prepared.
        ValueError: a folder or options that do not fit together.
    """
    run = open_run(args.folder, data_dir=args.data_dir)
    stacks = [each for _, each in nnx.iter_modules(run.model) if isinstance(each, BDIAStack)]
    fixed_point = next((each.fixed_point for each in stacks if each.fixed_point), FixedPoint())
    if args.frac_bits is not None:
        fixed_point = dataclasses.replace(fixed_point, frac_bits=args.frac_bits)
    if args.dataset:
        about, metrics, groups = _texts(args, run)
    elif run.config is None:
        raise ValueError(
            f"{args.folder} is a checkpoint without a data set; name one: --dataset=pydoc"
        )
    else:
        split = args.split or run.config.eval_split
        task = load_task(dataclasses.replace(run.config, eval_split=split))
        about = {"dataset": run.config.dataset, "split": split}
        metrics, groups = task.metrics, task.eval_groups
    result = compare(run.model, metrics, groups, args.batch_size, fixed_point)
    examples = sum(map(group_size, groups))
    about |= {"examples": examples, "frac_bits": fixed_point.frac_bits}
    return {"from": str(args.folder), **about}, result


def _texts(args: argparse.Namespace, run: Any) -> tuple[dict[str, Any], Any, Any]:
    """Any set of texts, for any language model: (what it is, metrics, groups)."""
    if not hasattr(run.model, "loss") or not hasattr(run.model.stack.blocks, "attention"):
        kind = type(run.model).__name__
        raise ValueError(f"{args.folder} is a {kind}, expected a GPT-2 or Llama for --dataset")
    tokenizer = choose_tokenizer(args.tokenizer, args.folder, run.tokenizer)
    length = args.length or min(run.model.max_len, 1024)
    split = args.split or "validation"
    windows = load_text(args.dataset, split, args.data_dir, tokenizer, length)
    check_vocabulary(run.model, int(windows.max()))
    about = {"dataset": args.dataset, "split": split, "length": length}
    return about, text_metrics(None), (Sequences(windows),)


def table(about: dict[str, Any], result: Agreement) -> str:
    """The result as text."""
    lines = [
        f"{about['from']} on {about['examples']:,} examples of {about['dataset']} {about['split']}",
        _row("", "fixed point", "float", "difference"),
    ]
    for name, value in result.quantized.items():
        other = result.unquantized[name]
        lines.append(_row(name, f"{value:.6f}", f"{other:.6f}", f"{value - other:+.6f}"))
    lines.append(_row(f"quanta of 2^-{about['frac_bits']}", "largest", "RMS"))
    for name, gap in result.last_state.items():
        for what, each in (("all blocks", gap), ("one block", result.one_block[name])):
            lines.append(_row(f"{name}, {what}", f"{each.largest:.3f}", f"{each.rms:.3f}"))
    return "\n".join(lines)


def _row(first: str, *rest: str) -> str:
    return f"{first:24}" + "".join(f"{each:>14}" for each in rest)


def document(about: dict[str, Any], result: Agreement) -> dict[str, Any]:
    """The result as JSON."""
    difference = {name: v - result.unquantized[name] for name, v in result.quantized.items()}
    values: dict[str, Any] = {"fixed_point": result.quantized, "float": result.unquantized}
    for name in ("last_state", "one_block"):
        gaps = getattr(result, name)
        values[f"{name}_quanta"] = {stack: gap._asdict() for stack, gap in gaps.items()}
    return {**about, **values, "difference": difference}


def main(argv: list[str] | None = None) -> None:
    options = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawTextHelpFormatter
    )
    add = options.add_argument
    add("--from", dest="folder", type=Path, required=True, help="a workdir or a checkpoint")
    add("--dataset", default="", help="texts to evaluate on; a workdir's own by default")
    add("--split", default="", help="a TFDS split, such as validation[:100]")
    add("--tokenizer", default="", help="gpt2 or bytes, for a folder without one")
    add("--length", type=int, default=0, help="tokens of a window, with --dataset")
    add("--batch_size", type=int, default=8, help="examples at once")
    add("--frac_bits", type=int, help="of the fixed point; as trained, else 9")
    add("--data_dir", default="", help="where TFDS keeps its data")
    add("--out", type=Path, help="a file for the result as JSON")
    args = parse_args(options, argv)
    with told():
        about, result = evaluate(args)
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            command = shlex.join(["python", "-m", "train.evaluate", *(argv or sys.argv[1:])])
            record = {"command": command} | origin() | document(about, result)
            args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(table(about, result))


if __name__ == "__main__":
    main()
