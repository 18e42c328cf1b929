"""Large models planned: what a step needs of each device, as XLA compiles it for GPUs.

Llama models of 1 to 405 billion parameters, in bfloat16 with float32 parameters and Adam, sequences
of 8,192 tokens, per-block `jax.checkpoint` against BDIA. Nothing is run, and no GPU is there. Every
plan is the compiled training program (`train.plan.compiled`); with one sequence for each part of
the batch it is also told from a program of 4 blocks and arithmetic (`train.plan.closed_form`). With
--fit also the most sequences that take no more than `Target.usable`, which takes many programs.
Takes the extra `gpu-plan`.
"""

import dataclasses
import json
import math
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import record
from configs import gpt2_openwebtext
from train.config import Config
from train.plan.closed_form import at_depth
from train.plan.compiled import Plan, Where, make_plan, open_devices
from train.tasks import abstract_task, open_config

COMPARED = ("remat", "reversible")
SHALLOW = 4  # blocks

# name: (width, depth, heads, MLP, tokens in the vocabulary, in a sequence)
LLAMAS = {
    "1B": (2048, 16, 32, 8192, 128256, 8192),
    "8B": (4096, 32, 32, 14336, 128256, 8192),
    "70B": (8192, 80, 64, 28672, 128256, 8192),
    "405B": (16384, 126, 128, 53248, 128256, 8192),
    "toy": (64, 16, 8, 128, 512, 64),
}
# (model, mesh, GPU)
PLANNED: list[tuple[str, dict[str, int], str]] = [
    ("1B", {"fsdp": 8}, "h100"),
    ("8B", {"fsdp": 8}, "h100"),
    ("70B", {"fsdp": 64}, "h100"),
    ("405B", {"fsdp": 64, "tensor": 8}, "h100"),
]
TOY: list[tuple[str, dict[str, int], str]] = [("toy", {"fsdp": 2}, "cpu")]


def llama_config(
    name: str, mesh: dict[str, int], per_group: int, folder: Path, depth: int | None = None
) -> Config:
    """A run of a Llama; `per_group` sequences for each part of the batch.

    Args:
        folder: gets the model's config.json.
        depth: another one than the model's.
    """
    width, own_depth, heads, mlp_dim, vocab_size, length = LLAMAS[name]
    described = {"model_type": "llama", "hidden_act": "silu", "vocab_size": vocab_size}
    described |= {"hidden_size": width, "intermediate_size": mlp_dim, "rms_norm_eps": 1e-5}
    described |= {"num_hidden_layers": own_depth if depth is None else depth, "rope_theta": 5e5}
    described |= {"num_attention_heads": heads, "num_key_value_heads": 8}
    described |= {"max_position_embeddings": length, "tie_word_embeddings": name == "1B"}
    (folder / "config.json").write_text(json.dumps(described))
    values = gpt2_openwebtext.get_config()
    tokens = {"tokenizer": "checkpoint", "length": length, "isolate_documents": False}
    groups = math.prod(mesh.get(axis, 1) for axis in ("data", "fsdp"))
    values.update({"input": tokens, "mesh": mesh, "init_from": str(folder)})
    values.update({"batch_size": per_group * groups})
    return open_config(values)


def plan_llama(
    name: str, mesh: dict[str, int], device: str, compared: Sequence[str], *, fit: bool
) -> dict[str, Any]:
    """Plans with one sequence for each part of the batch; with `fit` the most that fit, too."""
    where = open_devices(device, math.prod(mesh.values()))
    row: dict[str, Any] = {"model": name, "mesh": mesh, "device": device}
    row["devices"] = math.prod(mesh.values())
    row["told"] = where.told
    for backprop in compared:
        row[backprop] = _planned(name, mesh, backprop, where, fit)
    return row


def _planned(
    name: str, mesh: dict[str, int], backprop: str, where: Where, fit: bool
) -> dict[str, Any]:
    def plan(per_group: int, depth: int | None = None) -> Plan:
        with tempfile.TemporaryDirectory() as folder:
            config = llama_config(name, mesh, per_group, Path(folder), depth)
            config = dataclasses.replace(config, backprop=backprop)
            return make_plan(config, abstract_task(config), where)

    one, shallow = plan(1), plan(1, SHALLOW)
    told = at_depth(shallow.total, shallow.parts, one.parts)
    row: dict[str, Any] = {
        "state": one.parameters + one.optimizer,
        "gradients": one.parts.gradients,
        "kept": one.parts.kept,
        "total": one.total,
        "shallow": SHALLOW,
        "closed_form": told,
        "ratio": told / one.total,
        "sent": one.sent,
        "petaflop": one.work.flops / 1e15 if one.work else None,
        "bound_seconds": one.work.seconds if one.work else None,
    }
    if where.target and fit:
        row["sequences_that_fit"] = most(lambda n: plan(n).total, where.target.usable, one.total)
    return row


def most(total: Callable[[int], int], limit: int, of_one: int) -> int:
    """The largest count whose total is within the limit, for totals that grow; few are asked for.

    Args:
        total: count -> bytes.
        limit: bytes.
        of_one: total(1), known.
    """
    if of_one > limit:
        return 0
    fits, size, beyond = 1, of_one, 8
    while (too_much := total(beyond)) <= limit:
        fits, size, beyond = beyond, too_much, 2 * beyond
    while beyond - fits > 1:
        share = (limit - size) / (too_much - size)  # as if memory were linear between the two
        count = min(max(fits + int(share * (beyond - fits)), fits + 1), beyond - 1)
        if (found := total(count)) <= limit:
            fits, size = count, found
        else:
            beyond, too_much = count, found
    return fits


def main(argv: list[str]) -> dict:
    """Compiles, compares and records."""
    options = record.parser(__doc__)
    options.add_argument("--fit", action="store_true", help="the most sequences that fit, too")
    args = record.parse(options, argv)
    results: dict[str, list[Any]] = {"planned": [], "ratios": []}
    config = {"llamas": LLAMAS}
    for name, mesh, device in TOY if args.toy else PLANNED:
        compared = COMPARED[1:] if args.toy else COMPARED
        row = plan_llama(name, mesh, device, compared, fit=args.fit)
        results["planned"].append(row)
        results["ratios"] += [row[backprop]["ratio"] for backprop in compared]
        print(_line(row, compared), flush=True)
        record.write("plan", results, config, argv=argv, args=args)
    return results


def _line(row: dict[str, Any], compared: Sequence[str]) -> str:
    cells = "; ".join(
        f"{backprop} {row[backprop]['total'] / 1e9:.2f} GB, closed form "
        f"{row[backprop]['ratio']:.4f}, fit {row[backprop].get('sequences_that_fit', '-')}"
        for backprop in compared
    )
    return f"{row['model']} on {row['devices']} x {row['device']}, {row['mesh']}: {cells}"


if __name__ == "__main__":
    main(sys.argv[1:])
