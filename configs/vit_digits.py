"""ViT on scikit-learn's handwritten digits. Not in the paper: the first run of a newcomer.

    python -m train --config=configs/vit_digits.py --workdir=runs/digits

One minute on two CPU cores. Five seeds: BDIA-ViT 98.38 +- 0.64, ViT 98.55 +- 0.50 %. Other systems:
configs/vit_digits.py:plain, :quantized, :revnet, :midpoint; all of them with five seeds each:

    python -m train.sweep --config=configs/vit_digits.py --config.num_seeds=5
"""
# what a group of a ConfigDict has, no type knows
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false

from ml_collections import ConfigDict

from configs import common

RUNS = {
    "bdia": common.BDIA,
    "plain": common.PLAIN,
    "quantized": common.QUANTIZED,
    "revnet": common.REVNET,
    "midpoint": common.MIDPOINT,
}
PAPER: dict[str, float] = {}
SCALES = {
    "smoke": dict(
        common.SMOKE, batch_size=32, model=dict(width=16, depth=2, num_heads=2, mlp_dim=16)
    )
}


def get_config(arg: str | None = None) -> ConfigDict:
    config = common.defaults()
    config.update(task="images", dataset="digits")
    config.input = dict(rand_augment_ops=0, rand_augment_magnitude=0, crop_padding=0, flip=False)
    config.input.inference_gammas = (0.0,)
    config.model = dict(name="vit", patch_size=2, width=64, depth=6, num_heads=4, mlp_dim=128)
    config.model.update(dropout_rate=0.1, linformer_dim=0, dtype="float32")
    config.model.update(shifted_patches=False, locality_attention=False)
    config.update(schedule="cosine", learning_rate=1e-3, warmup_steps=100, grad_clip_norm=1.0)
    config.update(batch_size=64, num_steps=600)
    config.update(log_every_steps=20, eval_every_steps=100, checkpoint_every_steps=200)
    return common.choose(config, arg, RUNS, SCALES)
