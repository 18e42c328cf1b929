"""kill -9 at random moments, saves among them: a resumed run ends with the bits of another.

A run is started, killed, and started again on its workdir until it ends; then its last state is
compared, element by element, with that of a run nothing interrupted.
"""

import collections
import dataclasses
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

import train.loop.train
from benchmarks import record
from configs import vit_digits
from train.config import Config
from train.loop.log import read_records
from train.tasks import open_config

TMP = ".orbax-checkpoint-tmp"


def make_config(data_dir: str, num_steps: int) -> Config:
    """A run of configs/vit_digits.py that saves after every step."""
    config = vit_digits.get_config("smoke").unlock()
    config.update({"data_dir": data_dir, "num_steps": num_steps})
    config.update({"log_every_steps": 1, "eval_every_steps": 4, "checkpoint_every_steps": 1})
    return open_config(config.lock())


class Runs:
    """Starts `train` in processes that have imported it already and may be killed.

    Args:
        config: of every run.
        folder: for workdirs.
        cache: folder of what is compiled, for all of them.
        load_task: config -> the task, if it is not to be the config's.
    """

    def __init__(self, config: Config, folder: Path, cache: str, load_task: Any = None):
        self.config, self.folder = config, folder
        self._with = (cache, load_task)
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["train.loop.train", "configs.vit_digits"])

    def start(self, workdir: Path) -> Any:
        """A process that trains on `workdir`."""
        arguments = (self.config, str(workdir), *self._with)
        process = self._context.Process(target=_train, args=arguments)
        process.start()
        return process

    def finish(self, workdir: Path) -> tuple[float, float]:
        """Trains to the end; returns the seconds until the first step, and of a step."""
        times = [time.monotonic()]
        process = self.start(workdir)
        for done in (_is_stepping(workdir), lambda: not process.is_alive()):
            while process.is_alive() and not done():
                time.sleep(0.005)
            times.append(time.monotonic())
        _check_ended_well(process, workdir)
        return times[1] - times[0], (times[2] - times[1]) / self.config.num_steps


def _train(config: Config, workdir: str, cache: str, load_task: Any) -> None:
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    out = os.open(str(Path(workdir).with_suffix(".log")), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    if load_task is not None:
        train.loop.train.load_task = load_task
    train.loop.train.train(config, workdir)


def _check_ended_well(process: Any, workdir: Path) -> None:
    process.join()
    if process.exitcode:
        said = workdir.with_suffix(".log").read_text()[-2000:]
        raise RuntimeError(f"train ended with status {process.exitcode}: {said}")


def kill(
    runs: Runs, workdir: Path, rng: random.Random, steps: int, seconds: tuple[float, float]
) -> dict[str, Any] | None:
    """Starts or resumes the run and kills it. None if it had ended before.

    Args:
        steps: of how many the kill is to be within; 0: before the first.
        seconds: that a start and a step take, of `Runs.finish`.

    Returns:
        What was hit: {"moment": "start", "steps" or "save", "saved": newest step on the disk}.
    """
    unfinished, stepping = _unfinished(workdir), _is_stepping(workdir)
    delay = rng.uniform(0, steps * seconds[1] if steps else seconds[0])
    process = runs.start(workdir)
    while steps and process.is_alive() and not stepping():
        time.sleep(0.005)
    process.join(delay)
    if not process.is_alive():
        _check_ended_well(process, workdir)
        return None
    process.kill()
    process.join()
    moment = "steps" if stepping() else "start"
    if _unfinished(workdir) - unfinished:
        moment = "save"
    saved = [int(path.name) for path in _checkpoints(workdir) if path.name.isdigit()]
    return {"moment": moment, "saved": max(saved, default=0)}


def measure(runs: Runs, kills: int, seed: int) -> dict[str, Any]:
    """`kills` kills of as many runs as it takes, and how many elements of their ends differ."""
    rng = random.Random(seed)
    straight, last = runs.folder / "straight", runs.config.num_steps
    seconds = runs.finish(straight)
    expected = arrays(straight, last)
    hits, count, differing, number = [], 0, 0, 0
    while len(hits) < kills:
        workdir = runs.folder / f"killed{number}"
        hit: dict | None = {}
        while hit is not None and len(hits) < kills:
            hit = kill(runs, workdir, rng, 0 if len(hits) % 4 == 3 else last // 3, seconds)
            hits += [hit] if hit else []
        runs.finish(workdir)
        found = arrays(workdir, last)
        differing += differ(found, expected)
        count += sum(array.size for array in found)
        if _losses(workdir) != _losses(straight):
            raise RuntimeError(f"run {number} of seed {seed} has other metrics than the other run")
        number += 1
    return {
        "kills": len(hits),
        "seed": seed,
        "runs": number,
        "moments": dict(collections.Counter(hit["moment"] for hit in hits)),
        "before_first_checkpoint": sum(not hit["saved"] for hit in hits),
        "compared_elements": count,
        "differing_elements": differing,
        "differing_elements_one_step_before": differ(arrays(straight, last - 1), expected),
        "hits": hits,
    }


def arrays(workdir: Path, step: int) -> list[np.ndarray]:
    """All arrays of a checkpoint, as Orbax alone reads it."""
    state = ocp.PyTreeCheckpointer().restore(workdir / "checkpoints" / str(step) / "state")
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


def differ(found: list[np.ndarray], expected: list[np.ndarray]) -> int:
    """Elements whose bits differ."""
    pairs = zip(found, expected, strict=True)
    return sum(int(np.sum(_bits(a) != _bits(b))) for a, b in pairs)


def _bits(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(f"u{array.dtype.itemsize}")


def _losses(workdir: Path) -> list[tuple]:
    return [(r["step"], r["kind"], r["loss"]) for r in read_records(workdir) if "loss" in r]


def _is_stepping(workdir: Path) -> Callable[[], bool]:
    """Whether the run has come to its steps since now."""

    def starts() -> int:
        return sum(record["kind"] == "start" for record in read_records(workdir))

    before = starts()
    return lambda: starts() > before


def _unfinished(workdir: Path) -> set[tuple[str, int]]:
    """Saves that were not complete."""
    paths = [path for path in _checkpoints(workdir) if TMP in path.name]
    return {(path.name, path.stat().st_ino) for path in paths}


def _checkpoints(workdir: Path) -> list[Path]:
    folder = workdir / "checkpoints"
    return [*folder.iterdir()] if folder.exists() else []


def main(argv: list[str]) -> dict[str, Any]:
    """Measures and writes kills.json."""
    options = record.parser(__doc__)
    options.add_argument("--seed", type=int, default=0, help="of the moments")
    args = record.parse(options, argv)
    kills, steps = (2, 6) if args.toy else (20, 24)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = make_config(str(folder / "data"), steps)
        results = measure(Runs(config, folder, str(folder / "compiled")), kills, args.seed)
    config = dataclasses.asdict(config) | {"data_dir": ""}
    record.write("kills", results, config, argv=argv, args=args)
    print({name: value for name, value in results.items() if name != "hits"})
    return results


if __name__ == "__main__":
    main(sys.argv[1:])
