"""Linformer-ViT with and without BDIA on CIFAR-10 (authors' response to the reviews).

    python -m train.sweep --config=configs/linformer_cifar10.py --config.num_seeds=3
    python -m train.report runs/linformer_cifar10

Paper: Linformer 84.16 %, with BDIA 86.6 %. Keys and values are projected from 65 tokens to 32, a
choice of ours. In all else as configs/vit_cifar10.py.

Ours: not run at this size yet.
"""

from ml_collections import ConfigDict

from configs import common, vit_cifar10

RUNS = {"bdia": common.BDIA, "plain": common.PLAIN}
PAPER = {"plain": 84.16, "bdia": 86.6}
SCALES = {
    name: dict(scale, model=dict(scale["model"], linformer_dim=8))  # of 17 tokens
    for name, scale in vit_cifar10.SCALES.items()
}


def get_config(arg: str | None = None) -> ConfigDict:
    config = vit_cifar10.base()
    config.model.linformer_dim = 32
    return common.choose(config, arg, RUNS, SCALES)
