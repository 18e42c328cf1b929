"""Checkpoints of the training state: Orbax, with checksums, and a way back from damaged ones."""

import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, LatestN

from train.devices.processes import is_first
from train.run.arrays import arrays_handler
from train.run.checksum import checksums
from train.run.missing import CHECKPOINTS, RESTORE_OR_DELETE, no_checkpoint
from train.run.record import (
    Damaged,
    PreserveBest,
    described,
    read_record,
    reason_of,
    score_of,
    sealed,
)


class Checkpoints:
    """The states in workdir/checkpoints, written while training goes on.

    A checkpoint appears in one go, under its step. Beside the state it has a record: checksums of
    all arrays, the fingerprint of the examples, and the score of the evaluation at that step.

    Args:
        workdir: of the run.
        keep_last: how many of the newest are kept.
        keep_best: how many with the best score are kept besides.
        fingerprint: of the examples; "" where they do not matter.
        read_only: leave damaged checkpoints, and what a kill left, where they are: the run that
            owns the workdir may be going on.
    """

    def __init__(
        self,
        workdir: Path,
        keep_last: int = 2,
        keep_best: int = 0,
        fingerprint: str = "",
        *,
        read_only: bool = False,
    ):
        self.directory = Path(workdir) / CHECKPOINTS
        self._fingerprint = fingerprint
        self._read_only = read_only
        self._saving = 0
        self._scores: dict[int, float] = {}
        best = PreserveBest(keep_best, self._score)
        self._policy = AnyPreservationPolicy([LatestN(keep_last), best])
        self._manager = self._open()

    def restore_or(self, init: Callable[[], Any], abstract: Any) -> Any:
        """The newest saved state, as of `restore`; init() if none was saved yet."""
        return self.restore(abstract) if self._manager.all_steps() else init()

    def restore(self, abstract: Any, *, best: bool = False) -> Any:
        """The newest saved state that is what was saved, bit for bit.

        Damaged ones are named and set aside as STEP.damaged.

        Args:
            abstract: the state's jax.ShapeDtypeStruct, with the sharding it is to have, whatever
                it had when it was saved; without one, on the first device.
            best: the one with the best score instead.

        Raises:
            FileNotFoundError: there is none.
            ValueError: all are damaged, or they are of other examples or another model.
        """
        abstract = _with_shardings(abstract)
        damaged: dict[int, str] = {}
        for step in self._in_order(best):
            reason, state = "", None
            try:
                state = self._read(step, abstract)
            except Damaged as error:
                reason = str(error)
            if _all_agree(not reason):
                self._set_aside(damaged, step)
                return state
            damaged[step] = reason or "another process could not read it"
        if not damaged:
            raise FileNotFoundError(no_checkpoint(self.directory.parent))
        raise ValueError(
            f"no checkpoint in {self.directory} is what was saved: "
            + "; ".join(f"step {step}: {reason}" for step, reason in damaged.items())
            + f". {RESTORE_OR_DELETE}"
        )

    def save(self, step: int, state: Any, metrics: Mapping[str, Any] | None = None) -> None:
        """Saves unless this step is there already. Returns before the files are complete.

        Args:
            step: of the state.
            state: may be donated afterwards.
            metrics: of the evaluation at this step, if there was one: "accuracy", or else "loss",
                is the score.

        Raises:
            ValueError: this checkpoint, or the one before, could not be written.
        """
        if self._manager.latest_step() == step:
            return
        self.wait()
        self._saving = step
        score = score_of(metrics or {})
        self._scores[step] = -math.inf if score is None else score
        record = {
            "step": step,
            "fingerprint": self._fingerprint,
            "score": score,
            "arrays": described(state, checksums(state)),
        }
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(state), record=ocp.args.JsonSave(sealed(record))
                ),
                force=True,
            )
        except Exception as error:
            raise self._not_written(error) from error

    def wait(self) -> None:
        """Returns once what was saved is on the disk.

        Raises:
            ValueError: it could not be written.
        """
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._not_written(error) from error

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        try:
            self.wait()
        except ValueError as failure:
            if error is None:
                raise
            print(f"besides, {failure}", flush=True)  # what went wrong first is what is raised
        finally:
            self._manager.close()

    def _open(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self._policy,
            create=not self._read_only,
            cleanup_tmp_directories=not self._read_only,  # of a run that was killed while it saved
            lightweight_initialize=True,  # else a damaged file could keep all from being opened
        )
        handlers = {"state": arrays_handler(), "record": ocp.JsonCheckpointHandler()}
        try:
            return ocp.CheckpointManager(self.directory, item_handlers=handlers, options=options)
        except OSError as error:
            raise ValueError(f"{self.directory} cannot be used: {error.strerror}") from error

    def _in_order(self, best: bool) -> list[int]:
        order = (lambda step: (self._score(step), step)) if best else None
        return sorted(self._manager.all_steps(), key=order, reverse=True)

    def _read(self, step: int, abstract: Any) -> Any:
        record = read_record(self.directory / str(step))
        if record["step"] != step:
            raise Damaged(f"it is of step {record['step']}")
        self._check_same_run(step, record, abstract)
        state = self._restore(step, abstract)
        found = checksums(state)
        wrong = [name for name, (*_, value) in record["arrays"].items() if found[name] != value]
        if wrong:
            raise Damaged(
                f"{wrong[0]} {f'and {len(wrong) - 1} more ' if wrong[1:] else ''}"
                "not equal to the checksum"
            )
        return state

    def _restore(self, step: int, abstract: Any) -> Any:
        how = ocp.checkpoint_utils.construct_restore_args(abstract)
        arguments = ocp.args.Composite(state=ocp.args.PyTreeRestore(abstract, restore_args=how))
        try:
            return self._manager.restore(step, args=arguments)["state"]
        except (MemoryError, PermissionError, jax.errors.JaxRuntimeError):
            raise  # says nothing of the files
        except Exception as error:
            raise Damaged(reason_of(error)) from error

    def _check_same_run(self, step: int, record: dict[str, Any], abstract: Any) -> None:
        saved = {name: array[:2] for name, array in record["arrays"].items()}
        here = described(abstract)
        names = sorted(saved.keys() | here.keys())
        differ = [name for name in names if saved.get(name) != here.get(name)]
        if differ:
            name = differ[0]
            raise ValueError(
                f"the checkpoint of step {step} in {self.directory} is of another model: {name} "
                f"was {saved.get(name, 'absent')}, is {here.get(name, 'absent')}; {len(differ)} of "
                f"{len(names)} arrays differ. Use the version of the program it was saved with"
            )
        before = record["fingerprint"]
        if self._fingerprint and before and before != self._fingerprint:
            raise ValueError(
                f"the checkpoint of step {step} in {self.directory} was trained on other examples "
                f"(fingerprint {before}, now {self._fingerprint}). Bring them back, or take "
                "another --workdir"
            )

    def _set_aside(self, damaged: Mapping[int, str], used: int) -> None:
        if not damaged:
            return
        if not self._read_only:
            self._manager.close()
            if is_first():
                for step in damaged:
                    aside = self.directory / f"{step}.damaged"
                    shutil.rmtree(aside, ignore_errors=True)  # an earlier one of the same step
                    (self.directory / str(step)).rename(aside)
            _all_agree(True)
            self._manager = self._open()
        for step, reason in damaged.items():
            print(
                f"the checkpoint of step {step} in {self.directory} is damaged: {reason}; "
                + ("" if self._read_only else f"set aside as {step}.damaged; ")
                + f"using the one of step {used}",
                flush=True,
            )

    def _score(self, step: int) -> float:
        """-inf for no evaluation at this step, or a damaged record."""
        if step not in self._scores:
            try:
                score = read_record(self.directory / str(step))["score"]
            except Damaged:
                score = None
            self._scores[step] = -math.inf if score is None else score
        return self._scores[step]

    def _not_written(self, error: Exception) -> ValueError:
        kept = [step for step in self._manager.all_steps() if step != self._saving]
        stays = f"the one of step {max(kept)} stays" if kept else "there is none before it"
        return ValueError(
            f"checkpoint of step {self._saving} could not be written to {self.directory}: "
            f"{reason_of(error)}; {stays}. The same command resumes once it can be written"
        )


def _with_shardings(abstract: Any) -> Any:
    first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or first
        ),
        abstract,
    )


def _all_agree(value: bool) -> bool:
    """Whether it is true in every process. Also a meeting point of all."""
    if jax.process_count() == 1:
        return value
    return bool(np.all(multihost_utils.process_allgather(np.bool_(value))))
