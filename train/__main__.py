"""python -m train --config=configs/vit_digits.py --workdir=runs/digits [--config.batch_size=64]"""

import shlex
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from train.config import Config
from train.train import memory_line, train

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "An experiment, for example configs/vit_digits.py or configs/x.py:smoke."
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where results go; an existing one is resumed.", required=True
)


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; options look like --config.seed=1")
    logging.set_verbosity(logging.ERROR)  # TFDS and Orbax tell every step they take
    try:
        config = Config.from_config_dict(_CONFIG.value)
        train(config, _WORKDIR.value, shlex.join(["python", "-m", "train", *sys.argv[1:]]))
        if config.backprop == "reversible":
            print(memory_line(config, _WORKDIR.value))
    except (ValueError, FileNotFoundError) as error:
        if type(error) not in (ValueError, FileNotFoundError):
            raise
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main)
