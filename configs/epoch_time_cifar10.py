"""Wall-clock time of an epoch: plain ViT, BDIA-ViT stored and reversible (reviews' response).

    python -m train.sweep --config=configs/epoch_time_cifar10.py
    python -m train.report runs/epoch_time_cifar10

Two epochs each; the report takes the second. In all else as configs/vit_cifar10.py.

Ours: not run at this size yet.
"""

from ml_collections import ConfigDict

from configs import common, vit_cifar10

RUNS = {
    "bdia": common.BDIA,
    "bdia_stored": common.BDIA_STORED,
    "plain": common.PLAIN,
    "revnet": common.REVNET,
    "midpoint": common.MIDPOINT,
}
PAPER: dict[str, float] = {}
SCALES = vit_cifar10.SCALES


def get_config(arg: str | None = None) -> ConfigDict:
    config = vit_cifar10.base()
    config.num_steps = 780
    config.eval_every_steps = config.checkpoint_every_steps = 780
    return common.choose(config, arg, RUNS, SCALES)
