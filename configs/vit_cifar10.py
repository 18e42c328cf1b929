"""BDIA-ViT on CIFAR-10: Table 1 of arXiv 2407.09093, row BDIA-ViT (89.10 %, ViT 88.15 %).

    python -m train --config=configs/vit_cifar10.py --workdir=runs/cifar10

Patch 4, width 512, depth 6, 8 heads, mlp 512, dropout 0.1, SET-Adam at 1e-4, batch 128,
as the paper. Its augmentation (RandAugment) is not here yet, and we have not run this to the
end: no number of ours. Cost: 78,000 steps, 200 epochs. The plain ViT is
--config.gamma=0 --config.quantize=False --config.backprop=store.

The data: see `python -m train` for the command that prepares it.
"""

from ml_collections import ConfigDict

from configs import vit_digits


def get_config() -> ConfigDict:
    config = vit_digits.get_config().unlock()
    config.dataset = "cifar10"
    config.eval_split = "test"
    config.crop_padding = 4
    config.flip = True
    model = {"patch_size": 4, "width": 512, "depth": 6, "num_heads": 8, "mlp_dim": 512}
    config.update({"model": model})
    config.schedule = "constant"
    config.learning_rate = 1e-4
    config.warmup_steps = 0
    config.grad_clip_norm = 0.0
    config.batch_size = 128
    config.num_steps = 78_000
    config.log_every_steps = 100
    config.eval_every_steps = 1_950
    config.checkpoint_every_steps = 1_950
    return config.lock()
