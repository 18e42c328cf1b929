"""English to French, transformer with and without BDIA: Fig. 4 of arXiv 2407.09093.

    python -m train.sweep --config=configs/translation_enfr.py
    python -m train.report runs/translation_enfr

The paper shows training and validation loss on the Kaggle "English to French" file; BDIA's
validation loss is the lower one. We add BLEU (sacrebleu, beam 4) and a few translations. Six
and six blocks; width 512, mlp 2048 and a BPE of 8,000 for both languages are ours. `:small` is
a CPU's share of it: three and three blocks of width 64 on 10,000 of the pairs, `:tiny` on 2,000.

The data: `python -m train.prepare kaggle_enfr --from eng_-french.csv`.

Ours: not run at this size yet.
"""
# what a group of a ConfigDict has, no type knows
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false

from ml_collections import ConfigDict

from configs import common

RUNS = {"bdia": common.BDIA, "plain": common.PLAIN}
PAPER: dict[str, float] = {}
METRIC = "loss"
SCALES = {
    "smoke": dict(
        common.SMOKE,
        dataset="numbers_enfr",
        eval_split="validation[:64]",
        input=dict(vocab_size=300, boundaries=(16, 32), eval_translations=4),
        model=dict(width=16, encoder_depth=2, decoder_depth=2, num_heads=2, mlp_dim=32),
        batch_size=32,
    ),
    "small": dict(
        train_split="train[:10000]",
        eval_split="validation[:1000]",
        input=dict(vocab_size=2000, boundaries=(12, 24), eval_translations=200),
        model=dict(width=64, encoder_depth=3, decoder_depth=3, num_heads=4, mlp_dim=128),
        learning_rate=2e-3,
        batch_size=64,
        num_steps=1500,
        warmup_steps=100,
        log_every_steps=50,
        eval_every_steps=250,
        checkpoint_every_steps=1000,
    ),
}
SCALES["tiny"] = SCALES["small"] | dict(
    train_split="train[:2000]",
    eval_split="validation[:500]",
    batch_size=32,
    num_steps=600,
    warmup_steps=50,
    eval_every_steps=100,
    checkpoint_every_steps=600,
)


def get_config(arg: str | None = None) -> ConfigDict:
    config = common.defaults()
    config.update(task="translation", dataset="kaggle_enfr")
    config.input = dict(vocab_size=8_000, boundaries=(8, 16, 32, 64))
    config.input.update(beam_size=4, eval_translations=1_000)
    config.model = dict(name="transformer", width=512, encoder_depth=6, decoder_depth=6)
    config.model.update(num_heads=8, mlp_dim=2048, dropout_rate=0.1, dtype="float32")
    config.update(optimizer="adamw", b2=0.98, grad_clip_norm=1.0)
    config.update(schedule="cosine", learning_rate=3e-4, warmup_steps=2_000)
    config.update(batch_size=128, num_steps=40_000)
    config.update(log_every_steps=100, eval_every_steps=1_000, checkpoint_every_steps=2_000)
    return common.choose(config, arg, RUNS, SCALES)
