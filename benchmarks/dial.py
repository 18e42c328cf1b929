"""Loss against |gamma|, of the sweeps that turn it: python -m benchmarks.dial [--out FOLDER]

Reads what `train.report` wrote of configs/dial_*.py and configs/smollm2_*.py into the folder, and
draws dial.png beside it: held-out loss at the end of the run and at its best evaluation, and in
lines what plain training has, without and with dropout. Nothing is trained here.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import figure, record

PANELS = {
    "dial_text_little": "16 kB of Shakespeare,\nfrom scratch",
    "dial_cifar10_little": "1,000 images of CIFAR-10,\nfrom scratch",
    "dial_text": "all of Shakespeare,\nfrom scratch",
    "smollm2_e2e": "SmolLM2-135M,\nfine-tuned on E2E",
}
_LINES = {"plain": "plain", "plain_dropout_0.1": "plain, dropout 0.1"}


def draw(reports: dict[str, dict[str, Any]], path: Path) -> None:
    """A panel for each report, by the name of its file."""
    title = "Held-out loss against |gamma|, mean and standard deviation over seeds"
    with figure.panels(path, title, (3.4 * len(reports), 3.6), len(reports)) as axes:
        for axis, (name, report) in zip(axes, reports.items(), strict=True):
            _draw_panel(axis, PANELS[name], report["results"])
        axes[0].set_ylabel("loss, nats", fontsize=9)


def _draw_panel(axis: Any, title: str, runs: dict[str, Any]) -> None:
    powers = [p for p in range(1, 8) if f"bdia_{2.0**-p}" in runs]
    found = [runs[f"bdia_{2.0**-p}"] for p in powers]
    for when, style, label in (("final", "o-", "BDIA, at the end"), ("best", "o--", "at its best")):
        losses = [run[when]["loss"] for run in found]
        means = [np.mean(each) for each in losses]
        scatter = [np.std(each, ddof=1) if len(each) > 1 else 0.0 for each in losses]
        axis.errorbar(powers, means, scatter, fmt=style, color="C0", capsize=2, label=label)
    for color, (name, label) in zip(("0.3", "C1"), _LINES.items(), strict=True):
        if name in runs:
            axis.axhline(np.mean(runs[name]["final"]["loss"]), color=color, lw=1, label=label)
            axis.axhline(np.mean(runs[name]["best"]["loss"]), color=color, lw=1, ls="--")
    # the format that each takes: p bits, and a guard bit
    axis.set_xticks(powers, [f"1/{2**p}\n{p + 1} bits" for p in powers])
    figure.caption(axis, title, grid="y")
    axis.legend(fontsize=7, frameon=False)


def main(argv: list[str]) -> None:
    """Draws those of the reports that are there."""
    options = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    options.add_argument("--out", type=Path, default=record.RESULTS, help="of reports and figure")
    folder: Path = options.parse_args(argv).out
    files = {name: folder / f"{name}.json" for name in PANELS}
    reports = {name: json.loads(f.read_text()) for name, f in files.items() if f.exists()}
    if not reports:
        options.error(f"{folder} has none of {', '.join(PANELS)}.json; make them by train.report")
    draw(reports, folder / "dial.png")


if __name__ == "__main__":
    main(sys.argv[1:])
