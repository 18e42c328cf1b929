"""ResNet of 15 blocks with and without BDIA on CIFAR-10 (authors' response to the reviews).

    python -m train.sweep --config=configs/resnet15_cifar10.py --config.num_seeds=3
    python -m train.report runs/resnet15_cifar10

Paper: ResNet-15 92.93 %, with BDIA 93.61 %. Its layout is not given; ours has three stages of
five pre-activation blocks, 64, 128 and 256 wide. RandAugment is left out, as usual for ResNets
on CIFAR, and the learning rate is 1e-3. In all else as configs/vit_cifar10.py.

Ours: not run at this size yet.
"""

from ml_collections import ConfigDict

from configs import common, vit_cifar10

RUNS = {"bdia": common.BDIA, "plain": common.PLAIN}
PAPER = {"plain": 92.93, "bdia": 93.61}
SCALES = {
    "smoke": dict(vit_cifar10.SCALES["smoke"], model=dict(widths=(8, 16), depths=(2, 2))),
    "small": dict(vit_cifar10.SCALES["small"], model=dict(widths=(16, 32, 64), depths=(3, 3, 3))),
    "tiny": dict(vit_cifar10.SCALES["tiny"], model=dict(widths=(8, 16, 32), depths=(3, 3, 3))),
}


def get_config(arg: str | None = None) -> ConfigDict:
    config = vit_cifar10.base()
    config.input.rand_augment_ops = 0
    config.model = dict(name="resnet", widths=(64, 128, 256), depths=(5, 5, 5), dtype="float32")
    config.learning_rate = 1e-3
    return common.choose(config, arg, RUNS, SCALES)
