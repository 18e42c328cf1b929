"""A step whose loss or gradient is not finite: left out or the end, and written down."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import vit_digits
from train.loop import non_finite
from train.loop.log import read_records
from train.loop.program import make_program
from train.loop.train import train
from train.run.checkpoint import Checkpoints
from train.tasks import images, load_task, open_config
from train.tasks.images import Images
from train.tasks.task import Task

pytestmark = pytest.mark.usefixtures("quick_compile")
BAD = 5  # the step that sees the bad example
STEPS = 8


def config_of(**changes):
    values = vit_digits.get_config("plain,smoke").unlock()
    small = {"train_split": "train[:64]", "eval_split": "validation[:8]", "batch_size": 8}
    small |= {"num_steps": STEPS, "log_every_steps": STEPS, "eval_every_steps": STEPS}
    small |= {"checkpoint_every_steps": STEPS, "warmup_steps": 0, "schedule": "constant"}
    values.update(small | {"model": {"width": 8, "depth": 1, "dropout_rate": 0.0}} | changes)
    return open_config(values)


def with_bad_example(config) -> Task:
    """The task; the loss of one example, which step BAD of seed 0 sees, is NaN."""
    task = load_task(config)
    seen = make_program(config, task).batch(0, task.train_groups, BAD)
    (train_images,) = task.train_groups
    marked = np.where((np.asarray(train_images.images) == seen.images[0]).all((1, 2, 3)))[0]
    labels = np.asarray(train_images.labels).copy()
    labels[marked[0]] = 1000

    def metrics(model, batch, rngs):
        found = images._metrics(model, batch._replace(labels=batch.labels % 1000), rngs)
        bad = (batch.labels == 1000).any()
        loss, weight = found["loss"]
        return found | {"loss": (jnp.where(bad, jnp.nan, loss), weight)}

    groups = (Images(train_images.images, labels),)
    return task._replace(train_groups=groups, metrics=metrics)


@pytest.fixture(scope="module")
def programs(data_dir):
    """name -> (program, placed groups)."""
    made = {}
    skip = {"non_finite": "skip"}
    for name, changes in {"stop": {}, "skip": skip, "seeds": skip | {"num_seeds": 2}}.items():
        config = config_of(data_dir=data_dir, **changes)
        task = with_bad_example(config)
        made[name] = make_program(config, task), task.train_groups
    return made


def run(programs, name, *counts):
    """(state, metrics of the last dispatch) after so many steps in each dispatch."""
    program, groups = programs[name]
    state, metrics = program.init(), None
    for count in counts:
        state, metrics = program.train_steps(state, groups, jnp.int32(count))
    return jax.device_get((state, metrics))


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def test_stop_leaves_the_state_of_the_steps_before(programs):
    before, good = run(programs, "stop", BAD)
    state, metrics = run(programs, "stop", STEPS)
    assert good["non_finite"].step == -1
    note = metrics["non_finite"]
    assert (state["step"], note.step, note.skipped) == (BAD, BAD, 1)
    assert np.isnan(note.loss) and np.isfinite(metrics["loss"])
    assert bits(state) == bits(before)
    later, again = run(programs, "stop", STEPS, 3)  # dispatched before the first was read
    assert bits(later) == bits(before) and again["non_finite"].step == BAD
    other, _ = run(programs, "stop", BAD - 1)  # the control: every step changes the state
    assert bits(other["params"]) != bits(before["params"])


def test_skip_goes_on_without_the_step(programs):
    before, _ = run(programs, "skip", BAD)
    at, metrics = run(programs, "skip", BAD, 1)
    assert bits(at | {"step": 0}) == bits(before | {"step": 0})
    assert (at["step"], metrics["non_finite"].skipped) == (BAD + 1, 1)
    after, metrics = run(programs, "skip", STEPS)
    assert (after["step"], metrics["non_finite"].step) == (STEPS, BAD)
    assert metrics["non_finite"].skipped >= 1 and np.isfinite(metrics["loss"])
    assert bits(after["params"]) != bits(before["params"])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after["params"]))


def test_every_seed_for_itself(programs):
    (before, _), (after, metrics) = (
        run(programs, "seeds", *counts) for counts in ((BAD,), (BAD, 1))
    )
    steps = metrics["non_finite"].step
    assert steps[0] == BAD != steps[1]  # the other sees that example in another step
    pairs = [*zip(*(jax.tree.leaves(state["params"]) for state in (before, after)), strict=True)]
    assert all((old[0] == new[0]).all() for old, new in pairs)
    assert not all((old[1] == new[1]).all() for old, new in pairs)


@pytest.fixture
def poisoned(monkeypatch):
    monkeypatch.setattr("train.loop.train.load_task", with_bad_example)


def test_stop_writes_down_what_the_step_saw(poisoned, tmp_path, data_dir, capsys):
    config = config_of(data_dir=data_dir)
    message = rf"step {BAD} is not finite: loss is nan.*checkpoint {BAD}.*non_finite=skip"
    with pytest.raises(ValueError, match=message):
        train(config, str(tmp_path))
    task = with_bad_example(config)
    program = make_program(config, task)
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        state = checkpoints.restore(program.abstract_state)
    assert int(state["step"]) == BAD
    (file,) = (tmp_path / "non_finite").iterdir()
    dump = dict(np.load(file))
    assert (int(dump["step"]), int(dump["seed"])) == (BAD, 0)
    batch = Images(dump["batch/images"], dump["batch/labels"])
    assert (batch.labels == 1000).sum() == 1
    (model,) = program.models(state)
    assert np.isnan(task.metrics(model, batch, None)["loss"][0].sum())
    clean = batch._replace(labels=batch.labels % 1000)  # the control: other labels, no NaN
    assert np.isfinite(task.metrics(model, clean, None)["loss"][0].sum())
    norms = [name for name in dump if name.startswith("grad_norm/")]
    assert len(norms) == len(jax.tree.leaves(state["params"]))
    # the same workdir goes on, without this step
    train(config_of(data_dir=data_dir, non_finite="skip"), str(tmp_path))
    assert f"left out: step {BAD} is not finite" in capsys.readouterr().out
    (record,) = [r for r in read_records(tmp_path) if r["kind"] == "train"]
    assert (record["step"], record["skipped"]) == (STEPS, 1)
    assert np.isfinite(record["loss"])


def test_the_first_skipped_step_is_written_down(programs, tmp_path, data_dir):
    config = config_of(data_dir=data_dir, non_finite="skip")
    program, groups = programs["skip"]
    state, metrics = run(programs, "skip", STEPS)
    arguments = (
        config,
        metrics["non_finite"],
        state,
        lambda *at: program.batch(at[0], groups, at[1]),
    )
    said = non_finite.report(tmp_path, *arguments)
    file = tmp_path / "non_finite" / f"step_{BAD}.npz"
    assert f"step {BAD} is not finite" in said and str(file) in said
    assert (np.load(file)["batch/labels"] == 1000).sum() == 1
    file.rename(file.with_name("step_1.npz"))
    non_finite.report(tmp_path, *arguments)
    assert not file.exists()
