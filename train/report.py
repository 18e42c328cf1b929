"""Tables and figures of finished sweeps: python -m train.report runs/vit_digits [--out DIR]

For each workdir of `train.sweep`: NAME.md and NAME.csv, the paper's number next to ours; NAME.png,
the training and validation curves; NAME.json, all of it with device, versions, date, command.
"""

import argparse
import csv
import dataclasses
import json
import shlex
import statistics
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from train.cli import parse_args, told
from train.loop.log import metrics_of, read_records
from train.run.experiment import load_experiment, read_experiment
from train.run.workdir import read_values

_GAMMA = "accuracy_gamma_"  # and a constant gamma at inference: a metric for Fig. 1


@dataclasses.dataclass(frozen=True)
class Run:
    """One system of an experiment, as its workdir tells it.

    final: metric -> a value a seed, from the last evaluation and from what followed it.
    best: loss and accuracy -> likewise, of the evaluation that was each seed's best in it.
    curves: "train" and "eval" -> metric -> (steps, mean, standard deviation over seeds).
    """

    name: str
    paper: float | None
    steps: int
    num_steps: int
    epochs: float
    seconds_per_epoch: float
    temp_bytes: int
    final: dict[str, list[float]]
    best: dict[str, list[float]]
    curves: dict[str, dict[str, tuple[list[int], list[float], list[float]]]]
    origin: dict[str, Any]


def read_sweep(workdir: Path) -> tuple[Any, dict[str, Any], list[Run]]:
    """(the experiment's module, experiment.json and what has "not_run", the runs evaluated).

    Raises:
        ValueError: not the workdir of a sweep, or nothing in it to report yet.
    """
    about = read_experiment(workdir)
    module = load_experiment(about["config"])
    paper = {} if about["scale"] else module.PAPER  # its numbers are of its sizes
    runs, not_run = [], []
    for name in module.RUNS:
        records = read_records(workdir / name)
        if not any(record["kind"] == "eval" for record in records):
            not_run.append(name)
            continue
        try:
            runs.append(_read_run(workdir / name, records, paper.get(name)))
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
            raise ValueError(
                f"{workdir / name} is damaged, or of another version of this program "
                f"({type(error).__name__}: {error}); sweep into a new workdir"
            ) from error
    if not runs:
        raise ValueError(f"no run in {workdir} has been evaluated yet")
    return module, about | {"not_run": not_run}, runs


def _read_run(workdir: Path, records: list[dict[str, Any]], paper: float | None) -> Run:
    config = read_values(workdir)
    starts, trains, evals, finals = (
        [record for record in records if record["kind"] == kind]
        for kind in ("start", "train", "eval", "final")
    )
    start, last = starts[-1], evals[-1]
    per_epoch = start["steps_per_epoch"]
    # the first epoch is for warming up
    later = [record for record in trains if record["step"] > per_epoch]
    speed = statistics.median(record["examples_per_second"] for record in later or trains)
    return Run(
        name=workdir.name,
        paper=paper,
        steps=last["step"],
        num_steps=config["num_steps"],
        epochs=last["step"] / per_epoch,
        seconds_per_epoch=per_epoch * config["batch_size"] * config["num_seeds"] / speed,
        temp_bytes=start["temp_bytes"],
        final={name: _seeds(each, name) for each in [last, *finals] for name in metrics_of(each)},
        best={name: _best(evals, name) for name in ("loss", "accuracy") if name in last},
        curves={"train": _curves(trains), "eval": _curves(evals)},
        origin={name: start[name] for name in ("device", "versions", "date", "data_note")}
        | {"command": _command(start["command"])},
    )


def _seeds(record: dict, name: str) -> list[float]:
    """A metric's value for every seed."""
    return record.get("seeds", {}).get(name, [record[name]])


def _best(records: list[dict], name: str) -> list[float]:
    values = zip(*(_seeds(record, name) for record in records), strict=True)
    return [max(each) if name == "accuracy" else min(each) for each in values]


def _curves(records: list[dict]):
    names = [name for name in ("loss", "accuracy") if records and name in records[0]]
    return {
        name: (
            [record["step"] for record in records],
            [record[name] for record in records],
            [float(np.std(_seeds(record, name))) for record in records],
        )
        for name in names
    }


def _command(command: str) -> str:
    """The command line without folders of the machine it ran on."""
    kept, skip = [], False
    for word in shlex.split(command):
        name = word.removeprefix("--set=").split("=")[0]
        is_folder = name in ("--workdir", "--out", "--config.data_dir", "data_dir")
        if not skip and not is_folder:
            kept.append(word)
        skip = is_folder and "=" not in word  # its value comes next
    return shlex.join(kept)


def rows(runs: list[Run], metric: str) -> list[dict[str, str]]:
    """The table, a dict a run. Accuracy in %, +- the sample standard deviation over seeds."""
    table = []
    for run in runs:
        row = {"run": run.name}
        if any(other.paper is not None for other in runs):
            row["paper"] = "" if run.paper is None else f"{run.paper:.2f}"
        for name, values in run.final.items():
            if not name.startswith(_GAMMA):
                row[name] = _mean_and_std(name, values)
        row[f"best {metric}"] = _mean_and_std(metric, run.best[metric])
        row["seeds"] = str(len(run.final[metric]))
        row["epochs"] = f"{run.epochs:.1f}"
        if run.steps < run.num_steps:
            row["epochs"] += f" (step {run.steps} of {run.num_steps})"
        row["s / epoch"] = f"{run.seconds_per_epoch:.1f}"
        row["step MiB"] = f"{run.temp_bytes / 2**20:.1f}"
        table.append(row)
    return table


def _mean_and_std(name: str, values: list[float]) -> str:
    scale, digits = (100, 2) if name.startswith("accuracy") else (1, 2 if name == "bleu" else 4)
    text = f"{scale * statistics.mean(values):.{digits}f}"
    if len(values) > 1:
        text += f" ± {scale * statistics.stdev(values):.{digits}f}"
    return text


def _markdown(title: str, header: list[str], table: list[dict], runs: list[Run], not_run) -> str:
    """The table, with where its numbers come from below."""
    lines = [f"# {title}", "", "| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    lines += ["| " + " | ".join(row.get(name, "") for name in header) + " |" for row in table]
    lines += ["", f"Not run yet: {', '.join(not_run)}."] if not_run else []
    for origin in dict.fromkeys(_origin(run) for run in runs):
        lines += ["", origin]
    lines += [
        "",
        "± is the standard deviation over seeds, which are trained side by side: seconds and "
        "memory are of all of them together.",
    ]
    notes = {run.origin["data_note"] for run in runs} - {None}
    lines += [f"Data: {note}." for note in sorted(notes)]
    return "\n".join(lines) + "\n"


def _origin(run: Run) -> str:
    origin = run.origin
    versions = ", ".join(f"{name} {number}" for name, number in origin["versions"].items())
    return f"{origin['device']}, {versions}, {origin['date'][:10]}. `{origin['command']}`"


def draw(path: Path, runs: list[Run]) -> None:
    """Training (thin) and validation curves, and accuracy against gamma at inference (Fig. 1)."""
    metrics = list(runs[0].curves["eval"])
    gammas = [
        {float(name.removeprefix(_GAMMA)): run.final[name] for name in run.final if _GAMMA in name}
        for run in runs
    ]
    count = len(metrics) + any(gammas)
    figure, axes = plt.subplots(
        1, count, figsize=(4.6 * count, 3.4), layout="constrained", squeeze=False
    )
    for axis, metric in zip(axes[0], metrics, strict=False):
        for index, run in enumerate(runs):
            steps, mean, _ = run.curves["train"].get(metric, ([], [], []))
            axis.plot(steps, mean, f"C{index}-", linewidth=0.7, alpha=0.6)
            steps, mean, std = (np.asarray(v) for v in run.curves["eval"][metric])
            axis.plot(steps, mean, f"C{index}o-", linewidth=1.6, markersize=3, label=run.name)
            axis.fill_between(steps, mean - std, mean + std, color=f"C{index}", alpha=0.2)
        axis.set(xlabel="step", ylabel=f"{metric} (thin: training)")
    for index, of_run in enumerate(gammas):
        if of_run:
            points = [(gamma, 100 * np.asarray(of_run[gamma])) for gamma in sorted(of_run)]
            columns = zip(*((gamma, v.mean(), v.std()) for gamma, v in points), strict=True)
            style = {"color": f"C{index}", "marker": "o", "markersize": 3, "capsize": 2}
            axes[0][-1].errorbar(*columns, label=runs[index].name, **style)
            axes[0][-1].set(xlabel="constant gamma at inference", ylabel="accuracy, %")
    for axis in axes[0]:
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def report(workdir: Path, out: Path) -> str:
    """Writes the four files of a sweep into `out`; returns the table as Markdown.

    Raises:
        ValueError: as `read_sweep`.
    """
    module, about, runs = read_sweep(workdir)
    changes = [f"{k}={v}" for k, v in about["overrides"].items() if k != "num_seeds"]
    changes += [f"scale {about['scale']}"] if about["scale"] else []
    title = module.__doc__.splitlines()[0].rstrip(".")
    title += f" ({', '.join(changes)})" if changes else ""
    metric = getattr(module, "METRIC", "accuracy")
    metric = metric if all(metric in run.best for run in runs) else "loss"  # it may be left out
    table = rows(runs, metric)
    header = list(dict.fromkeys(name for row in table for name in row))  # not finished: fewer
    document = {"title": title, **about, **runs[0].origin}
    document |= {"results": {run.name: dataclasses.asdict(run) for run in runs}}
    text = _markdown(title, header, table, runs, about["not_run"])
    stem = "_".join(filter(None, (Path(about["config"]).stem, about["scale"])))
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{stem}.md").write_text(text)
    with (out / f"{stem}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, header, restval="")
        writer.writeheader()
        writer.writerows(table)
    draw(out / f"{stem}.png", runs)
    (out / f"{stem}.json").write_text(json.dumps(document, indent=1) + "\n")
    return text


def main(argv: list[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    options.add_argument("workdirs", nargs="+", type=Path, help="workdirs of train.sweep")
    options.add_argument("--out", type=Path, help="folder for the files; the workdir by default")
    args = parse_args(options, argv)
    for workdir in args.workdirs:
        with told():
            print(report(workdir, args.out or workdir))


if __name__ == "__main__":
    main()
