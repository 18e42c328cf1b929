"""BDIA-ViT on CIFAR-10 for |gamma| 0, 0.25, 0.5, 0.6: Table 2 of arXiv 2407.09093.

    python -m train.sweep --config=configs/gamma_cifar10.py --config.num_seeds=3
    python -m train.report runs/gamma_cifar10

Paper: 88.15, 88.79, 89.12, 88.89 %. No quantization and stored activations, as there; gamma 0
is the plain ViT. In all else as configs/vit_cifar10.py.

Ours: not run at this size yet.
"""

from ml_collections import ConfigDict

from configs import common, vit_cifar10

RUNS = {f"gamma_{gamma}": dict(common.PLAIN, gamma=gamma) for gamma in (0.5, 0.0, 0.25, 0.6)}
PAPER = {"gamma_0.0": 88.15, "gamma_0.25": 88.79, "gamma_0.5": 89.12, "gamma_0.6": 88.89}
SCALES = vit_cifar10.SCALES


def get_config(arg: str | None = None) -> ConfigDict:
    return common.choose(vit_cifar10.base(), arg, RUNS, SCALES)
