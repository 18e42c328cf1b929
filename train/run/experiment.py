"""An experiment: a file in configs/, and the folder that holds the runs of its sweep."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

from train.config import Config
from train.run.workdir import damaged, read_fields, usable
from train.tasks import open_config

_FILE = "experiment.json"
_KINDS = {"config": str, "scale": str, "overrides": dict}  # of its fields


def load_experiment(file: str) -> ModuleType:
    """A file in configs/ as a module: RUNS, PAPER, SCALES and get_config.

    Raises:
        ValueError: it is none.
    """
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    if spec is None or spec.loader is None or not Path(file).exists():
        raise ValueError(
            f"{file} is no experiment; expected a Python file such as configs/x.py (a size is "
            "chosen by --scale, runs by --runs)"
        )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    needed = ("RUNS", "SCALES", "PAPER", "get_config")
    missing = [name for name in needed if not hasattr(module, name)]
    missing += [] if module.__doc__ else ["docstring"]
    if missing:
        raise ValueError(f"{file} has no {', '.join(missing)}; see configs/vit_digits.py for one")
    return module


def make_configs(
    file: str, scale: str, only: list[str] | None, overrides: dict[str, Any]
) -> dict[str, Config]:
    """The config of each run of an experiment.

    Args:
        file: the experiment, a file in configs/.
        scale: "" for the paper's size.
        only: names of runs; all by default.
        overrides: changes of every run, {"model.width": 32}.

    Raises:
        ValueError: an unknown run, scale or field.
    """
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
            config.update_from_flattened_dict(overrides)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{overrides} does not fit {file}: {error}") from error
        configs[name] = open_config(config)
    return configs


def claim(folder: Path, file: str, scale: str, overrides: dict[str, Any]) -> None:
    """Writes experiment.json, or checks that the folder is of this experiment.

    Raises:
        ValueError: it is not, or cannot be used.
    """
    path, here = Path(file).absolute(), Path.cwd()  # without folders of this machine if possible
    config = str(path.relative_to(here) if path.is_relative_to(here) else path)
    changes = {name: value for name, value in overrides.items() if name != "data_dir"}
    experiment = json.dumps({"config": config, "scale": scale, "overrides": changes})
    with usable(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / _FILE).exists():
            old = read_experiment(folder)
            if old != json.loads(experiment):
                raise ValueError(f"{folder} holds {old}, not {experiment}; take another --workdir")
        elif any(folder.iterdir()):
            raise ValueError(f"{folder} has files but no {_FILE}; take another --workdir")
        else:
            (folder / _FILE).write_text(experiment + "\n")


def read_experiment(folder: Path) -> dict[str, Any]:
    """The config (its file), scale and overrides of a sweep.

    Raises:
        ValueError: it is no folder of a sweep, or its experiment.json is damaged.
    """
    file = folder / _FILE
    if not file.exists():
        raise ValueError(f"{folder} has no {_FILE}; it is not made by train.sweep")
    experiment = read_fields(file)
    wrong = [name for name, kind in _KINDS.items() if not isinstance(experiment.get(name), kind)]
    if wrong:
        raise ValueError(damaged(file, f"no {', '.join(wrong)}"))
    return experiment
