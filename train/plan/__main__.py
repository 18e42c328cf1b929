"""Memory and work of a run on each of its devices, as compiled:

    python -m train.plan --config=configs/gpt2_openwebtext.py --config.mesh.fsdp=8 --device=h100

The whole training program is compiled for each way of training the stack. Nothing is run or
allocated, and the GPUs need not be there. No text is read; images have to be prepared, for their
shape.
"""

import math

from absl import flags, logging
from ml_collections import config_flags

from bdia_jax.compiled.targets import TARGETS
from train import cli
from train.plan.closed_form import mesh_sizes
from train.plan.compiled import make_plan, open_devices, ways
from train.plan.table import fits, table
from train.tasks import abstract_task, open_config

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "An experiment, for example configs/vit_digits.py or configs/x.py:smoke."
)
_DEVICE = flags.DEFINE_enum("device", "h100", [*TARGETS, "cpu"], "What the run is planned for.")


def main(argv):
    if len(argv) > 1:
        raise ValueError(f"unexpected arguments {argv[1:]}; options look like --config.seed=1")
    logging.set_verbosity(logging.FATAL)  # TFDS tells every step
    config = open_config(_CONFIG.value)
    sizes = mesh_sizes(config.mesh)
    count = math.prod(sizes.values())
    where = open_devices(_DEVICE.value, count)
    if where.told:
        print(where.told)
    axes = ", ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)
    kind = where.target.kind if where.target else "CPU"
    print(
        f"{_CONFIG.value.model.name}, batch {config.batch_size}, on {count} x {kind}"
        f"{f' ({axes})' if axes else ''}; this config has backprop={config.backprop!r}"
    )
    plans = {
        name: make_plan(each, abstract_task(each), where) for name, each in ways(config).items()
    }
    print(table(plans))
    if where.target:
        print(fits(plans, where.target))


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    cli.run(main)
