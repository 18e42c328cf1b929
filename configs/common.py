"""What experiments share: default fields, the systems compared, and the choice of one."""

from typing import Any

from ml_collections import ConfigDict

# The systems of the paper, as changes of a config. "bdia" is the default.
BDIA: dict[str, Any] = {}
PLAIN = {"gamma": 0.0, "quantize": False, "backprop": "store"}
QUANTIZED = {"gamma": 0.0, "backprop": "store"}
BDIA_STORED = {"backprop": "store"}
REVNET = {"stack": "revnet", "gamma": 0.0, "quantize": False}
MIDPOINT = {"stack": "midpoint", "gamma": 0.0, "quantize": False}


def defaults() -> ConfigDict:
    """The fields every run has; data, input and model are left to the experiment."""
    config = ConfigDict()
    config.seed = 0
    config.num_seeds = 1

    config.data_dir = ""
    config.train_split = "train"
    config.eval_split = "validation"

    config.init_from = ""
    config.lora = {"rank": 0, "alpha": 32.0, "dropout_rate": 0.0}
    config.stack = "bdia"
    config.gamma = 0.5
    config.quantize = True
    config.frac_bits = 9
    config.guard_bits = 1
    config.backprop = "reversible"
    config.by_branch = False
    config.batch_chunks = 1
    config.token_chunks = 1
    config.mesh = {"data": 1, "fsdp": 1, "tensor": 1, "sequence": 1}

    config.optimizer = "set_adam"
    config.b2 = 0.999
    config.schedule = "constant"
    config.learning_rate = 1e-4
    config.warmup_steps = 0
    config.weight_decay = 0.0
    config.grad_clip_norm = 0.0
    config.non_finite = "stop"
    config.checkpoint_every_steps = 1_000_000  # with the last step always
    config.keep_last = 2
    config.keep_best = 1
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
