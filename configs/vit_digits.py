"""ViT on scikit-learn's handwritten digits. Not in the paper: the first run of a newcomer.

    python -m train --config=configs/vit_digits.py --workdir=runs/digits

One minute on two CPU cores. Five seeds: BDIA-ViT 98.38 +- 0.64, ViT 98.55 +- 0.50 %. Other systems:
configs/vit_digits.py:plain, :quantized, :revnet, :midpoint; all of them with five seeds each:

    python -m train.sweep --config=configs/vit_digits.py --config.num_seeds=5
"""

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
    "smoke": {
        "model": {"width": 16, "depth": 2, "num_heads": 2, "mlp_dim": 16},
        **{"batch_size": 32, "num_steps": 4, "warmup_steps": 1},
        **{"log_every_steps": 2, "eval_every_steps": 4, "checkpoint_every_steps": 4},
    }
}


def get_config(arg: str | None = None) -> ConfigDict:
    config = common.defaults()
    config.task = "images"
    config.dataset = "digits"
    config.input = {
        **{"rand_augment_ops": 0, "rand_augment_magnitude": 0},
        **{"crop_padding": 0, "flip": False, "inference_gammas": (0.0,)},
    }
    config.model = {
        **{"name": "vit", "patch_size": 2, "width": 64, "depth": 6, "num_heads": 4},
        **{"mlp_dim": 128, "dropout_rate": 0.1, "linformer_dim": 0, "dtype": "float32"},
    }
    config.schedule = "cosine"
    config.learning_rate = 1e-3
    config.warmup_steps = 100
    config.grad_clip_norm = 1.0
    config.batch_size = 64
    config.num_steps = 600
    config.log_every_steps = 20
    config.eval_every_steps = 100
    config.checkpoint_every_steps = 200
    return common.choose(config, arg, RUNS, SCALES)
