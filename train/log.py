"""What a run tells: the progress line, metrics.jsonl and the training curve."""

import json
import time
from pathlib import Path

import matplotlib.pyplot as plt


class Log:
    """Writes workdir/metrics.jsonl and prints a line for every training record.

    Records beyond `start_step`, left by an interrupted run, are dropped, with the evaluation
    at `start_step`: the run makes them again.
    """

    def __init__(self, workdir: Path, start_step: int, num_steps: int, memory_bytes: int):
        self._file = workdir / "metrics.jsonl"
        self._num_steps = num_steps
        self._memory_bytes = memory_bytes
        self._mark = (time.monotonic(), start_step)
        kept = [
            record
            for record in read_records(workdir)
            if record["step"] < start_step + (record["kind"] == "train")
        ]
        self._file.write_text("".join(json.dumps(record) + "\n" for record in kept))

    def train(self, step: int, batch_size: int, **metrics: float) -> None:
        """Speed is measured between calls, without the seconds evaluation has taken."""
        then, step_then = self._mark
        self._mark = (time.monotonic(), step)
        seconds_per_step = (self._mark[0] - then) / max(1, step - step_then)
        speed = batch_size / seconds_per_step
        self._write(step, "train", **metrics, images_per_second=speed)
        eta = int(seconds_per_step * (self._num_steps - step))
        print(
            f"step {step}/{self._num_steps} {100 * step // self._num_steps}%"
            f"  loss {metrics['loss']:.3f}  acc {metrics['accuracy']:.3f}"
            f"  lr {metrics['learning_rate']:.1e}  {speed:.0f} img/s"
            f"  {format_bytes(self._memory_bytes)}  ETA {eta // 60}:{eta % 60:02d}",
            flush=True,
        )

    def evaluation(self, step: int, seconds: float, **metrics: float) -> None:
        self._mark = (self._mark[0] + seconds, self._mark[1])
        self._write(step, "eval", **metrics)
        print(
            f"step {step}  eval loss {metrics['loss']:.3f}  acc {metrics['accuracy']:.4f}",
            flush=True,
        )

    def _write(self, step: int, kind: str, **metrics: float) -> None:
        with self._file.open("a") as file:
            file.write(json.dumps({"step": step, "kind": kind, **metrics}) + "\n")


def read_records(workdir: Path) -> list[dict]:
    """The records of metrics.jsonl; an incomplete last line is left out."""
    file = workdir / "metrics.jsonl"
    records = []
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def draw_curve(workdir: Path) -> None:
    """workdir/curve.png: loss and accuracy against step, training and evaluation."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    records = read_records(workdir)
    for axis, metric in zip(axes, ("loss", "accuracy"), strict=True):
        for kind, style in (("train", "C0-"), ("eval", "C1o-")):
            points = [
                (record["step"], record[metric]) for record in records if record["kind"] == kind
            ]
            if points:
                axis.plot(
                    *zip(*points, strict=True), style, label=kind, linewidth=1.2, markersize=3
                )
        axis.set_xlabel("step")
        axis.set_ylabel(metric)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    axes[0].set_yscale("log")
    figure.savefig(workdir / "curve.png", dpi=120)
    plt.close(figure)


def format_bytes(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
