"""Memory per device: `train.plan` against the compiled program, and large models planned.

The first table compiles the training step of a GPT-2 and a ViT for every mesh of 4 devices, and
compares what the compiler says a device needs with the plan. Nothing is run. XLA's CPU compiler
has two orders of work: one for memory, as GPUs have, which the plan follows, and one for more
parallel work ("default", of the GPT-2), which takes more memory.

The second plans Llama models of 1 to 405 billion parameters, in bfloat16 with float32 parameters
and Adam, sequences of 8,192 tokens, on GPUs with 80 and 141 GB: per-block `jax.checkpoint` against
BDIA. A batch fits if its plan is at most 90 % of the memory.
"""

import bisect
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax

from bdia_jax import memory_report
from bdia_jax.sharding import AXES
from benchmarks import record
from benchmarks.stack import MIB
from configs import gpt2_openwebtext, vit_cifar10
from train.config import Config
from train.loop.program import compile_steps, lower_steps, make_program
from train.plan.compare import first_depth, make_plans
from train.plan.estimate import Plan, make_plan
from train.tasks import abstract_task, images, open_config
from train.tasks.task import Task

MESHES: dict[str, dict[str, int]] = {
    "1 device": {},
    "data=4": {"data": 4},
    "fsdp=4": {"fsdp": 4},
    "data=2, tensor=2": {"data": 2, "tensor": 2},
    "fsdp=2, sequence=2": {"fsdp": 2, "sequence": 2},
}
COMPARED = ("reversible", "remat")
_FOR_MEMORY = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}

# name: (width, depth, heads, MLP)
LLAMAS = {
    "1B": (2048, 16, 32, 8192),
    "8B": (4096, 32, 32, 14336),
    "70B": (8192, 80, 64, 28672),
    "405B": (16384, 126, 128, 53248),
}
# (model, mesh, GB of a GPU)
PLANNED: list[tuple[str, dict[str, int], int]] = [
    ("1B", {"fsdp": 8}, 80),
    ("8B", {"fsdp": 8}, 80),
    ("8B", {"fsdp": 8}, 141),
    ("8B", {"fsdp": 64}, 80),
    ("70B", {"fsdp": 64}, 80),
    ("70B", {"fsdp": 64}, 141),
    ("70B", {"fsdp": 32, "tensor": 8}, 80),
    ("405B", {"fsdp": 64, "tensor": 8}, 80),
    ("405B", {"fsdp": 64, "tensor": 8}, 141),
    ("405B", {"fsdp": 512}, 141),
]
_SAFE = 0.9


def gpt2(mesh: dict[str, int], backprop: str, **sizes: int) -> tuple[Config, Task]:
    """A GPT-2 of width 512 and depth 12, 32 sequences of 256 tokens of 8,192."""
    shape = {"batch": 32, "length": 256, "width": 512, "depth": 12, "vocab": 8192} | sizes
    model = {"width": shape["width"], "depth": shape["depth"], "dtype": "float32"}
    model |= {"num_heads": 8, "mlp_dim": 4 * shape["width"]}
    values = gpt2_openwebtext.get_config()
    tokens = {"tokenizer": "bpe", "vocab_size": shape["vocab"], "length": shape["length"]}
    values.update({"input": tokens | {"isolate_documents": False}})
    values.update({"model": model, "mesh": mesh, "backprop": backprop})
    values.update({"batch_size": shape["batch"]})
    config = open_config(values)
    return config, abstract_task(config)


def vit(mesh: dict[str, int], backprop: str, **sizes: int) -> tuple[Config, Task]:
    """The ViT of CIFAR-10 with 12 blocks and an MLP of 2,048, batch 128."""
    shape = {"batch": 128, "width": 512, "depth": 12} | sizes
    model = {"width": shape["width"], "depth": shape["depth"], "mlp_dim": 4 * shape["width"]}
    values = vit_cifar10.get_config()
    values.update({"input": {"rand_augment_ops": 0, "crop_padding": 0, "flip": False}})
    values.update({"model": model, "mesh": mesh, "backprop": backprop})
    values.update({"batch_size": shape["batch"], "optimizer": "adamw"})
    config = open_config(values)
    return config, images.of_shape(config, (32, 32, 3), 10)


def compare(config: Config, task: Task, *, default: bool = True) -> dict[str, Any]:
    """Bytes as planned and as compiled on this machine, and their ratio."""
    device = jax.default_backend()
    plan = make_plan(config, task, device)
    program = make_program(config, task)
    lowered = lower_steps(program)
    options: Any = _FOR_MEMORY if device == "cpu" else None
    compiled = memory_report(lowered.compile(compiler_options=options)).total
    row = {"planned": plan.total, "compiled": compiled, "ratio": plan.total / compiled}
    if default and device == "cpu":
        row["compiled_default"] = memory_report(compile_steps(program)).total
    return row


def llama_config(name: str, mesh: dict[str, int], per_group: int, folder: Path) -> Config:
    """A run of a Llama; `per_group` sequences for each part of the batch.

    Args:
        folder: gets the model's config.json.
    """
    width, depth, heads, mlp_dim = LLAMAS[name]
    described = {"model_type": "llama", "hidden_act": "silu", "vocab_size": 128256}
    described |= {"hidden_size": width, "num_hidden_layers": depth, "intermediate_size": mlp_dim}
    described |= {"num_attention_heads": heads, "num_key_value_heads": 8, "rope_theta": 5e5}
    described |= {"max_position_embeddings": 8192, "rms_norm_eps": 1e-5}
    described |= {"tie_word_embeddings": name == "1B"}
    (folder / "config.json").write_text(json.dumps(described))
    values = gpt2_openwebtext.get_config()
    tokens = {"tokenizer": "checkpoint", "length": 8192, "isolate_documents": False}
    groups = math.prod(mesh.get(axis, 1) for axis in ("data", "fsdp"))
    values.update({"input": tokens, "mesh": mesh, "init_from": str(folder)})
    values.update({"batch_size": per_group * groups})
    return open_config(values)


def plan_llama(name: str, mesh: dict[str, int], gigabytes: int) -> dict[str, Any]:
    """Plans with one sequence a part of the batch, and the most sequences that fit."""
    limit = _SAFE * gigabytes * 1e9
    with tempfile.TemporaryDirectory() as folder:

        def plans(per_group: int, *backprops: str) -> dict[str, Plan]:
            config = llama_config(name, mesh, per_group, Path(folder))
            return make_plans(config, abstract_task, "gpu", backprops or COMPARED)

        one, two = plans(1), plans(2)
        row: dict[str, Any] = {"model": name, "mesh": mesh, "gigabytes": gigabytes}
        row["devices"] = math.prod(mesh.values())
        row["first_depth"] = first_depth(one["reversible"], one["remat"], LLAMAS[name][1])
        for backprop in COMPARED:
            plan, more = one[backprop], two[backprop].total - one[backprop].total
            most = max(0, int(1 + (limit - plan.total) // more))  # as if memory were linear

            def total(count: int, backprop: str = backprop) -> int:
                return plans(count, backprop)[backprop].total

            if most and total(most) > limit:
                most = bisect.bisect_right(range(1, most), limit, key=total)
            row[backprop] = {
                "state": plan.parameters + plan.optimizer + plan.gradients,
                "kept": plan.kept,
                "carried": plan.states,
                "block": plan.block,
                "rest": plan.rest,
                "elsewhere": plan.elsewhere,
                "total": plan.total,
                "per_sequence": more,
                "sequences_that_fit": most,
            }
    return row


def main(argv: list[str]) -> dict:
    """Compares, plans and records."""
    args = record.parse(record.parser(__doc__), argv)
    record.cpu_devices(4)
    meshes = dict(list(MESHES.items())[: 1 if args.toy or args.gpu else None])
    sizes = {"batch": 8, "width": 64, "depth": 2} if args.toy else {}
    results: dict[str, Any] = {"compared": {}, "planned": []}
    for make in (gpt2, vit):
        for label, mesh in meshes.items():
            if make is vit and "sequence" in mesh:  # 65 tokens
                continue
            for backprop in COMPARED:
                row = compare(*make(mesh, backprop, **sizes), default=make is gpt2 and not args.toy)
                results["compared"][f"{make.__name__}, {label}, {backprop}"] = row
                cells = "  ".join(f"{k} {v / MIB:8.1f}" for k, v in row.items() if k != "ratio")
                print(
                    f"{make.__name__:5s} {label:19s} {backprop:11s} {cells}  {row['ratio']:.3f}",
                    flush=True,
                )
    for name, mesh, gigabytes in PLANNED[: 1 if args.toy else None]:
        row = plan_llama(name, mesh, gigabytes)
        results["planned"].append(row)
        print(_line(row), flush=True)
    config = {"meshes": meshes, "axes": AXES, "llamas": LLAMAS, "safe_share": _SAFE, **sizes}
    record.write("plan", results, config, argv=argv, args=args)
    return results


def _line(row: dict[str, Any]) -> str:
    total, fit = (
        " / ".join(f"{row[backprop][key] / unit:.4g}" for backprop in COMPARED)
        for key, unit in (("total", 1e9), ("sequences_that_fit", 1))
    )
    where = f"{row['devices']} x {row['gigabytes']} GB, {row['mesh']}"
    return f"{row['model']} on {where}: {total} GB, {fit} sequences ({' / '.join(COMPARED)})"


if __name__ == "__main__":
    main(sys.argv[1:])
