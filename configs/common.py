"""What experiments share: default fields, the systems compared, and the choice of one."""

from typing import Any

from ml_collections import ConfigDict

# The systems of the paper, as changes of a config. "bdia" is the default.
BDIA: dict[str, Any] = {}
PLAIN = dict(gamma=0.0, quantize=False, backprop="store")
QUANTIZED = dict(gamma=0.0, backprop="store")
BDIA_STORED = dict(backprop="store")
REVNET = dict(stack="revnet", gamma=0.0, quantize=False)
MIDPOINT = dict(stack="midpoint", gamma=0.0, quantize=False)

# The gamma dial: every |gamma|, and what else is there against over-fitting.
DIAL: dict[str, dict[str, Any]] = {
    **{f"bdia_{2.0**-p}": dict(gamma=2.0**-p) for p in range(1, 8)},
    "plain": PLAIN,
    "quantized": QUANTIZED,
    "plain_dropout_0.1": PLAIN | dict(model=dict(dropout_rate=0.1)),
    "plain_dropout_0.2": PLAIN | dict(model=dict(dropout_rate=0.2)),
    "plain_decay_0.1": PLAIN | dict(weight_decay=0.1),
    "plain_decay_1.0": PLAIN | dict(weight_decay=1.0),
    "bdia_0.5_dropout_0.1": dict(gamma=0.5, model=dict(dropout_rate=0.1)),
    "bdia_0.125_dropout_0.1": dict(gamma=0.125, model=dict(dropout_rate=0.1)),
}

# How long every "smoke" scale is.
SMOKE = dict(num_steps=4, warmup_steps=1, log_every_steps=2)
SMOKE |= dict(eval_every_steps=4, checkpoint_every_steps=4)


def defaults() -> Any:  # a ConfigDict, whose fields no type knows
    """The fields every run has; task, data, input, model and lengths are left to the experiment."""
    config = ConfigDict()
    config.update(seed=0, num_seeds=1)
    config.update(data_dir="", train_split="train", eval_split="validation")

    config.init_from = ""
    config.lora = dict(rank=0, alpha=32.0, dropout_rate=0.0)
    config.update(stack="bdia", gamma=-1.0, gamma_changes=())  # -1: chosen by init_from
    config.update(quantize=True, frac_bits=9, guard_bits=1)
    config.update(backprop="reversible", by_branch=False, batch_chunks=1, token_chunks=1)
    config.mesh = dict(data=1, fsdp=1, tensor=1, sequence=1)

    config.update(optimizer="set_adam", b2=0.999, weight_decay=0.0, grad_clip_norm=0.0)
    config.update(schedule="constant", learning_rate=1e-4, warmup_steps=0, non_finite="stop")
    config.checkpoint_every_steps = 1_000_000  # with the last step always
    config.update(keep_last=2, keep_best=1)
    return config


def choose(
    config: ConfigDict,
    arg: str | None,
    runs: dict[str, dict],
    scales: dict[str, dict],
) -> ConfigDict:
    """The config of `--config=FILE:arg`, locked.

    Args:
        config: the experiment at the paper's size.
        arg: words with commas between them: a run, a scale, both or nothing, as in
            "plain,smoke".
        runs: the rows of the paper's table, as changes of `config`; the first is the default.
        scales: smaller sizes, "smoke" among them, as changes of `config`.

    Raises:
        ValueError: a word that is none of them, or two of a kind.
    """
    words = arg.split(",") if arg else []
    wrong = [word for word in words if word not in runs and word not in scales]
    if wrong:
        raise ValueError(
            f"no {', '.join(map(repr, wrong))} in this config; it has {', '.join(runs)}, and "
            f"the scales {', '.join(scales)}"
        )
    scale = [word for word in words if word in scales]
    run = [word for word in words if word in runs]
    if len(scale) > 1 or len(run) > 1:
        raise ValueError(f"{arg!r} names more than one run or scale; take one of each")
    with config.unlocked():
        for changes in (*(scales[word] for word in scale), runs[(run or [*runs])[0]]):
            config.update(changes)
    return config.lock()
