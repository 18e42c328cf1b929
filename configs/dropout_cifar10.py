"""ViT and BDIA-ViT with dropout 0, 0.1, 0.2 (authors' response to the reviews).

    python -m train.sweep --config=configs/dropout_cifar10.py --config.num_seeds=3
    python -m train.report runs/dropout_cifar10

Paper, dropout 0, 0.1, 0.2: ViT 86.27, 88.15, 87.24 %; BDIA-ViT 89.20, 89.10, 88.22 %. In all else
as configs/vit_cifar10.py.

Ours: not run at this size yet.
"""

from ml_collections import ConfigDict

from configs import common, vit_cifar10

RUNS = {
    f"{name}_dropout{rate}": dict(system, model=dict(dropout_rate=rate))
    for name, system in (("bdia", common.BDIA), ("plain", common.PLAIN))
    for rate in (0.0, 0.1, 0.2)
}
PAPER = {"plain_dropout0.0": 86.27, "plain_dropout0.1": 88.15, "plain_dropout0.2": 87.24}
PAPER |= {"bdia_dropout0.0": 89.20, "bdia_dropout0.1": 89.10, "bdia_dropout0.2": 88.22}
SCALES = vit_cifar10.SCALES


def get_config(arg: str | None = None) -> ConfigDict:
    return common.choose(vit_cifar10.base(), arg, RUNS, SCALES)
