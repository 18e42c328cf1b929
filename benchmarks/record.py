"""What the programs share: options, and where a result came from, beside the numbers."""

import argparse
import contextlib
import dataclasses
import datetime
import json
import os
import platform
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

_HERE = Path(__file__).parent
RESULTS = _HERE / "results"


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The options every benchmark has: --out, and --toy or --gpu sizes."""
    options = argparse.ArgumentParser(description=doc, allow_abbrev=False)
    options.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON")
    size = options.add_mutually_exclusive_group()
    size.add_argument("--toy", action="store_true", help="seconds, for tests; needs --out")
    size.add_argument("--gpu", action="store_true", help="sizes that fill a GPU")
    return options


def parse(options: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """argv parsed, without the chance of toy numbers in the committed results."""
    args = options.parse_args(argv)
    if args.toy and args.out == RESULTS:
        options.error("--toy needs --out DIR: the default folder holds the committed results")
    return args


def cpu_devices(count: int) -> None:
    """Lets a CPU stand for so many devices, unless there are devices already."""
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", count)


def write(
    name: str, results: Any, config: dict[str, Any], *, argv: list[str], args: argparse.Namespace
) -> Path:
    """Writes NAME.json, or NAME_gpu.json on a GPU, into args.out.

    Args:
        name: of the benchmark, as in python -m benchmarks.NAME.
        results: what was measured, JSON-able.
        config: the sizes it was measured with; dataclasses too.
        argv: the command line; --out is left out of the record, it is not part of the result.
        args: argv parsed.

    Returns:
        The path of the file.
    """
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{stem(name)}.json"
    flags = os.environ.get("XLA_FLAGS", "").split()
    pairs = zip(["", *argv], argv, strict=False)  # (the word before, word)
    words = [w for before, w in pairs if "--out" not in (before, w) and not w.startswith("--out=")]
    document = {
        "command": " ".join(["python", "-m", f"benchmarks.{name}", *words]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "xla_flags": [flag for flag in flags if "/" not in flag],  # no folders
        "device": _device() | ({"compile_target": args.target} if "target" in args else {}),
        "versions": _versions(),
        "config": config,
        "results": results,
    }
    path.write_text(json.dumps(document, indent=1, default=dataclasses.asdict) + "\n")
    return path


def stem(name: str) -> str:
    """The file name without its ending: results of a GPU stand beside those of the CPU."""
    backend = jax.default_backend()
    return name if backend == "cpu" else f"{name}_{backend}"


def device_name() -> str:
    """The GPU's name, or the CPU's model, as a figure says it."""
    device = _device()
    return device["cpu_model"] if device["platform"] == "cpu" else device["kind"]


def _device() -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "platform": jax.default_backend(),
        "kind": jax.devices()[0].device_kind,
        "cpu_model": models[0] if models else platform.machine(),
        "cpu_cores": os.cpu_count(),
    }


def _versions() -> dict[str, str]:
    project = tomllib.loads((_HERE.parent / "pyproject.toml").read_text())["project"]
    packages = {name: version(name) for name in ("jax", "jaxlib", "flax")}
    return {"python": platform.python_version(), **packages, "bdia_jax": project["version"]}
