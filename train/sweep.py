"""All runs of an experiment, one after the other, or all experiments.

    python -m train.sweep --config=configs/x.py [--scale=smoke] [--config.num_seeds=5]
    python -m train.sweep --all --out=benchmarks/results [--scale=smoke] [--set=num_seeds=1]

Each run has a folder of its own in the workdir and is resumed there, so an interrupted sweep
is continued by the same command. `python -m train.report WORKDIR` makes its tables and figures.

--all is the whole paper, the most important first, with its tables and figures in --out. What is
wrong with an experiment, as data that are not prepared, is told, and the others go on. Fine-tuning
(configs/gpt2_e2e.py) is not among them: it starts from a checkpoint that you bring.
"""

import ast
import shlex
import sys
from pathlib import Path
from typing import Any

import jax
from absl import flags, logging
from ml_collections import config_flags

from train import cli
from train.datasets.registry import open_builder
from train.loop.train import train
from train.report import report
from train.run.experiment import claim, make_configs

# name: seeds trained side by side. Table 1 on CIFAR-10 first; with it Fig. 1 and 3.
EXPERIMENTS = {
    "vit_cifar10": 3,
    "vit_cifar100": 3,
    "gamma_cifar10": 3,
    "gpt2_openwebtext": 1,
    "translation_enfr": 1,
    "epoch_time_cifar10": 1,
    "quantization_cifar10": 3,
    "dropout_cifar10": 3,
    "depth_cifar10": 3,
    "linformer_cifar10": 3,
    "resnet15_cifar10": 3,
    "vit_digits": 5,
}
_CONFIGS = Path(__file__).parent.parent / "configs"

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "An experiment; --config.field=value changes a field of all of its runs."
)
_SCALE = flags.DEFINE_string("scale", "", "A smaller size of the experiment: smoke or small.")
_RUNS = flags.DEFINE_list("runs", [], "Only these runs.")
_WORKDIR = flags.DEFINE_string(
    "workdir", "", "Where results go; runs/NAME by default. With --all the folder of all NAMEs."
)
_ALL = flags.DEFINE_bool("all", False, "All experiments instead of one.")
_OUT = flags.DEFINE_string("out", "", "With --all: the folder for tables and figures.")
_SET = flags.DEFINE_multi_string("set", [], "With --all: FIELD=VALUE, a change of every config.")


def sweep(
    file: str,
    workdir: str,
    scale: str = "",
    only: list[str] | None = None,
    overrides: dict[str, Any] | None = None,
    command: str = "",
) -> list[str]:
    """Trains every run of an experiment.

    Args:
        file, scale, only, overrides: as of `make_configs`.
        workdir: gets experiment.json and a workdir for each run.
        command: the command line, for the record.

    Returns:
        One line for every run that failed; the others have been trained.

    Raises:
        ValueError: an unknown run, scale or field, or a workdir of another experiment.
        FileNotFoundError: the data set is not prepared.
    """
    overrides = overrides or {}
    configs = make_configs(file, scale, only, overrides)
    for dataset, data_dir in {(config.dataset, config.data_dir) for config in configs.values()}:
        open_builder(dataset, data_dir)  # better told now than between two runs
    claim(Path(workdir), file, scale, overrides)
    failures = []
    for name, config in configs.items():
        print(f"=== {name}", flush=True)
        try:
            train(config, str(Path(workdir) / name), command)
        # a loss that is not finite, or too little memory, need not cost the other runs
        except (ValueError, jax.errors.JaxRuntimeError) as error:
            failures.append(f"{name}: {error}")
    return failures


def sweep_all(
    workdir: Path, out: Path, scale: str, overrides: dict[str, Any], command: str
) -> list[str]:
    """Sweeps every experiment into its folder in `workdir`, and reports it into `out`.

    Arguments and what it returns are as of `sweep`; num_seeds is that of EXPERIMENTS by default.
    """
    failures = []
    for name, num_seeds in EXPERIMENTS.items():
        print(f"##### {name}", flush=True)
        file, folder = str(_CONFIGS / f"{name}.py"), workdir / _stem(name, scale)
        changes = {"num_seeds": num_seeds} | overrides
        try:
            failed = sweep(file, str(folder), scale, None, changes, command)
            failures += [f"{name}: {failure}" for failure in failed]
            print(report(folder, out))
        except (ValueError, FileNotFoundError) as error:
            if type(error) not in (ValueError, FileNotFoundError):
                raise
            failures.append(f"{name}: {error}")
    return failures


def _stem(name: str, scale: str) -> str:
    return "_".join(filter(None, (name, scale)))


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def main(argv):
    if len(argv) > 1:
        raise ValueError(f"unexpected arguments {argv[1:]}; options look like --runs=plain")
    logging.set_verbosity(logging.ERROR)  # TFDS and Orbax tell every step they take
    command = shlex.join(["python", "-m", "train.sweep", *sys.argv[1:]])
    scale, config = _SCALE.value, flags.FLAGS["config"]
    given = (config.value is not None, _ALL.value, bool(_OUT.value))
    if given not in ((True, False, False), (False, True, True)):
        raise ValueError("expected --config=configs/x.py, or --all and --out=FOLDER")
    if _ALL.value:
        settings: list[str] = _SET.value or []
        parted = (setting.partition("=") for setting in settings)
        overrides = {field: _value(text) for field, _, text in parted}
        workdir = Path(_WORKDIR.value or "runs")
        failures = sweep_all(workdir, Path(_OUT.value), scale, overrides, command)
    else:
        file = config_flags.get_config_filename(config)
        overrides = config_flags.get_override_values(config)
        workdir = _WORKDIR.value or f"runs/{_stem(Path(file).stem, scale)}"
        failures = sweep(file, workdir, scale, _RUNS.value, overrides, command)
    if failures:
        sys.exit("error: " + "\n".join(failures))
    if not _ALL.value:
        print(f"tables and figures: python -m train.report {workdir}")


if __name__ == "__main__":
    cli.run(main)
