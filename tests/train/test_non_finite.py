"""A step whose loss or gradient is not finite: left out or the end, and written down."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy import bits
from toy_runs import points, saved_bits, tiny

import train.loop.program as program_module
from bdia_jax._jaxprs import equations
from train.loop import non_finite
from train.loop.log import read_records
from train.loop.program import make_program
from train.loop.train import train

pytestmark = [pytest.mark.full, pytest.mark.usefixtures("quick_compile")]
BAD = 5  # the step that sees the bad example
STEPS = 8  # an epoch


def config_of(**changes):
    same = {"batch_size": 8, "num_steps": STEPS, "warmup_steps": 0, "schedule": "constant"}
    every = {f"{what}_every_steps": STEPS for what in ("log", "eval", "checkpoint")}
    return tiny(changes.pop("data_dir", ""), **same | every | changes)


def with_bad_example(config):
    """The task; the target of one example, which step BAD of seed 0 sees, is NaN."""
    task = points()
    (group,) = task.train_groups
    seen = make_program(config_of(), task).batch(0, BAD, task.train_groups)
    y = np.where((group["x"] == seen["x"][0]).all(-1), np.nan, group["y"]).astype(np.float32)
    return task._replace(train_groups=(group | {"y": y},))


@pytest.fixture(scope="module")
def programs():
    """name -> (program, placed groups)."""
    made = {}
    skip = {"non_finite": "skip"}
    for name, changes in {"stop": {}, "skip": skip, "seeds": skip | {"num_seeds": 2}}.items():
        config = config_of(**changes)
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


def all_bits(tree):
    return [bits(leaf).tolist() for leaf in jax.tree.leaves(tree)]


@pytest.mark.claim("a bad step changes nothing")
@pytest.mark.control("a bad step changes nothing")
def test_stop_leaves_the_state_of_the_steps_before(programs):
    before, good = run(programs, "stop", BAD)
    state, metrics = run(programs, "stop", STEPS)
    assert good["non_finite"].step == -1
    note = metrics["non_finite"]
    assert (state["step"], note.step, note.skipped) == (BAD, BAD, 1)
    assert np.isnan(note.loss) and np.isfinite(metrics["loss"])
    assert all_bits(state) == all_bits(before)
    later, again = run(programs, "stop", STEPS, 3)  # dispatched before the first was read
    assert all_bits(later) == all_bits(before) and again["non_finite"].step == BAD
    other, _ = run(programs, "stop", BAD - 1)  # every step changes the state
    assert all_bits(other["params"]) != all_bits(before["params"])


def branches(program, groups) -> int:
    jaxpr = jax.make_jaxpr(program.train_steps)(program.abstract_state, groups, jnp.int32(1)).jaxpr
    return sum(eqn.primitive.name == "cond" for eqn in equations(jaxpr))


@pytest.mark.claim("a GPU's step selects its state")
@pytest.mark.control("a GPU's step selects its state")
def test_a_gpus_step_selects_the_state_a_cpus_branches_to(programs, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(program_module, "default_device", lambda: SimpleNamespace(platform="gpu"))
        _, groups = programs["stop"]
        config = config_of()
        selecting = make_program(config, with_bad_example(config))
        state, metrics = run({"stop": (selecting, groups)}, "stop", STEPS)
        assert branches(selecting, groups) == 0
    expected, again = run(programs, "stop", STEPS)
    assert int(state["step"]) == int(expected["step"]) == BAD
    assert metrics["non_finite"].step == again["non_finite"].step == BAD
    for leaf, other in zip(*map(jax.tree.leaves, (state, expected)), strict=True):
        np.testing.assert_allclose(leaf, other, rtol=1e-6)
    assert branches(*programs["stop"]) > 0  # the control: on a CPU


def test_skip_goes_on_without_the_step(programs):
    before, _ = run(programs, "skip", BAD)
    at, metrics = run(programs, "skip", BAD, 1)
    assert all_bits(at | {"step": 0}) == all_bits(before | {"step": 0})
    assert (at["step"], metrics["non_finite"].skipped) == (BAD + 1, 1)
    after, metrics = run(programs, "skip", STEPS)
    assert (after["step"], metrics["non_finite"].step) == (STEPS, BAD)
    assert metrics["non_finite"].skipped == 1 and np.isfinite(metrics["loss"])
    assert all_bits(after["params"]) != all_bits(before["params"])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after["params"]))


def test_every_seed_for_itself(programs):
    (before, _), (after, metrics) = (
        run(programs, "seeds", *counts) for counts in ((BAD,), (BAD, 1))
    )
    steps = metrics["non_finite"].step
    assert steps[0] == BAD != steps[1]  # the other sees that example in another step
    old, new = before["params"]["w"], after["params"]["w"]
    assert (old[0] == new[0]).all() and (old[1] != new[1]).any()


def test_stop_writes_down_what_the_step_saw(monkeypatch, tmp_path, data_dir, capsys):
    monkeypatch.setattr("train.loop.train.load_task", with_bad_example)
    config = config_of(data_dir=data_dir)
    message = rf"step {BAD} is not finite: loss is nan.* gradient of w.*checkpoint {BAD}.*=skip"
    with pytest.raises(ValueError, match=message):
        train(config, str(tmp_path))
    assert saved_bits(tmp_path, BAD)
    (file,) = (tmp_path / "non_finite").iterdir()
    dump = dict(np.load(file))
    assert (int(dump["step"]), int(dump["seed"])) == (BAD, 0)
    assert np.isnan(dump["batch/y"]).sum() == 1 and dump["batch/x"].shape == (8, 3)
    assert np.isnan(dump["grad_norm"]) and np.isnan(dump["grad_norm/w"])
    # the same workdir goes on, without this step
    train(config_of(data_dir=data_dir, non_finite="skip"), str(tmp_path))
    assert f"left out: step {BAD} is not finite" in capsys.readouterr().out
    (record,) = [r for r in read_records(tmp_path) if r["kind"] == "train"]
    assert (record["step"], record["skipped"]) == (STEPS, 1)
    assert np.isfinite(record["loss"])


def test_only_the_first_skipped_step_is_written_down(programs, tmp_path):
    program, groups = programs["skip"]
    state, metrics = run(programs, "skip", STEPS)

    def report():
        batch = lambda seed, step: program.batch(seed, step, groups)  # noqa: E731
        config = config_of(non_finite="skip")
        return non_finite.report(tmp_path, config, metrics["non_finite"], state, batch)

    said, file = report(), tmp_path / "non_finite" / f"step_{BAD}.npz"
    assert f"step {BAD} is not finite" in said and str(file) in said
    assert np.isnan(np.load(file)["batch/y"]).sum() == 1
    file.rename(file.with_name("step_1.npz"))
    report()
    assert not file.exists()
