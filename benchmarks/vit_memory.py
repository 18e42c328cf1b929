"""Memory of a training step of the paper's ViT, RevViT and BDIA-ViT: Table 1, its memory column.

configs/vit_cifar10.py as it is, batch 128, augmentation and optimizer included, without the image
set (which is on the device too: 150 MiB of CIFAR-10). As the compiler has planned it; the
paper's are 1570.6, 572.7 and 693.4 MB on a GPU.
"""

import sys

import jax.numpy as jnp

from bdia_jax import memory_report
from benchmarks import record
from configs import vit_cifar10
from train.config import Config
from train.images import Images, make_task
from train.program import compile_steps, make_program

PAPER_MB = {"plain": 1570.6, "revnet": 572.7, "bdia": 693.4}
MIB = 2**20


def measure(run: str, changes: dict) -> dict[str, float]:
    """Bytes of a step: temporaries; parameters and optimizer state; both."""
    values = vit_cifar10.get_config(run)
    values.update(changes)
    config = Config.from_config_dict(values)
    batch = config.batch_size
    images = Images(jnp.zeros((batch, 32, 32, 3), jnp.uint8), jnp.zeros(batch, jnp.int32))
    task = make_task(config, images, images, num_classes=10)
    memory = memory_report(compile_steps(make_program(config, task), task))
    state = memory.arguments - images.images.nbytes - images.labels.nbytes
    temp = memory.temporaries
    return {"temp_bytes": temp, "state_bytes": state, "total_bytes": temp + state}


def main(argv: list[str]) -> dict:
    """Compiles a step of each system and records what it needs."""
    args = record.parse(record.parser(__doc__), argv)
    changes = {"batch_size": 4, "model": {"width": 32, "depth": 2}} if args.toy else {}
    results = {run: measure(run, changes) for run in vit_cifar10.RUNS}
    plain = results["plain"]["total_bytes"]
    for run, row in results.items():
        row["ratio_to_plain"] = row["total_bytes"] / plain
        print(
            f"{run:8s} {row['temp_bytes'] / MIB:8.1f} + {row['state_bytes'] / MIB:.1f} MiB, "
            f"{row['ratio_to_plain']:.2f} of plain (paper: {PAPER_MB[run] / PAPER_MB['plain']:.2f})"
        )
    config = {"config": "configs/vit_cifar10.py", "paper_mb": PAPER_MB, **changes}
    record.write("vit_memory", results, config, argv=argv, args=args)
    return results


if __name__ == "__main__":
    main(sys.argv[1:])
