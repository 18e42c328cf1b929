"""Memory of a fine-tuning step of GPT-2 medium on E2E: all parameters or LoRA's, plain or BDIA.

configs/gpt2_e2e.py as it is (batch 8, AdamW), but in float32, and with stand-in
sentences: only their shapes matter. As the compiler has planned it. Total is parameters and
optimizer state, and what a step needs besides: gradients, logits, activations.
"""

import sys
from typing import Any

import jax

from bdia_jax import memory_report
from benchmarks import record
from benchmarks.stack import MIB
from configs import common, gpt2_e2e
from train.loop.program import compile_steps, make_program
from train.tasks import load_task, open_config
from train.tasks.causal_lm import make_causal_lm

# row: (run of the config, changes of it)
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("plain", {}),
    "remat": ("plain", common.PLAIN | {"backprop": "remat"}),
    "bdia": ("bdia", {}),
    "bdia_chunked": ("bdia", {"batch_chunks": 4}),
    "lora": ("lora", {}),
    "lora_remat": ("lora", {"backprop": "remat"}),
    "lora_bdia": ("lora_bdia", {}),
    "lora_bdia_chunked": ("lora_bdia", {"batch_chunks": 4}),
}
_VOCAB_SIZE = 50_257


def measure(run: str, changes: dict[str, Any], vocab_size: int = _VOCAB_SIZE) -> dict[str, int]:
    """Trained parameters; bytes of parameters and optimizer state, of temporaries, and both."""
    values = gpt2_e2e.get_config(run)
    values.update({"dataset": "restaurants", "input": {"tokenizer": "bytes"}} | changes)
    values.update({"model": {"dtype": "float32"}})
    config = open_config(values)
    task = load_task(config)  # its byte ids are stand-ins for GPT-2's
    task = task._replace(make_model=make_causal_lm(config, vocab_size, config.input.length))
    program = make_program(config, task)
    memory = memory_report(compile_steps(program))
    data = sum(array.nbytes for array in jax.tree.leaves(task.train_groups))
    trained = jax.tree.leaves(jax.eval_shape(program.init)["params"])
    return {
        "trained_parameters": sum(leaf.size for leaf in trained),
        "state_bytes": memory.arguments - data,
        "temp_bytes": memory.temporaries,
        "total_bytes": memory.arguments - data + memory.temporaries,
    }


def main(argv: list[str]) -> dict:
    """Compiles a step of each system and records what it needs."""
    args = record.parse(record.parser(__doc__), argv)
    sizes: dict[str, Any] = {"input": {"length": 256, "tokenizer": "bytes"}}
    names, vocab_size = list(ROWS), _VOCAB_SIZE
    if args.toy:
        sizes["model"] = {"width": 32, "depth": 4, "num_heads": 2, "mlp_dim": 64}
        names, vocab_size = ["plain", "bdia_chunked", "lora_bdia_chunked"], 300
    results: dict[str, dict] = {}
    for name in names:
        run, changes = ROWS[name]
        row = results[name] = measure(run, changes | sizes, vocab_size)
        row["ratio_to_plain"] = row["total_bytes"] / results["plain"]["total_bytes"]
        print(
            f"{name:18s} {row['trained_parameters']:>12,} trained  total "
            f"{row['total_bytes'] / MIB:8.1f} MiB = state {row['state_bytes'] / MIB:.1f} + "
            f"{row['temp_bytes'] / MIB:.1f}; {row['ratio_to_plain']:.3f} of plain",
            flush=True,
        )
    config = {"config": "configs/gpt2_e2e.py", **sizes}
    config["changes"] = {name: ROWS[name][1] for name in names}
    record.write("finetune_memory", results, config, argv=argv, args=args)
    return results


if __name__ == "__main__":
    main(sys.argv[1:])
