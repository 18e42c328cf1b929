"""|gamma| of 1/2 to 1/128, dropout and weight decay: small ViTs on CIFAR-10. Not in the paper.

    python -m train.sweep --config=configs/dial_cifar10.py --scale=little --config.num_seeds=3
    python -m train.report runs/dial_cifar10_little

As configs/dial_text.py, on images: the ViT of configs/vit_cifar10.py:tiny on all of the training
images, which it does not come to know in these steps; `:little` is the first 1,000.

The data: as of configs/vit_cifar10.py.
"""

from ml_collections import ConfigDict

from configs import common, vit_cifar10

RUNS = common.DIAL
PAPER: dict[str, float] = {}
SCALES = {
    "smoke": vit_cifar10.SCALES["smoke"],
    "little": dict(train_split="train[:1000]"),
}


def get_config(arg: str | None = None) -> ConfigDict:
    config = vit_cifar10.base()
    config.update(vit_cifar10.SCALES["tiny"] | dict(train_split="train"))
    config.model.dropout_rate = 0.0
    return common.choose(config, arg, RUNS, SCALES)
