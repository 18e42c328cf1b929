"""All runs of an experiment, one after the other: python -m train.sweep --config=configs/x.py

Each run has a folder of its own in the workdir and is resumed there, so an interrupted sweep
is continued by the same command. `python -m train.report WORKDIR` makes its tables and figures.
"""

import importlib.util
import json
import shlex
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
from absl import flags, logging
from ml_collections import config_flags

from train import cli
from train.config import Config
from train.datasets.registry import open_builder
from train.loop.train import train
from train.tasks import open_config

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "An experiment; --config.field=value changes a field of all of its runs."
)
_SCALE = flags.DEFINE_string("scale", "", "A smaller size of the experiment: smoke or small.")
_RUNS = flags.DEFINE_list("runs", [], "Only these runs.")
_WORKDIR = flags.DEFINE_string("workdir", "", "Where results go; runs/NAME by default.")


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
        file: the experiment, a file in configs/.
        workdir: gets experiment.json and a workdir for each run.
        scale: "" for the paper's size.
        only: names of runs; all by default.
        overrides: changes of every run, {"model.width": 32}.
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
    path = Path(workdir)
    changes = {name: value for name, value in overrides.items() if name != "data_dir"}
    _claim(path, {"config": _from_here(file), "scale": scale, "overrides": changes})
    failures = []
    for name, config in configs.items():
        print(f"=== {name}", flush=True)
        try:
            train(config, str(path / name), command)
        # a loss that is not finite, or too little memory, need not cost the other runs
        except (ValueError, jax.errors.JaxRuntimeError) as error:
            failures.append(f"{name}: {error}")
    return failures


def make_configs(
    file: str,
    scale: str = "",
    only: list[str] | None = None,
    overrides: dict[str, Any] | None = None,
) -> dict[str, Config]:
    """The config of each run of an experiment. Arguments and errors: as `sweep`."""
    experiment = load_experiment(file)
    wrong = [name for name in only or () if name not in experiment.RUNS]
    wrong += [scale] if scale and scale not in experiment.SCALES else []
    if wrong:
        raise ValueError(
            f"no {', '.join(map(repr, wrong))} in {file}; its runs are "
            f"{', '.join(experiment.RUNS)}, its scales {', '.join(experiment.SCALES)}"
        )
    configs = {}
    for name in only or experiment.RUNS:
        config = experiment.get_config(",".join(filter(None, (name, scale))))
        try:
            config.update_from_flattened_dict(overrides or {})
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{overrides} does not fit {file}: {error}") from error
        configs[name] = open_config(config)
    return configs


def load_experiment(file: str) -> ModuleType:
    """A file in configs/ as a module: RUNS, PAPER, SCALES and get_config."""
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    if spec is None or spec.loader is None or not Path(file).exists():
        raise ValueError(
            f"{file} is no experiment; expected a Python file such as configs/x.py (a size is "
            "chosen by --scale, runs by --runs)"
        )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    missing = [
        name for name in ("RUNS", "SCALES", "PAPER", "get_config") if not hasattr(module, name)
    ]
    if missing or not module.__doc__:
        missing += [] if module.__doc__ else ["docstring"]
        raise ValueError(f"{file} has no {', '.join(missing)}; see configs/vit_digits.py for one")
    return module


def _from_here(file: str) -> str:
    """The path as it is found again, without folders of the machine where that is possible."""
    path = Path(file).absolute()
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _claim(path: Path, experiment: dict[str, Any]) -> None:
    """Writes experiment.json, or checks that the folder is of this experiment."""
    file = path / "experiment.json"
    try:
        path.mkdir(parents=True, exist_ok=True)
        old = json.loads(file.read_text()) if file.exists() else None
        if old is None and any(path.iterdir()):
            raise ValueError(f"{path} has files but no experiment.json; take another --workdir")
        if old is None:
            file.write_text(json.dumps(experiment) + "\n")
    except OSError as error:
        raise ValueError(f"workdir {path} cannot be used: {error.strerror}") from error
    experiment = json.loads(json.dumps(experiment))
    if old is not None and old != experiment:
        raise ValueError(f"{path} holds {old}, not {experiment}; take another --workdir")


def main(argv):
    if len(argv) > 1:
        raise ValueError(f"unexpected arguments {argv[1:]}; options look like --runs=plain")
    logging.set_verbosity(logging.ERROR)  # TFDS and Orbax tell every step they take
    file = config_flags.get_config_filename(flags.FLAGS["config"])
    overrides = config_flags.get_override_values(flags.FLAGS["config"])
    default = "_".join(filter(None, (Path(file).stem, _SCALE.value)))
    workdir = _WORKDIR.value or f"runs/{default}"
    command = shlex.join(["python", "-m", "train.sweep", *sys.argv[1:]])
    failures = sweep(file, workdir, _SCALE.value, _RUNS.value, overrides, command)
    if failures:
        sys.exit("error: " + "\n".join(failures))
    print(f"tables and figures: python -m train.report {workdir}")


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    cli.run(main)
