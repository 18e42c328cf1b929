"""python -m train --config=configs/vit_digits.py --workdir=runs/digits [--config.batch_size=64]"""

import shlex
import sys

from absl import flags, logging
from ml_collections import config_flags

from train import cli
from train.devices.processes import join
from train.loop.train import train
from train.tasks import open_config

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "An experiment, for example configs/vit_digits.py or configs/x.py:smoke."
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where results go; an existing one is resumed.", required=True
)
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "Join the other processes of a SLURM, MPI or Kubernetes job."
)
_COORDINATOR = flags.DEFINE_string("coordinator", "", "Else HOST:PORT of the first process,")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", 0, "how many there are,")
_PROCESS_ID = flags.DEFINE_integer("process_id", -1, "and which this is, from 0.")


def main(argv):
    if len(argv) > 1:
        raise ValueError(f"unexpected arguments {argv[1:]}; options look like --config.seed=1")
    logging.set_verbosity(logging.FATAL)  # TFDS and Orbax tell every step, and errors twice
    join(_DISTRIBUTED.value, _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    config = open_config(_CONFIG.value)
    train(config, _WORKDIR.value, shlex.join(["python", "-m", "train", *sys.argv[1:]]))


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    cli.run(main)
