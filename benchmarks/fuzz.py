"""Wrong command lines and configs: is each accepted, or refused by an error of ours?

    python -m benchmarks.fuzz [--cases 10000] [--traced 200] [--first 0]

A case is made from its number (`benchmarks.fuzz_cases`) and given to the program in this process,
up to where training would begin. It is refused well by a line "error: ..." whose exception was
raised in this repository, or by the usage of argparse; any other exception is a failure, named
with its number. Of --traced more, at smoke sizes, the training step is traced besides: what a
config is accepted with, the program can be built from. And --processes are run as a user does.
"""

import json
import logging
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

from absl import flags
from ml_collections import ConfigDict

from benchmarks import record
from benchmarks.fuzz_cases import Case, make_case, make_tiny
from benchmarks.outcome import FAILED, Outcome, outcome_of
from train import cli
from train.config import Config
from train.datasets.registry import open_split
from train.loop.program import check_fits, lower_steps, make_program
from train.run.workdir import holds_run, open_workdir, read_config
from train.tasks import load_task, open_config

_HERE = Path(__file__).parent.parent


def run_case(case: Case, scratch: Path, train: Callable[..., Any]) -> Outcome:
    """What the program of a case does with it.

    Args:
        case: of `make_case`.
        scratch: of `make_scratch`; the current folder meanwhile.
        train: stands for train.loop.train.train.
    """
    arguments = [argument.replace("{S}", str(scratch)) for argument in case.arguments]
    before = Path.cwd()
    try:
        os.chdir(scratch)
        return outcome_of(lambda: _run(case, arguments, scratch, train))
    finally:
        os.chdir(before)


def _run(case: Case, arguments: list[str], scratch: Path, train: Callable[..., Any]) -> None:
    name = case.program
    if name == "config":
        with cli.told():
            open_config(ConfigDict(case.values))
    elif name == "config.json":
        (scratch / "damaged" / "config.json").write_bytes(case.values)
        with cli.told():
            read_config(scratch / "damaged")
    elif name in ("train", "sweep", "launch"):
        _run_absl(name, arguments, train)
    else:
        import_module(f"train.{name}").main(arguments)


def checked(config: Config, workdir: str, command: str = "") -> dict[str, float]:
    """What training does before it reads the examples."""
    del command
    if holds_run(workdir):
        open_workdir(workdir, config)
    for split in (config.train_split, config.eval_split):
        open_split(config.dataset, split, config.data_dir)
    open_workdir(workdir, config)
    return {}


def traced(config: Config, workdir: str, command: str = "") -> dict[str, float]:
    """What training does before the first step, but for compiling it."""
    checked(config, workdir, command)
    program = make_program(config, load_task(config))
    check_fits(program)
    lower_steps(program)
    return {}


_MODULES = {"sweep": "train.sweep", "train": "train.__main__", "launch": "train.launch"}
_flags: dict[str, dict[str, Any]] = {}


def _run_absl(name: str, arguments: list[str], train: Callable[..., Any]) -> None:
    """A program whose flags are absl's, which are global: only its own are defined meanwhile."""
    if not _flags:
        for each, module in _MODULES.items():
            module = import_module(module)
            own = {f.name: f for f in flags.FLAGS.flags_by_module_dict()[module.__name__]}
            if each == "train":
                flags.mark_flag_as_required("config")
            _flags[each] = own
            for flag in own:
                delattr(flags.FLAGS, flag)
    module: Any = import_module(_MODULES[name])
    stand_ins = {
        "train": {"train": train, "join": lambda *_: None},
        "sweep": {"train": train},
        "launch": {"launch": lambda *_: 0},
    }
    levels = logging.root.level, logging.root.handlers[:]
    try:
        for flag, definition in _flags[name].items():
            flags.FLAGS[flag] = definition
        argv = mock.patch.object(sys, "argv", [name, *arguments])
        with mock.patch.multiple(module, **stand_ins[name]), argv:
            cli.run(module.main)
    finally:
        for flag in [*flags.FLAGS]:
            if flag in _flags[name] or flag.startswith("config."):
                delattr(flags.FLAGS, flag)
        flags.FLAGS.unparse_flags()
        for definition in _flags[name].values():
            definition.unparse()
        logging.root.setLevel(levels[0])
        logging.root.handlers[:] = levels[1]


def make_scratch(folder: Path) -> Path:
    """A folder with what the cases name in it."""
    for name in ("empty", "others", "damaged", "sweep"):
        (folder / name).mkdir(parents=True)
    (folder / "file").write_text("--nonsense\n")
    (folder / "others" / "a").write_text("b")
    (folder / "broken.py").write_text("def get_config(:\n")
    (folder / "raises.py").write_text("def get_config(arg=None):\n    return {}['x']\n")
    (folder / "none.py").write_text("def get_config(arg=None):\n    pass\n")
    (folder / "damaged" / "config.json").write_text('{"seed": ')
    (folder / "sweep" / "experiment.json").write_text('{"config": 3}')
    experiment = import_module("configs.vit_digits").get_config("smoke")
    open_workdir(str(folder / "workdir"), open_config(experiment))
    return folder


def as_user(seeds: range, scratch: Path) -> list[dict[str, Any]]:
    """The outermost layer: command lines in processes of their own; those with a traceback."""
    failures = []
    for seed in seeds:
        case = make_case(seed)
        arguments = [a.replace("{S}", str(scratch)) for a in case.arguments]
        if case.program in ("config", "config.json", "launch") or "\0" in "".join(arguments):
            continue
        module = "train" if case.program == "train" else f"train.{case.program}"
        done = subprocess.run(
            [sys.executable, "-m", module, *(a.replace("\ud800", "?") for a in arguments)],
            cwd=scratch,
            env=os.environ | {"PYTHONPATH": str(_HERE)},
            capture_output=True,
            timeout=600,
            check=False,
        )
        if b"Traceback" in done.stderr or done.returncode not in (0, 1, 2):
            failures.append({"seed": seed, "stderr": done.stderr.decode()[-500:]})
    return failures


def fuzz(scratch: Path, cases: range, tiny: range, processes: range) -> dict[str, Any]:
    """Counts what the programs do with the cases of these numbers, and names the failures.

    Args:
        scratch: of `make_scratch`.
        cases: numbers of cases up to where training begins.
        tiny: of runs at smoke sizes, whose training step is traced besides.
        processes: of those run as a user does.
    """
    counts: dict[str, Counter] = {}
    failures = []
    todo = [(number, make_case, checked) for number in cases]
    todo += [(number, make_tiny, traced) for number in tiny]
    for number, make, train in todo:
        case = make(number)
        outcome = run_case(case, scratch, train)
        name = case.program if make is make_case else "traced"
        counts.setdefault(name, Counter())[outcome.kind] += 1
        if outcome.kind == FAILED:
            message = outcome.message.replace(str(scratch), "{S}").replace(str(_HERE), "")
            failures.append({"maker": make.__name__, "seed": number, "message": message})
            print(json.dumps(failures[-1]), flush=True)
    return {
        "totals": dict(sum(counts.values(), Counter())),
        "programs": {name: dict(each) for name, each in sorted(counts.items())},
        "failures": failures,
        "tracebacks_in_processes": as_user(processes, scratch),
    }


def main(argv: list[str]) -> dict[str, Any]:
    options = record.parser(__doc__)
    options.add_argument("--cases", type=int, default=10_000)
    options.add_argument("--traced", type=int, default=200)
    options.add_argument("--processes", type=int, default=20)
    options.add_argument("--first", type=int, default=0, help="number of the first case")
    args = record.parse(options, argv)
    counts = {name: getattr(args, name) for name in ("cases", "traced", "processes")}
    ranges = (range(args.first, args.first + count) for count in counts.values())
    with tempfile.TemporaryDirectory() as made:
        results = fuzz(make_scratch(Path(made) / "a" / "b" / "c"), *ranges)
    print(results["totals"], results["tracebacks_in_processes"])
    record.write("fuzz", results, counts | {"first": args.first}, argv=argv, args=args)
    return results


if __name__ == "__main__":
    main(sys.argv[1:])
