"""Loss against |gamma|: python -m benchmarks.dial [--out FOLDER]

Draws dial.png in the folder of what it reads there: checkpoint.json of `benchmarks.checkpoint`, a
pre-trained network before any step, and what `train.report` wrote of configs/dial_*.py, small
networks from scratch. Nothing is trained here.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import figure, record

CHECKPOINT = "checkpoint"
SWEEPS = {
    "dial_text_little": "small GPT on 16 kB of Shakespeare,\ntrained from scratch",
    "dial_cifar10_little": "small ViT on 1,000 images of CIFAR-10,\ntrained from scratch",
    "dial_text": "small GPT on all of Shakespeare,\ntrained from scratch",
}
_LINES = {"plain": "plain", "plain_dropout_0.1": "plain, dropout 0.1"}


def draw(documents: dict[str, dict[str, Any]], path: Path) -> None:
    """A panel for each document, by the name of its file."""
    title = "Loss against |gamma|, and the bits that each activation and block keeps for it"
    with figure.panels(path, title, (3.8 * len(documents), 3.6), len(documents)) as axes:
        for axis, (name, document) in zip(axes, documents.items(), strict=True):
            if name == CHECKPOINT:
                _draw_checkpoint(axis, document)
            else:
                _draw_sweep(axis, SWEEPS[name], document["results"])
            axis.legend(fontsize=7, frameon=False)
        axes[0].set_ylabel("loss, nats", fontsize=9)


def _draw_checkpoint(axis: Any, document: dict[str, Any]) -> None:
    results = document["results"]
    powers = _powers(results["gammas"], "{}")
    rows = [results["gammas"][str(2.0**-p)] for p in powers]
    for draw, losses in enumerate(zip(*(row["losses"] for row in rows), strict=True)):
        label = "in training mode, three draws" if draw == 0 else None
        axis.plot(powers, losses, "o-", color="C0", lw=0.8, ms=3, label=label)
    axis.axhline(results["eval_loss"]["float"], color="0.3", lw=1, label="gamma 0")
    _label(axis, f"{document['config']['model']}, pre-trained plain,\nbefore any step", powers)


def _draw_sweep(axis: Any, title: str, runs: dict[str, Any]) -> None:
    powers = _powers(runs, "bdia_{}")
    for when, style, label in (("final", "o-", "BDIA, at the end"), ("best", "o--", "at its best")):
        losses = [runs[f"bdia_{2.0**-p}"][when]["loss"] for p in powers]
        means = [np.mean(each) for each in losses]
        scatter = [np.std(each, ddof=1) if len(each) > 1 else 0.0 for each in losses]
        axis.errorbar(powers, means, scatter, fmt=style, color="C0", capsize=2, ms=4, label=label)
    for color, (name, label) in zip(("0.3", "C1"), _LINES.items(), strict=True):
        if name in runs:
            axis.axhline(np.mean(runs[name]["final"]["loss"]), color=color, lw=1, label=label)
            axis.axhline(np.mean(runs[name]["best"]["loss"]), color=color, lw=1, ls="--")
    _label(axis, title, powers)


def _powers(rows: dict[str, Any], name: str) -> list[int]:
    return [p for p in range(1, 8) if name.format(2.0**-p) in rows]


def _label(axis: Any, title: str, powers: list[int]) -> None:
    axis.set_xticks(powers, [f"1/{2**p}\n{p + 1} bits" for p in powers], fontsize=7)  # p, a guard
    figure.caption(axis, title, grid="y")


def main(argv: list[str]) -> None:
    """Draws those of the files that are there."""
    options = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    options.add_argument("--out", type=Path, default=record.RESULTS, help="of files and figure")
    folder: Path = options.parse_args(argv).out
    files = {name: folder / f"{name}.json" for name in (CHECKPOINT, *SWEEPS)}
    documents = {name: json.loads(f.read_text()) for name, f in files.items() if f.exists()}
    if not documents:
        options.error(f"{folder} has none of {', '.join(files)} (.json)")
    draw(documents, folder / "dial.png")


if __name__ == "__main__":
    main(sys.argv[1:])
