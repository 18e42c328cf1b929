"""BDIA-ViT on CIFAR-100: Table 1 of arXiv 2407.09093, row BDIA-ViT (66.09 %, ViT 61.86 %).

    python -m train --config=configs/vit_cifar100.py --workdir=runs/cifar100

As configs/vit_cifar10.py, its remarks included.
"""

from ml_collections import ConfigDict

from configs import vit_cifar10


def get_config() -> ConfigDict:
    config = vit_cifar10.get_config().unlock()
    config.dataset = "cifar100"
    return config.lock()
