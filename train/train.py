"""The training loop: data, program, restore, loop."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bdia_jax import memory_report
from train import data_to_text, guard_bits, images, language, translation
from train.checkpoint import Checkpoints, open_workdir
from train.config import Config
from train.datasets.registry import footnote, open_builder
from train.inputs import DataToTextInput, ImageInput, TextInput
from train.log import Log, draw_curve, format_bytes, read_records
from train.pretrained import keep_description, read_params
from train.program import Program, compile_steps, lower_steps, make_program
from train.state import State
from train.task import Task, group_size
from train.tokens import Bpe

NOT_METRICS = ("step", "kind", "seeds")  # fields of an evaluation record besides the metrics


def load_task(config: Config) -> Task:
    """Reads the data of a config and says what is to be learnt from it.

    Raises:
        FileNotFoundError: the data set is not prepared.
        ValueError: it does not fit the config.
    """
    if isinstance(config.input, ImageInput):
        task = images.load(config)
    elif isinstance(config.input, TextInput):
        task = language.load(config)
    elif isinstance(config.input, DataToTextInput):
        task = data_to_text.load(config)
    else:
        task = translation.load(config)
    count = sum(group_size(group) for group in task.train_groups)
    if config.batch_size > count:
        raise ValueError(f"batch_size {config.batch_size} exceeds the {count} examples")
    return task


def train(config: Config, workdir: str, command: str = "") -> dict[str, float]:
    """Trains, and returns the final evaluation's metrics (means over the seeds).

    Everything random is a function of (seed, step), so a run that is stopped and started
    again on its workdir ends with the same bits as one that was not.

    Args:
        config: the experiment.
        workdir: gets config.json, metrics.jsonl, curve.png and checkpoints/.
        command: the command line, for the record.

    Raises:
        FileNotFoundError: the data set is not prepared.
        ValueError: bad configuration or workdir, or a loss that is not finite; checkpoints
            saved until then stay.
    """
    if (Path(workdir) / "config.json").exists():
        path = open_workdir(workdir, config)
        finished = final_metrics(path)
        if finished:
            print(f"finished already: {_listed(finished)}  in {path}")
            return finished
    task = load_task(config)
    program = make_program(config, task)
    pretrained = read_params(config, program.abstract)
    lowered = lower_steps(program, task)
    path = open_workdir(workdir, config)  # only now: bad data or sizes leave no folder behind
    fingerprint = _check_same_data(path, task)
    if config.init_from:
        keep_description(config, path)
    if isinstance(task.tokenizer, Bpe):
        task.tokenizer.save(path / "tokenizer.json")
    with Checkpoints(path) as checkpoints:
        state = checkpoints.restore_or(program.init, pretrained)
        del pretrained
        guard_facts: dict[str, Any] = {}
        if config.chooses_guard_bits:  # of the parameters as they are now; models() copies them
            chosen, guard_facts = guard_bits.choose(config, task, program.models(state)[0])
            program = make_program(chosen, task)
            lowered = lower_steps(program, task)
        train_steps = lowered.compile()
        memory = memory_report(train_steps)
        start = int(state["step"])
        seeds = f" x {config.num_seeds} seeds" if config.num_seeds > 1 else ""
        print(
            f"{'resuming' if start else 'training'} {parameter_count(state, config):,} "
            f"parameters{seeds} on {task.describe}, {jax.devices()[0].device_kind}, from step "
            f"{start} to {config.num_steps}",
            flush=True,
        )
        log = Log(
            path,
            start,
            config.num_steps,
            config.batch_size * config.num_seeds,
            memory.temporaries + memory.arguments,
        )
        log.start(
            command=command,
            fingerprint=fingerprint,
            data_note=footnote(open_builder(config.dataset, config.data_dir)),
            steps_per_epoch=program.steps_per_epoch,
            temp_bytes=memory.temporaries,
            **guard_facts,
        )
        state, metrics = _loop(
            config, task, program._replace(train_steps=train_steps), checkpoints, log, state
        )
        draw_curve(path)
        log.final(config.num_steps, **metrics, **task.finish(program.models(state), path))
    metrics = final_metrics(path)
    print(f"final {_listed(metrics)}  on {config.eval_split}; curve in {path / 'curve.png'}")
    return metrics


def final_metrics(workdir: Path) -> dict[str, float]:
    """What a finished run ended with, means over the seeds; {} for one that is not finished."""
    final = [record for record in read_records(workdir) if record["kind"] == "final"]
    return {k: v for k, v in final[-1].items() if k not in NOT_METRICS} if final else {}


def _listed(metrics: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())


def _check_same_data(workdir: Path, task: Task) -> str:
    """A hash of all examples; a run is not resumed on others (or on other tokens of theirs)."""
    digest = hashlib.sha256()
    for array in jax.tree.leaves((task.train_groups, task.eval_groups)):
        digest.update(np.asarray(array).tobytes())
    fingerprint = digest.hexdigest()[:16]
    before = [r["fingerprint"] for r in read_records(workdir) if r["kind"] == "start"]
    if before and before[-1] != fingerprint:
        raise ValueError(
            f"{workdir} was trained on other examples (fingerprint {before[-1]}, now "
            f"{fingerprint}): another version of the data set or its tokenizer. Bring it back, or "
            "take another --workdir"
        )
    return fingerprint


def _loop(
    config: Config, task: Task, program: Program, checkpoints: Checkpoints, log: Log, state: State
) -> tuple[State, dict[str, Any]]:
    """Dispatches the steps up to the next boundary at once, and reads metrics one dispatch late."""
    step = start = int(state["step"])
    pending: Any = None
    metrics: dict[str, Any] = {}
    while True:
        last = step == config.num_steps
        evaluates = last or (step > 0 and step % config.eval_every_steps == 0)
        saves = step > start and (last or step % config.checkpoint_every_steps == 0)
        if pending and (evaluates or saves):
            _log_train(log, *pending)
            pending = None
        if saves:
            checkpoints.save(step, state)
        if evaluates:
            with log.pause():
                metrics = jax.device_get(program.evaluate(state, task.eval_groups))
            log.evaluation(step, **metrics)
        if last:
            return state, metrics
        boundary = min(
            (step // every + 1) * every
            for every in (
                config.log_every_steps,
                config.eval_every_steps,
                config.checkpoint_every_steps,
            )
        )
        boundary = min(boundary, config.num_steps)
        state, values = program.train_steps(
            state, task.train_groups, jnp.asarray(boundary - step, jnp.int32)
        )
        step = boundary
        if pending:
            _log_train(log, *pending)
        pending = (step, values)


def _log_train(log: Log, step: int, metrics: dict[str, jax.Array]) -> None:
    """Logs a dispatch, or stops the run before a state that is not finite is saved."""
    values = jax.device_get(metrics)
    for name in ("loss", "grad_norm"):
        if not np.isfinite(values[name]).all():
            raise ValueError(
                f"{name} is {values[name]} at step {step} or shortly before; try a lower "
                "learning_rate or grad_clip_norm > 0. The workdir's checkpoints are from before"
            )
    log.train(step, **values)


def parameter_count(state: State, config: Config) -> int:
    """Parameters of one model."""
    return sum(leaf.size for leaf in jax.tree.leaves(state["params"])) // config.num_seeds


def memory_line(config: Config, workdir: str) -> str:
    """What a training step of the run in `workdir` needs, next to the plain model's."""
    own_bytes = read_records(Path(workdir))[0]["temp_bytes"]
    plain = dataclasses.replace(config, stack="bdia", gamma=0.0, quantize=False, backprop="store")
    task = load_task(plain)
    compiled = compile_steps(make_program(plain, task), task)
    plain_bytes = memory_report(compiled).temporaries
    return (
        f"a step needs {format_bytes(own_bytes)} beyond parameters and data, "
        f"the plain model {format_bytes(plain_bytes)}: {own_bytes / plain_bytes:.2f} of it"
    )
