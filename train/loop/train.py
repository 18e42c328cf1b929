"""The training loop: data, program, restore, loop."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bdia_jax import FixedPoint, memory_report
from train.config import Config
from train.data.tokens import Bpe
from train.datasets.registry import footnote, open_builder
from train.devices.mesh import open_mesh
from train.devices.processes import first_does
from train.loop import guard_bits, non_finite
from train.loop.gamma import loss_at_start
from train.loop.interrupt import Interrupt, Stopped
from train.loop.log import Log, draw_curve, final_metrics, mended_guard_bits, read_records
from train.loop.program import Program, check_fits, compile_steps, lower_steps, make_program
from train.loop.rebuild import RebuildFailed
from train.loop.state import State
from train.run.checkpoint import Checkpoints
from train.run.fingerprint import data_fingerprint
from train.run.lock import Lock
from train.run.missing import check_kept
from train.run.pretrained import keep_description, read_params
from train.run.workdir import holds_run, open_workdir, writing
from train.tasks import load_task
from train.tasks.task import Task


def train(config: Config, workdir: str, command: str = "") -> dict[str, float]:
    """Trains, and returns the final evaluation's metrics (means over the seeds).

    Everything random is a function of (seed, step), so a run that is stopped and started
    again on its workdir ends with the same bits as one that was not. SIGTERM or Ctrl-C saves first.

    Args:
        config: the experiment.
        workdir: gets config.json, metrics.jsonl, curve.png and checkpoints/.
        command: the command line, for the record.

    Raises:
        FileNotFoundError: the data set is not prepared.
        ValueError: bad configuration or workdir, one that another program trains in, a loss that
            is not finite, or a full disk; checkpoints saved until then stay.
        Stopped: on SIGTERM or Ctrl-C, once the state is on the disk. A SystemExit of status 0.
    """
    with Lock(Path(workdir).absolute()) as lock:
        if holds_run(workdir):
            path = open_workdir(workdir, config)
            finished = final_metrics(path)
            if finished:
                print(f"finished already: {_listed(finished)}  in {path}")
                return finished
            first_does(lock.take)
        return _train(config, workdir, command, lock)


def _train(config: Config, workdir: str, command: str, lock: Lock) -> dict[str, float]:
    task = load_task(config)
    program = make_program(config, task)
    pretrained = read_params(config, program.abstract)
    check_fits(program)
    lowered = lower_steps(program)
    fingerprint = data_fingerprint(task, open_mesh(config.mesh))
    # only now: bad data or sizes leave no folder behind
    path = Path(workdir).absolute()
    first_does(_claim, path, config, task, fingerprint, lock)
    checkpoints = Checkpoints(path, config.keep_last, config.keep_best, fingerprint)
    with checkpoints, writing(path):
        state = checkpoints.restore_or(partial(program.init, pretrained), program.abstract_state)
        del pretrained
        guard_facts: dict[str, Any] = {}
        if config.chooses_guard_bits:  # of the parameters as they are now; models() copies them
            guard_facts = guard_bits.choose(config, task, program.models(state)[0])
            print(guard_bits.described(config, guard_facts), flush=True)
        if (mended := mended_guard_bits(path)) > guard_facts.get("guard_bits", config.guard_bits):
            guard_facts["guard_bits"] = mended
        if guard_facts:
            task = guard_bits.with_guard_bits(task, guard_facts["guard_bits"])
            program = make_program(config, task)
            lowered = lower_steps(program)
        program = program._replace(train_steps=lowered.compile(compiler_options=program.options()))
        memory = memory_report(program.train_steps)
        start = int(state["step"])
        seeds = f" x {config.num_seeds} seeds" if config.num_seeds > 1 else ""
        count = sum(leaf.size for leaf in jax.tree.leaves(state["params"])) // config.num_seeds
        print(
            f"{'resuming' if start else 'training'} {count:,} parameters{seeds} on "
            f"{task.describe}, {jax.devices()[0].device_kind}, from step {start} to "
            f"{config.num_steps}",
            flush=True,
        )
        train_groups = program.place(task.train_groups, task.train_sizes)
        eval_groups = program.place(task.eval_groups, task.eval_sizes)
        gamma_facts: dict[str, Any] = {}
        if config.init_from and config.stack == "bdia" and config.gamma and not start:
            loss_at = partial(program.start_loss, state, train_groups)
            gamma_facts, said = loss_at_start(loss_at, config.gamma)
            print(said, flush=True)
        log = Log(path, config, start, memory.temporaries + memory.arguments)
        log.start(
            command=command,
            fingerprint=fingerprint,
            data_note=footnote(open_builder(config.dataset, config.data_dir)),
            steps_per_epoch=program.steps_per_epoch,
            temp_bytes=memory.temporaries,
            **guard_facts,
            **gamma_facts,
        )
        metrics: dict[str, Any] = {}
        with Interrupt() as interrupt:
            while not metrics:
                try:
                    state, metrics = _loop(
                        config,
                        program,
                        train_groups,
                        eval_groups,
                        checkpoints,
                        interrupt,
                        log,
                        state,
                    )
                except RebuildFailed as failed:
                    state = failed.state
                    with log.pause():
                        task = _mend(config, task, program, checkpoints, log, failed)
                        program = make_program(config, task)
                        program = program._replace(train_steps=compile_steps(program))
        checkpoints.wait()  # a run is finished once its last state is on the disk
        models = program.models(state)
        first_does(_finish, task, models, path, log, config.num_steps, metrics)
    metrics = final_metrics(path)
    print(f"final {_listed(metrics)}  on {config.eval_split}; curve in {path / 'curve.png'}")
    return metrics


def _listed(metrics: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())


def _claim(workdir: Path, config: Config, task: Task, fingerprint: str, lock: Lock) -> None:
    """The workdir, with what a run is opened by again; one of other examples is refused."""
    open_workdir(str(workdir), config)  # what is no run gets no lock
    lock.take()
    open_workdir(str(workdir), config)  # another program may have been between
    records = read_records(workdir)
    before = [r["fingerprint"] for r in records if r["kind"] == "start"]
    if before and before[-1] != fingerprint:
        raise ValueError(
            f"{workdir} was trained on other examples (fingerprint {before[-1]}, now "
            f"{fingerprint}): another version of the data set or its tokenizer. Bring it back, or "
            "take another --workdir"
        )
    check_kept(workdir, max((record["step"] for record in records), default=0))
    with writing(workdir):
        if config.init_from:
            keep_description(config, workdir)
        if isinstance(task.tokenizer, Bpe):
            task.tokenizer.save(workdir / "tokenizer.json")


def _mend(
    config: Config,
    task: Task,
    program: Program,
    checkpoints: Checkpoints,
    log: Log,
    failed: RebuildFailed,
) -> Task:
    """The task with the guard bits that the step takes whose rebuild failed."""
    state, failure = failed.state, failed.failure
    at = int(failure.step)
    try:
        facts = guard_bits.mend(config, task, program.models(state), failure)
    except ValueError as error:
        checkpoints.save(at, state)
        checkpoints.wait()
        raise ValueError(f"{error}. The state before it is checkpoint {at}") from error
    log.rebuild(at, f"{failed}; made again with {guard_bits.described(config, facts)}", **facts)
    return guard_bits.with_guard_bits(task, facts["guard_bits"])


def _finish(task: Task, models: Any, path: Path, log: Log, step: int, metrics: Any) -> None:
    with writing(path):
        draw_curve(path)
        log.final(step, **metrics, **task.finish(models, path))


def _loop(
    config: Config,
    program: Program,
    train_groups: tuple[Any, ...],
    eval_groups: tuple[Any, ...],
    checkpoints: Checkpoints,
    interrupt: Interrupt,
    log: Log,
    state: State,
) -> tuple[State, dict[str, Any]]:
    """Dispatches the steps up to the next boundary at once, and reads metrics one dispatch late."""

    def batch(seed: int, step: int) -> Any:
        return program.batch(seed, step, train_groups)

    log_train: Any = partial(_log_train, log, config, checkpoints, batch)
    step = start = int(state["step"])
    pending: Any = None
    metrics: dict[str, Any] = {}
    while True:
        last = step == config.num_steps
        signal = "" if last else interrupt.requested()
        evaluates = last or (step > 0 and step % config.eval_every_steps == 0 and not signal)
        saves = step > start and (last or step % config.checkpoint_every_steps == 0 or bool(signal))
        if pending and (evaluates or saves):
            log_train(*pending, state)
            pending = None
        if evaluates:
            with log.pause():
                metrics = jax.device_get(program.evaluate(state, eval_groups))
            log.evaluation(step, **metrics)
        if saves:  # with the score of its evaluation
            checkpoints.save(step, state, metrics if evaluates else None)
        if signal:
            checkpoints.wait()
            saved = "saved" if step > start else "no step since the start"
            print(
                f"stopped by {signal} at step {step}, {saved}; the same command resumes it",
                flush=True,
            )
            raise Stopped(0)
        if last:
            return state, metrics
        every = (config.log_every_steps, config.eval_every_steps, config.checkpoint_every_steps)
        boundary = min(config.num_steps, *((step // steps + 1) * steps for steps in every))
        state, values = program.train_steps(state, train_groups, np.int32(boundary - step))
        step = boundary
        if pending:
            log_train(*pending, state)
        pending = (step, values)


def _log_train(
    log: Log,
    config: Config,
    checkpoints: Checkpoints,
    batch: Callable[..., Any],
    step: int,
    metrics: dict[str, Any],
    state: State,
) -> None:
    """Logs a dispatch. One with a step that is not finite is told, or ends the run.

    Raises:
        RebuildFailed: a step has to be made again; nothing is logged.
        ValueError: a step is not finite.

    The state is then that of before this step, and is saved: a run that dispatched more steps
    since stopped at the same one.
    """
    values = jax.device_get(metrics)
    note, failure = values.pop("non_finite"), values.pop("rebuild")
    if failure.step >= 0:
        raise RebuildFailed(state, failure)
    workdir = checkpoints.directory.parent
    skips, is_bad = config.non_finite == "skip", bool((note.step >= 0).any())
    said = non_finite.report(workdir, config, note, state, batch) if is_bad else ""
    if skips and is_bad:
        print(f"left out: {said}", flush=True)
    if skips or not is_bad:
        log.train(step, **values, **({"skipped": note.skipped} if skips else {}))
        return
    at = int(state["step"])
    checkpoints.save(at, state)
    checkpoints.wait()
    raise ValueError(
        f"{said}; the state before it is checkpoint {at}. Try a lower learning_rate or "
        f"grad_clip_norm > 0 in a new --workdir{_room(config)}, or leave such steps out from here "
        "on by the same command and --config.non_finite=skip"
    )


def _room(config: Config) -> str:
    """The remedy for states that outgrow their format, which come out as NaN."""
    if config.stack != "bdia" or not config.quantize:
        return ""
    limit = FixedPoint(config.frac_bits).limit
    return f", a lower frac_bits={config.frac_bits} if states outgrow +-{limit:.3g}"
