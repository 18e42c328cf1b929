"""ViT and BDIA-ViT of depth 6 and 10 on CIFAR-10 (authors' response to the reviews).

    python -m train.sweep --config=configs/depth_cifar10.py --config.num_seeds=3
    python -m train.report runs/depth_cifar10

The paper's numbers for depth 6 are those of Table 1; we have none for depth 10. In all else as
configs/vit_cifar10.py. The scales keep the depth of the run.

Ours: not run at this size yet.
"""

from ml_collections import ConfigDict

from configs import common, vit_cifar10

RUNS = {
    f"{name}_depth{depth}": dict(system, model=dict(depth=depth))
    for name, system in (("bdia", common.BDIA), ("plain", common.PLAIN))
    for depth in (6, 10)
}
PAPER = {"plain_depth6": 88.15, "bdia_depth6": 89.10}
SCALES = vit_cifar10.SCALES


def get_config(arg: str | None = None) -> ConfigDict:
    return common.choose(vit_cifar10.base(), arg, RUNS, SCALES)
