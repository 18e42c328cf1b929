"""English to French, transformer with and without BDIA: Fig. 4 of arXiv 2407.09093.

    python -m train.sweep --config=configs/translation_enfr.py
    python -m train.report runs/translation_enfr

The paper shows training and validation loss on the Kaggle "English to French" file; BDIA's
validation loss is the lower one. We add BLEU (sacrebleu, beam 4) and a few translations. Six
and six blocks; width 512, mlp 2048 and a BPE of 8,000 for both languages are ours. `:small` is
a CPU's share of it: three and three blocks of width 64 on 10,000 of the pairs.

The data: `python -m train.prepare kaggle_enfr --from eng_-french.csv`.

Ours: not run at this size yet.
"""

from ml_collections import ConfigDict

from configs import common

RUNS = {"bdia": common.BDIA, "plain": common.PLAIN}
PAPER: dict[str, float] = {}
METRIC = "loss"
SCALES = {
    "smoke": {
        "dataset": "numbers_enfr",
        "eval_split": "validation[:64]",
        "input": {"vocab_size": 300, "boundaries": (16, 32), "eval_translations": 4},
        "model": {
            "width": 16,
            "encoder_depth": 2,
            "decoder_depth": 2,
            "num_heads": 2,
            "mlp_dim": 32,
        },
        **{"batch_size": 32, "num_steps": 4, "warmup_steps": 1},
        **{"log_every_steps": 2, "eval_every_steps": 4, "checkpoint_every_steps": 4},
    },
    "small": {
        "train_split": "train[:10000]",
        "eval_split": "validation[:1000]",
        "input": {"vocab_size": 2000, "boundaries": (12, 24), "eval_translations": 200},
        "model": {
            **{"width": 64, "encoder_depth": 3, "decoder_depth": 3, "num_heads": 4},
            "mlp_dim": 128,
        },
        **{"learning_rate": 2e-3, "batch_size": 64, "num_steps": 1500, "warmup_steps": 100},
        **{"log_every_steps": 50, "eval_every_steps": 250, "checkpoint_every_steps": 1000},
    },
}


def get_config(arg: str | None = None) -> ConfigDict:
    config = common.defaults()
    config.task = "translation"
    config.dataset = "kaggle_enfr"
    config.input = {
        **{"vocab_size": 8_000, "boundaries": (8, 16, 32, 64)},
        **{"beam_size": 4, "eval_translations": 1_000},
    }
    config.model = {
        **{"name": "transformer", "width": 512, "encoder_depth": 6, "decoder_depth": 6},
        **{"num_heads": 8, "mlp_dim": 2048, "dropout_rate": 0.1, "dtype": "float32"},
    }
    config.optimizer = "adamw"
    config.b2 = 0.98
    config.schedule = "cosine"
    config.learning_rate = 3e-4
    config.warmup_steps = 2_000
    config.grad_clip_norm = 1.0
    config.batch_size = 128
    config.num_steps = 40_000
    config.log_every_steps = 100
    config.eval_every_steps = 1_000
    config.checkpoint_every_steps = 2_000
    return common.choose(config, arg, RUNS, SCALES)
