"""Memory of a training step of the paper's ViT, RevViT and BDIA-ViT: Table 1, its memory column.

configs/vit_cifar10.py as it is, batch 128, augmentation and optimizer included, without the image
set (which is on the device too: 150 MiB of CIFAR-10). As the compiler has planned it; the
paper's are 1570.6, 572.7 and 693.4 MB on a GPU. The other rows are BDIA-ViT with less than a block
evaluated at a time, and the plain ViT under per-block `jax.checkpoint`.
"""

import math
import sys
from typing import Any

import jax.numpy as jnp

from benchmarks import record, runs
from benchmarks.measure import size_in_bytes
from benchmarks.stack import MIB
from configs import common, vit_cifar10
from train.config import Config
from train.tasks import open_config
from train.tasks.images import Images, make_task
from train.tasks.task import Task

PAPER_MB = {"plain": 1570.6, "revnet": 572.7, "bdia": 693.4}
ROWS: runs.Rows = {
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


def opened(run: str, changes: dict) -> tuple[Config, Task]:
    """A run of configs/vit_cifar10.py, changed, with a batch of black images."""
    values = vit_cifar10.get_config(run)
    values.update(changes)
    config = open_config(values)
    batch = config.batch_size
    images = Images(jnp.zeros((batch, 32, 32, 3), jnp.uint8), jnp.zeros(batch, jnp.int32))
    return config, make_task(config, images, images, num_classes=10)


def measure(run: str, changes: dict) -> dict[str, int]:
    """Bytes of a step: temporaries; parameters and optimizer state; both; and what they hold.

    side_bytes are what the side bits must take; rest_bytes whatever is left of the temporaries:
    states, one block's residuals, augmentation, work space.
    """
    config, task = opened(run, changes)
    sizes, trained = runs.step_bytes(config, task)
    parameters, side = size_in_bytes(trained), side_bytes(config)
    return sizes | {
        "parameter_bytes": parameters,
        "optimizer_bytes": sizes["state_bytes"] - parameters,
        "gradient_bytes": parameters,
        "side_bytes": side,
        "rest_bytes": sizes["temp_bytes"] - parameters - side,
    }


def side_bytes(config: Config) -> int:
    """K times the packed bits of one state [B, T, D], 0 where nothing is packed."""
    if config.stack != "bdia" or config.backprop != "reversible":
        return 0
    tokens = (32 // config.model.patch_size) ** 2 + 1
    bits = round(-math.log2(config.gamma)) + config.guard_bits
    return config.model.depth * config.batch_size * tokens * config.model.width * bits // 8


def _line(name: str, row: dict) -> str:
    parts = " + ".join(f"{row[part] / MIB:.1f}" for part in PARTS)
    line = f"{name:16s} {row['total_bytes'] / MIB:8.1f} = {parts}; {row['ratio_to_plain']:.3f}"
    paper = f" (paper: {PAPER_MB[name] / PAPER_MB['plain']:.2f})" if name in PAPER_MB else ""
    return f"{line} of plain{paper}"


def main(argv: list[str]) -> dict:
    """Compiles a step of each system and records what it needs."""
    args = record.parse(record.parser(__doc__), argv)
    sizes: dict[str, Any] = {}
    if args.toy:
        model = {"width": 32, "depth": 6, "mlp_dim": 32, "dropout_rate": 0.0}
        # without augmentation and dropout, which are most of the time to compile
        sizes = {"batch_size": 16, "model": model, "input": {"rand_augment_ops": 0}}
    names = ["plain", "bdia"] if args.toy else list(ROWS)
    print(f"{'MiB':16s} total = " + " + ".join(part.removesuffix("_bytes") for part in PARTS))
    rows = {name: (run, changes | sizes) for name, (run, changes) in ROWS.items() if name in names}
    results = runs.table(rows, measure, _line)
    config = {"config": "configs/vit_cifar10.py", "paper_mb": PAPER_MB, **sizes}
    config["changes"] = {name: ROWS[name][1] for name in names}
    record.write("vit_memory", results, config, argv=argv, args=args)
    return results


if __name__ == "__main__":
    main(sys.argv[1:])
