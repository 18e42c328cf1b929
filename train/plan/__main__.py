"""Memory per device of a run: python -m train.plan --config=configs/vit_digits.py

[--config.mesh.fsdp=8 ...] [--device=gpu]. Nothing is compiled, allocated or run, and the devices
need not be there: a mesh can be planned on a laptop. No text is read; images have to be prepared,
for their shape.
"""

import math

from absl import flags, logging
from ml_collections import config_flags

from train import cli
from train.plan.compare import make_plans, table
from train.plan.estimate import mesh_sizes
from train.tasks import open_config

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "An experiment, for example configs/vit_digits.py or configs/x.py:smoke."
)
_DEVICE = flags.DEFINE_enum("device", "gpu", ["gpu", "cpu"], "What the run is planned for.")


def main(argv):
    if len(argv) > 1:
        raise ValueError(f"unexpected arguments {argv[1:]}; options look like --config.seed=1")
    logging.set_verbosity(logging.FATAL)  # TFDS tells every step
    config = open_config(_CONFIG.value)
    sizes = mesh_sizes(config.mesh)
    plans = make_plans(config, device=_DEVICE.value)
    axes = ", ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)
    count = math.prod(sizes.values())
    print(
        f"{_CONFIG.value.model.name}, batch {config.batch_size}, on {count} "
        f"{_DEVICE.value.upper()}{'s' if count > 1 else ''}{f' ({axes})' if axes else ''}; "
        f"this config has backprop={config.backprop!r}"
    )
    print(table(config, plans))


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    cli.run(main)
