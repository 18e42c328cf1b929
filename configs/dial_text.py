"""|gamma| of 1/2 to 1/128, dropout and weight decay: small GPTs on bytes. Not in the paper.

    python -m train.sweep --config=configs/dial_text.py --scale=little --config.num_seeds=3
    python -m train.report runs/dial_text_little

Where does |gamma| cost, and where does it help? All of Shakespeare is more than this model of four
blocks learns in these steps; `:little` is four of its documents, 16 kB, which it learns by heart.
`falling` has 1/2 for two thirds of the steps and 1/16 in the last, `rising` 1/16 in the first third
and 1/2 from there on.

The data: `python -m train.prepare tinyshakespeare --from input.txt`.
"""
# what a group of a ConfigDict has, no type knows
# pyright: reportAttributeAccessIssue=false

from typing import Any

from ml_collections import ConfigDict

from configs import common, gpt2_openwebtext

RUNS = common.DIAL | {
    "falling": dict(gamma=0.5, gamma_changes=((533, 0.0625),)),
    "rising": dict(gamma=0.0625, gamma_changes=((267, 0.5),)),
}
PAPER: dict[str, float] = {}
METRIC = "loss"
SCALES = {
    "smoke": gpt2_openwebtext.SCALES["smoke"],
    "little": dict(train_split="train[:4]"),
}


def get_config(arg: str | None = None) -> ConfigDict:
    config: Any = gpt2_openwebtext.get_config().unlock()
    config.update(dataset="tinyshakespeare", eval_split="validation[:7]")
    config.input.update(tokenizer="bytes", length=64, isolate_documents=False)
    config.model.update(width=64, depth=4, num_heads=4, mlp_dim=256, dtype="float32")
    config.update(learning_rate=3e-3, warmup_steps=40, weight_decay=0.0)
    config.update(batch_size=8, num_steps=800, log_every_steps=50, eval_every_steps=100)
    config.checkpoint_every_steps = 800
    return common.choose(config, arg, RUNS, SCALES)
