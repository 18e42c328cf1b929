"""Memory of a training step of the paper's ViT, RevViT and BDIA-ViT: Table 1, its memory column.

configs/vit_cifar10.py as it is, batch 128, augmentation and optimizer included, without the image
set (which is on the device too: 150 MiB of CIFAR-10). As the compiler has planned it; the
paper's are 1570.6, 572.7 and 693.4 MB on a GPU. The other rows are BDIA-ViT with less than a block
evaluated at a time, and the plain ViT under per-block `jax.checkpoint`.
"""

import math
import sys
from typing import Any

import jax
import jax.numpy as jnp

from bdia_jax import memory_report
from benchmarks import record
from benchmarks.stack import MIB
from configs import common, vit_cifar10
from train.config import Config
from train.loop.program import compile_steps, make_program
from train.tasks import open_config
from train.tasks.images import Images, make_task

PAPER_MB = {"plain": 1570.6, "revnet": 572.7, "bdia": 693.4}
# row: (run of the config, changes of it)
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("plain", {}),
    "remat": ("plain", common.PLAIN | {"backprop": "remat"}),
    "revnet": ("revnet", {}),
    "bdia": ("bdia", {}),
    "bdia_by_branch": ("bdia", {"by_branch": True}),
    "bdia_chunked": ("bdia", {"batch_chunks": 4}),
    "bdia_lean": ("bdia", {"batch_chunks": 4, "by_branch": True}),
    "bdia_chunked_16": ("bdia", {"batch_chunks": 16}),
}
PARTS = ("parameter_bytes", "optimizer_bytes", "gradient_bytes", "side_bytes", "rest_bytes")


def measure(run: str, changes: dict) -> dict[str, int]:
    """Bytes of a step: temporaries; parameters and optimizer state; both; and what they hold.

    side_bytes are what the side bits must take; rest_bytes whatever is left of the temporaries:
    states, one block's residuals, augmentation, work space.
    """
    values = vit_cifar10.get_config(run)
    values.update(changes)
    config = open_config(values)
    batch = config.batch_size
    images = Images(jnp.zeros((batch, 32, 32, 3), jnp.uint8), jnp.zeros(batch, jnp.int32))
    task = make_task(config, images, images, num_classes=10)
    program = make_program(config, task)
    memory = memory_report(compile_steps(program))
    state = memory.arguments - images.images.nbytes - images.labels.nbytes
    parameters = jax.tree.leaves(jax.eval_shape(program.init)["params"])
    parameter_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in parameters)
    side = side_bytes(config)
    return {
        "temp_bytes": memory.temporaries,
        "state_bytes": state,
        "total_bytes": memory.temporaries + state,
        "parameter_bytes": parameter_bytes,
        "optimizer_bytes": state - parameter_bytes,
        "gradient_bytes": parameter_bytes,
        "side_bytes": side,
        "rest_bytes": memory.temporaries - parameter_bytes - side,
    }


def side_bytes(config: Config) -> int:
    """K times the packed bits of one state [B, T, D], 0 where nothing is packed."""
    if config.stack != "bdia" or config.backprop != "reversible":
        return 0
    tokens = (32 // config.model.patch_size) ** 2 + 1
    bits = round(-math.log2(config.gamma)) + config.guard_bits
    return config.model.depth * config.batch_size * tokens * config.model.width * bits // 8


def main(argv: list[str]) -> dict:
    """Compiles a step of each system and records what it needs."""
    args = record.parse(record.parser(__doc__), argv)
    sizes: dict[str, Any] = {}
    if args.toy:
        sizes = {"batch_size": 16, "model": {"width": 32, "depth": 2, "mlp_dim": 32}}
        sizes["input"] = {"rand_augment_ops": 0}  # most of the time to compile
    names = ["plain", "revnet", "bdia", "bdia_lean"] if args.toy else list(ROWS)
    results: dict[str, dict] = {}
    print(f"{'MiB':16s} total = " + " + ".join(part.removesuffix("_bytes") for part in PARTS))
    for name in names:
        run, changes = ROWS[name]
        row = results[name] = measure(run, changes | sizes)
        row["ratio_to_plain"] = row["total_bytes"] / results["plain"]["total_bytes"]
        print(
            f"{name:16s} {row['total_bytes'] / MIB:8.1f} = "
            + " + ".join(f"{row[part] / MIB:.1f}" for part in PARTS)
            + f"; {row['ratio_to_plain']:.3f} of plain"
            + (f" (paper: {PAPER_MB[name] / PAPER_MB['plain']:.2f})" if name in PAPER_MB else ""),
            flush=True,
        )
    config = {"config": "configs/vit_cifar10.py", "paper_mb": PAPER_MB, **sizes}
    config["changes"] = {name: ROWS[name][1] for name in names}
    record.write("vit_memory", results, config, argv=argv, args=args)
    return results


if __name__ == "__main__":
    main(sys.argv[1:])
