"""ViT, RevViT and BDIA-ViT on CIFAR-100: Table 1 of arXiv 2407.09093.

    python -m train.sweep --config=configs/vit_cifar100.py --config.num_seeds=3
    python -m train.report runs/vit_cifar100

Paper: ViT 61.86 %, RevViT 61.89 %, BDIA-ViT 66.09 %. As configs/vit_cifar10.py in all else.

Ours: not run at this size yet.
"""

from ml_collections import ConfigDict

from configs import common, vit_cifar10

RUNS = vit_cifar10.RUNS
PAPER = {"plain": 61.86, "revnet": 61.89, "bdia": 66.09}
SCALES = vit_cifar10.SCALES


def get_config(arg: str | None = None) -> ConfigDict:
    config = vit_cifar10.base()
    config.dataset = "cifar100"
    return common.choose(config, arg, RUNS, SCALES)
