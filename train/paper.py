"""The whole paper in one command: every experiment swept and reported, the most important first.

    python -m train.paper --out benchmarks/results [--scale smoke] [--set model.dtype=bfloat16]

Interrupted, it goes on where it was: every run resumes on its workdir. An experiment whose data
is not prepared is told and left out. Fine-tuning (configs/gpt2_e2e.py) is not among them: it
starts from a checkpoint that you bring.
"""

import argparse
import ast
import shlex
import sys
from pathlib import Path
from typing import Any

from absl import logging

from train.cli import parse_args, told
from train.report import report
from train.sweep import make_configs, sweep

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


def run(
    name: str, workdir: Path, out: Path, scale: str, overrides: dict[str, Any], command: str
) -> list[str]:
    """Sweeps and reports one experiment; what went wrong, a line each."""
    folder = workdir / "_".join(filter(None, (name, scale)))
    failures = []
    try:
        failures += sweep(_file(name), str(folder), scale, None, overrides, command)
        print(report(folder, out))
    except (ValueError, FileNotFoundError) as error:
        if type(error) not in (ValueError, FileNotFoundError):
            raise
        failures.append(str(error))
    return [f"{name}: {failure}" for failure in failures]


def _file(name: str) -> str:
    return str(_CONFIGS / f"{name}.py")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--workdir", type=Path, default=Path("runs"), help="of all sweeps")
    parser.add_argument("--out", type=Path, required=True, help="folder for tables and figures")
    parser.add_argument("--scale", default="", help="smoke, or small for --only those with it")
    parser.add_argument("--only", nargs="+", choices=EXPERIMENTS, default=[*EXPERIMENTS])
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="FIELD=VALUE", help="changes of every config"
    )
    args = parse_args(parser, argv)
    logging.set_verbosity(logging.ERROR)  # TFDS and Orbax tell every step they take
    overrides = {}
    for change in args.set:
        field, equals, value = change.partition("=")
        if not equals:
            parser.error(f"--set {change}: expected FIELD=VALUE, for example num_steps=7800")
        try:
            overrides[field] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            overrides[field] = value
    plans = {name: {"num_seeds": EXPERIMENTS[name]} | overrides for name in args.only}
    with told():
        for name, changes in plans.items():
            make_configs(_file(name), args.scale, None, changes)  # all, before the first hour
    command = shlex.join(["python", "-m", "train.paper", *(argv or sys.argv[1:])])
    failures = []
    for name, changes in plans.items():
        print(f"##### {name}", flush=True)
        failures += run(name, args.workdir, args.out, args.scale, changes, command)
    if failures:
        sys.exit("error: " + "\n".join(failures))


if __name__ == "__main__":
    main()
