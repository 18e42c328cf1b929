"""ViT and BDIA-ViT with coarser states, l = 5, 0, -2 (authors' response to the reviews).

    python -m train.sweep --config=configs/quantization_cifar10.py --config.num_seeds=3
    python -m train.report runs/quantization_cifar10

Paper, l = 5, 0, -2: ViT 87.90, 87.76, 84.31 %; BDIA-ViT 89.50, 88.47, 84.16 %. ViT's states are
quantized too, without gamma. In all else as configs/vit_cifar10.py.

Ours: not run at this size yet.
"""

from ml_collections import ConfigDict

from configs import common, vit_cifar10

RUNS = {
    f"{name}_l{frac_bits}": dict(system, frac_bits=frac_bits)
    for name, system in (("bdia", common.BDIA), ("plain", common.QUANTIZED))
    for frac_bits in (5, 0, -2)
}
PAPER = {"plain_l5": 87.90, "plain_l0": 87.76, "plain_l-2": 84.31}
PAPER |= {"bdia_l5": 89.50, "bdia_l0": 88.47, "bdia_l-2": 84.16}
SCALES = vit_cifar10.SCALES


def get_config(arg: str | None = None) -> ConfigDict:
    return common.choose(vit_cifar10.base(), arg, RUNS, SCALES)
