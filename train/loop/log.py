"""What a run tells: the progress line, metrics.jsonl and the training curve."""

import contextlib
import datetime
import json
import platform
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import matplotlib.pyplot as plt
import numpy as np

from train.config import Config
from train.devices.processes import is_first

_FILE = "metrics.jsonl"  # in a workdir


class Log:
    """Writes workdir/metrics.jsonl and prints a line for every training record.

    Records beyond `start_step`, left by an interrupted run, are dropped, with the evaluation
    at `start_step`: the run makes them again. (Not what was learned of guard bits.)

    Args:
        workdir: where the file is.
        config: the run's.
        start_step: where it begins or goes on.
        memory_bytes: what a step needs, for the progress line.
    """

    def __init__(self, workdir: Path, config: Config, start_step: int, memory_bytes: int):
        self._file = workdir / _FILE
        self._num_steps = config.num_steps
        self._batch_size = config.batch_size * config.num_seeds  # of all seeds together
        self._memory = _format_bytes(memory_bytes)
        self._mark = (time.monotonic(), start_step)
        kept = [
            record
            for record in read_records(workdir)
            if record["step"] < start_step + (record["kind"] in ("train", "start"))
            or record["kind"] == "rebuild"
        ]
        if not is_first():
            return
        rewritten = self._file.with_suffix(".tmp")
        rewritten.write_text("".join(json.dumps(record) + "\n" for record in kept))
        rewritten.replace(self._file)  # in one go, so that a kill cannot lose the history

    def start(self, **facts: Any) -> None:
        """Where the numbers that follow come from: date, device and versions besides `facts`."""
        self._write(self._mark[1], "start", **origin(), **facts)

    def train(self, step: int, **metrics: Any) -> None:
        """Metrics averaged since the last record. Speed leaves out what `pause` took."""
        then, step_then = self._mark
        self._mark = (time.monotonic(), step)
        seconds_per_step = (self._mark[0] - then) / max(1, step - step_then)
        speed = self._batch_size / seconds_per_step
        means = self._write(step, "train", **metrics, examples_per_second=speed)
        eta = int(seconds_per_step * (self._num_steps - step))
        print(
            f"step {step}/{self._num_steps} {100 * step // self._num_steps}%"
            f"  loss {means['loss']:.3f}"
            + (f"  acc {means['accuracy']:.3f}" if "accuracy" in means else "")
            + (f"  skipped {means['skipped']:g}" if means.get("skipped") else "")
            + f"  lr {means['learning_rate']:.1e}  {speed:.0f} ex/s"
            f"  {self._memory}  ETA {eta // 60}:{eta % 60:02d}",
            flush=True,
        )

    def rebuild(self, step: int, said: str, **facts: Any) -> None:
        """A step whose rebuild failed, and the guard bits it is made again with."""
        self._write(step, "rebuild", said=said, **facts)
        print(said, flush=True)

    def evaluation(self, step: int, **metrics: Any) -> None:
        """Metrics of the evaluation set."""
        means = self._write(step, "eval", **metrics)
        print(
            f"step {step}  eval"
            + "".join(f"  {name[:4]} {value:.4f}" for name, value in means.items()),
            flush=True,
        )

    def final(self, step: int, **metrics: Any) -> None:
        """The last record: this run is finished. Values as arrays or lists have one a seed."""
        self._write(step, "final", **{k: np.asarray(v) for k, v in metrics.items()})

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """What happens inside is not training and does not count as its time."""
        begin = time.monotonic()
        yield
        self._mark = (self._mark[0] + time.monotonic() - begin, self._mark[1])

    def _write(self, step: int, kind: str, **values: Any) -> dict[str, Any]:
        """One record: a metric is its mean over the seeds, with each seed's under "seeds"."""
        arrays = {
            k: v.tolist() for k, v in values.items() if isinstance(v, (np.ndarray, np.generic))
        }
        means = {k: float(np.mean(v)) if k in arrays else v for k, v in values.items()}
        seeds = {k: v for k, v in arrays.items() if isinstance(v, list)}
        record = {"step": step, "kind": kind, **means} | ({"seeds": seeds} if seeds else {})
        if is_first():
            with self._file.open("a") as file:
                file.write(json.dumps(record) + "\n")
        return means


def read_records(workdir: Path) -> list[dict]:
    """The records of metrics.jsonl; an incomplete last line, left by a kill, is left out.

    Raises:
        ValueError: another line is damaged, or has something else in it than a record.
    """
    file = workdir / _FILE
    lines = file.read_bytes().splitlines() if file.exists() else []
    records = []
    for number, line in enumerate(lines, 1):
        record: Any = None
        try:
            record = json.loads(line)
            wrong = _wrong_with(record)
        except (ValueError, RecursionError) as error:
            if number == len(lines):
                break
            wrong = f"{type(error).__name__}: {error}"
        if wrong:
            raise ValueError(
                f"line {number} of {file} is damaged ({wrong}); delete that line, the others tell "
                "the rest"
            )
        records.append(record)
    return records


_COUNT, _NUMBER = (int,), (int, float)
# What records are read for, of any kind and of a kind; what others have in them is theirs.
_TYPES: dict[str, dict[str, tuple[type, ...]]] = {
    "": {"step": _COUNT, "kind": (str,)},
    "start": {"fingerprint": (str,)},
    "rebuild": {"guard_bits": _COUNT},
}


def _wrong_with(record: Any) -> str:
    """What is wrong with the content of a record; "" for nothing."""
    if not isinstance(record, dict):
        return f"a {type(record).__name__} instead of fields"
    types = dict(_TYPES[""])
    if isinstance(record.get("kind"), str):
        types |= _TYPES.get(record["kind"], {}) if record["kind"] else {}
        if record["kind"] in ("train", "eval", "final"):
            types |= dict.fromkeys(metrics_of(record), _NUMBER)
    for name, kinds in types.items():
        value = record.get(name)
        if type(value) not in kinds:
            return f"{name[:50]} is {str(value)[:50]!r}, expected {kinds[-1].__name__}"
    seeds = record.get("seeds", {})
    if not isinstance(seeds, dict):
        return f"seeds is a {type(seeds).__name__}, expected fields"
    return ""


def mended_guard_bits(workdir: Path) -> int:
    """The guard bits that a run has taken after a rebuild failed; 0 if none did."""
    found = [r["guard_bits"] for r in read_records(workdir) if r["kind"] == "rebuild"]
    return max(found, default=0)


def metrics_of(record: dict[str, Any]) -> dict[str, float]:
    """The metrics of a record of an evaluation, means over the seeds."""
    return {k: v for k, v in record.items() if k not in ("step", "kind", "seeds")}


def final_metrics(workdir: Path) -> dict[str, float]:
    """What a finished run ended with; {} for one that is not finished."""
    final = [record for record in read_records(workdir) if record["kind"] == "final"]
    return metrics_of(final[-1]) if final else {}


def draw_curve(workdir: Path) -> None:
    """workdir/curve.png: loss and accuracy against step, training and evaluation."""
    records = read_records(workdir)
    metrics = [name for name in ("loss", "accuracy") if any(name in record for record in records)]
    figure, axes = plt.subplots(
        1, len(metrics), figsize=(4.5 * len(metrics), 3.2), layout="constrained", squeeze=False
    )
    for axis, metric in zip(axes[0], metrics, strict=True):
        for kind, style in (("train", "C0-"), ("eval", "C1o-")):
            points = [(r["step"], r[metric]) for r in records if r["kind"] == kind]
            if points:
                axis.plot(
                    *zip(*points, strict=True), style, label=kind, linewidth=1.2, markersize=3
                )
        axis.set_xlabel("step")
        axis.set_ylabel(metric)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    axes[0][0].set_yscale("log")
    figure.savefig(workdir / "curve.png", dpi=120)
    plt.close(figure)


def origin() -> dict[str, Any]:
    """Where and when a number is made: date, device, versions."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": device_name(),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("jax", "flax", "optax")},
    }


def device_name() -> str:
    """The GPU's name, or the CPU's model and number of cores in use."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def _format_bytes(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
