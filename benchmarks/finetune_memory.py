"""Memory of a fine-tuning step of GPT-2 medium on E2E: all parameters or LoRA's, plain or BDIA.

configs/gpt2_e2e.py as it is (batch 8, AdamW), but in float32, and with stand-in
sentences: only their shapes matter. As the compiler has planned it. Total is parameters and
optimizer state, and what a step needs besides: gradients, logits, activations.
"""

import sys
from functools import partial
from typing import Any

from benchmarks import record, runs
from benchmarks.stack import MIB
from configs import common, gpt2_e2e
from train.tasks import load_task, open_config
from train.tasks.causal_lm import make_causal_lm

ROWS: runs.Rows = {
    "plain": ("plain", {}),
    "remat": ("plain", common.PLAIN | {"backprop": "remat"}),
    "bdia": ("bdia_0.0625", {}),
    "bdia_chunked": ("bdia_0.0625", {"batch_chunks": 4}),
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
    sizes, trained = runs.step_bytes(config, task)
    return {"trained_parameters": sum(leaf.size for leaf in trained)} | sizes


def _line(name: str, row: dict) -> str:
    total, state, temporaries = (row[f"{part}_bytes"] / MIB for part in ("total", "state", "temp"))
    return (
        f"{name:18s} {row['trained_parameters']:>12,} trained  total {total:8.1f} MiB = state "
        f"{state:.1f} + {temporaries:.1f}; {row['ratio_to_plain']:.3f} of plain"
    )


def main(argv: list[str]) -> dict:
    """Compiles a step of each system and records what it needs."""
    args = record.parse(record.parser(__doc__), argv)
    sizes: dict[str, Any] = {"input": {"length": 256, "tokenizer": "bytes"}}
    names, vocab_size = list(ROWS), _VOCAB_SIZE
    if args.toy:
        sizes["model"] = {"width": 16, "depth": 4, "num_heads": 2, "mlp_dim": 64}
        names, vocab_size = ["plain", "lora_bdia_chunked"], 300
    rows = {name: (run, changes | sizes) for name, (run, changes) in ROWS.items() if name in names}
    results = runs.table(rows, partial(measure, vocab_size=vocab_size), _line)
    config = {"config": "configs/gpt2_e2e.py", **sizes}
    config["changes"] = {name: ROWS[name][1] for name in names}
    record.write("finetune_memory", results, config, argv=argv, args=args)
    return results


if __name__ == "__main__":
    main(sys.argv[1:])
