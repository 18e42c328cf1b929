"""What a workdir has lost, by someone's hand: its config, or its checkpoints."""

from pathlib import Path

CHECKPOINTS = "checkpoints"  # in a workdir
RESTORE_OR_DELETE = (
    "Bring it back from a copy, or delete metrics.jsonl and that folder to begin at step 0"
)


def is_bereft(workdir: Path) -> bool:
    """Whether it has files of a run, but no config.json."""
    kept = any((workdir / name).exists() for name in ("metrics.jsonl", CHECKPOINTS))
    return kept and not (workdir / "config.json").exists()


def no_config(workdir: Path) -> str:
    """What to say of such a folder."""
    return (
        f"{workdir} has files of a run but no config.json, so it is no run to resume; bring it "
        "back from a copy, or start the command of the run on a new --workdir, and copy the "
        "config.json from there"
    )


def no_checkpoint(workdir: Path) -> str:
    """What to say of a workdir without one."""
    return (
        f"{workdir} has no checkpoint yet; train it further, or bring {CHECKPOINTS}/ back from a "
        "copy if it was deleted"
    )


def check_kept(workdir: Path, step: int) -> None:
    """Says what is lost of a run that has records up to `step`, and no checkpoint.

    Raises:
        ValueError: the folder of the checkpoints is gone, which a run makes before its records.
    """
    folder = workdir / CHECKPOINTS
    if step and not folder.exists():
        raise ValueError(f"{folder} is gone, of a run that was at step {step}. {RESTORE_OR_DELETE}")
    if step and not any(each.name.isdigit() for each in folder.iterdir()):
        print(
            f"{folder} has no checkpoint, of a run that was at step {step}: it was stopped before "
            "the first one, or they were deleted. It begins again at step 0",
            flush=True,
        )
