"""kill -9 at random moments, saves among them: a resumed run ends with the bits of another.

A run is started, killed, and started again on its workdir until it ends; then its last state is
compared, element by element, with that of a run nothing interrupted.
"""

import collections
import dataclasses
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import record
from configs import vit_digits
from train.config import Config
from train.loop.log import read_records
from train.loop.program import make_program
from train.loop.train import train
from train.run.checkpoint import Checkpoints
from train.tasks import load_task, open_config

TMP = ".orbax-checkpoint-tmp"


def make_config(data_dir: str, arg: str = "smoke", num_steps: int = 24) -> Config:
    """A run of configs/vit_digits.py that saves after every step."""
    config = vit_digits.get_config(arg).unlock()
    config.update({"data_dir": data_dir, "num_steps": num_steps})
    config.update({"log_every_steps": 1, "eval_every_steps": 4, "checkpoint_every_steps": 1})
    return open_config(config.lock())


class Runs:
    """Starts `train` in processes that have imported it already and may be killed.

    Args:
        config: of every run.
        folder: for workdirs and what is compiled.
        unoptimized: whether programs are to compile fast rather than run fast.
    """

    def __init__(self, config: Config, folder: Path, unoptimized: bool = False):
        self.config, self.folder = config, folder
        self._settings = {
            "jax_compilation_cache_dir": str(folder / "compiled"),
            "jax_persistent_cache_min_compile_time_secs": 0.0,
            "jax_persistent_cache_min_entry_size_bytes": -1,
            "jax_disable_most_optimizations": unoptimized,
        }
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["train.loop.train", "configs.vit_digits"])

    def start(self, workdir: Path) -> Any:
        """A process that trains on `workdir`."""
        arguments = (self.config, str(workdir), self._settings)
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


def _train(config: Config, workdir: str, settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        jax.config.update(name, value)
    out = os.open(str(Path(workdir).with_suffix(".log")), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    train(config, workdir)


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
    return {"moment": moment, "saved": max(_saved(workdir), default=0)}


def measure(runs: Runs, kills: int, seed: int) -> dict[str, Any]:
    """`kills` kills of as many runs as it takes, and how many elements of their ends differ."""
    rng = random.Random(seed)
    straight = runs.folder / "straight"
    runs.finish(straight)
    expected = final_arrays(straight, runs.config)
    again = runs.folder / "again"
    seconds = runs.finish(again)  # with all programs compiled
    hits, count, differing, number = [], 0, differ(final_arrays(again, runs.config), expected), 0
    while len(hits) < kills:
        workdir = runs.folder / f"killed{number}"
        hit: dict | None = {}
        while hit is not None and len(hits) < kills:
            steps = 0 if len(hits) % 4 == 3 else runs.config.num_steps // 3
            hit = kill(runs, workdir, rng, steps, seconds)
            hits += [hit] if hit else []
        runs.finish(workdir)
        found = final_arrays(workdir, runs.config)
        differing += differ(found, expected)
        count += sum(array.size for array in found)
        same = _metrics(workdir) == _metrics(straight)
        if not same:
            raise RuntimeError(f"run {number} of seed {seed} has other metrics than the other run")
        number += 1
    shutil.rmtree(straight / "checkpoints" / str(runs.config.num_steps))
    return {
        "kills": len(hits),
        "seed": seed,
        "runs": number,
        "moments": dict(collections.Counter(hit["moment"] for hit in hits)),
        "before_first_checkpoint": sum(not hit["saved"] for hit in hits),
        "compared_elements": count,
        "differing_elements": differing,
        "differing_elements_one_step_before": differ(final_arrays(straight, runs.config), expected),
        "hits": hits,
    }


def final_arrays(workdir: Path, config: Config) -> list[np.ndarray]:
    """All arrays of the newest state."""
    program = make_program(config, load_task(config))
    with Checkpoints(workdir, read_only=True) as checkpoints:
        state = checkpoints.restore(program.abstract_state)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


def differ(found: list[np.ndarray], expected: list[np.ndarray]) -> int:
    """Elements whose bits differ."""
    pairs = zip(found, expected, strict=True)
    return sum(int(np.sum(_bits(a) != _bits(b))) for a, b in pairs)


def _bits(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(f"u{array.dtype.itemsize}")


def _metrics(workdir: Path) -> list[tuple]:
    return [(r["step"], r["kind"], r["loss"]) for r in read_records(workdir) if "loss" in r]


def _is_stepping(workdir: Path) -> Callable[[], bool]:
    """Whether the run has come to its steps since now."""

    def starts() -> int:
        return sum(record["kind"] == "start" for record in read_records(workdir))

    before = starts()
    return lambda: starts() > before


def _saved(workdir: Path) -> list[int]:
    return [int(path.name) for path in _checkpoints(workdir) if path.name.isdigit()]


def _unfinished(workdir: Path) -> set[tuple[str, int]]:
    """Saves that were not complete."""
    found = set()
    for path in _checkpoints(workdir):
        if TMP in path.name:
            found.add((path.name, path.stat().st_ino))
    return found


def _checkpoints(workdir: Path) -> list[Path]:
    folder = workdir / "checkpoints"
    return [*folder.iterdir()] if folder.exists() else []


def main(argv: list[str]) -> dict[str, Any]:
    """Measures and writes kills.json."""
    options = record.parser(__doc__)
    options.add_argument("--seed", type=int, default=0, help="of the moments")
    args = record.parse(options, argv)
    kills, steps = (2, 6) if args.toy else (20, 24)
    with tempfile.TemporaryDirectory() as folder:
        config = make_config(str(Path(folder) / "data"), num_steps=steps)
        results = measure(Runs(config, Path(folder)), kills, args.seed)
    config = dataclasses.asdict(config) | {"data_dir": ""}
    record.write("kills", results, config, argv=argv, args=args)
    print({name: value for name, value in results.items() if name != "hits"})
    return results


if __name__ == "__main__":
    main(sys.argv[1:])
