"""A step whose rebuild fails is made again with more guard bits; the run ends as if it had them."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from toy_models import drifting
from toy_runs import guard_bits_built, points, saved_bits, tiny

from train.loop import train as training
from train.loop.log import read_records
from train.loop.program import make_program
from train.loop.rebuild import Failure
from train.loop.train import train

pytestmark = [pytest.mark.full, pytest.mark.usefixtures("quick_compile")]
STEPS, FROM = 12, 7  # the blocks drift from this step on


class Drifting(nnx.Module):
    """From the call FROM on its second evaluation differs by `quanta`."""

    def __init__(self, rngs, quanta):
        self.dense, self.quanta = nnx.Linear(3, 3, rngs=rngs), quanta
        self.calls = nnx.BatchStat(jnp.zeros(()))

    def __call__(self, x):
        size = jnp.where(self.calls[...] >= FROM, self.quanta * 2.0**-9, 0.0)
        self.calls[...] += 1
        return drifting(jnp.tanh(self.dense(x)), size)


def drifting_task(quanta):
    """config -> `points`, by a stack that drifts."""

    def make_task(config):
        class Model(nnx.Module):
            def __init__(self, rngs):
                make_block = lambda rngs: Drifting(rngs, quanta)  # noqa: E731
                self.stack = config.model_arguments["stack"](make_block, 4, rngs=rngs)
                self.w = nnx.Param(jax.random.normal(rngs.params(), (3,)))

            def __call__(self, x, rngs=None):
                return self.stack(x, rngs=rngs) @ self.w[...]

        def metrics(model, batch, rngs):
            return points().metrics(partial(model, rngs=rngs), batch, rngs)

        finish = lambda models, workdir: {}  # noqa: E731
        return points()._replace(make_model=Model, metrics=metrics, finish=finish)

    return make_task


def config_of(data_dir="", **changes):
    steps = {"num_steps": STEPS, "warmup_steps": 0, "batch_size": 8, "log_every_steps": 2}
    steps |= {"eval_every_steps": 6, "checkpoint_every_steps": 6}
    return tiny(data_dir, **steps | changes)


@pytest.fixture
def runs(tmp_path, data_dir, monkeypatch):
    """(name, quanta, changes of the config) -> workdir of a finished run."""

    def run(name, quanta, **changes):
        monkeypatch.setattr(training, "load_task", drifting_task(quanta))
        train(config_of(data_dir, **changes), str(tmp_path / name))
        return tmp_path / name

    return run


def distance(path, other):
    """The largest difference of two last states: other guard bits are another program, whose
    gradients XLA may round differently."""
    pairs = zip(saved_bits(path, STEPS), saved_bits(other, STEPS), strict=True)
    as_floats = ([np.array(each, np.uint32).view(np.float32) for each in pair] for pair in pairs)
    return max(float(np.abs(a - b).max()) for a, b in as_floats)


@pytest.mark.claim("a run mends itself")
@pytest.mark.control("a run mends itself")
def test_a_run_whose_rebuild_fails_ends_as_one_with_enough_guard_bits(runs, capsys):
    mended, enough = runs("mended", 5.0), runs("enough", 5.0, guard_bits=6)
    assert distance(mended, enough) < 1e-6
    (record,) = (r for r in read_records(mended) if r["kind"] == "rebuild")
    assert (record["step"], record["guard_bits"]) == (FROM, 5) and record["max_drift"] > 5
    said = (
        f"the rebuild of step {FROM} failed: x_2 of stack came out wrong in 8 samples; made again"
    )
    assert said in capsys.readouterr().out
    assert not [r for r in read_records(enough) if r["kind"] == "rebuild"]
    assert json.loads((mended / "config.json").read_text())["guard_bits"] == 1
    # a control: the seed decides how a run ends
    assert distance(runs("other", 5.0, seed=1), enough) > 1e-2


def test_steps_left_out_for_not_being_finite_are_another_matter(runs):
    mended = runs("mended", 5.0, non_finite="skip")
    assert distance(mended, runs("enough", 5.0, guard_bits=6)) < 1e-6
    assert sum(r.get("skipped", 0) for r in read_records(mended)) == 0


def test_seeds_side_by_side_are_mended_together(runs):
    seeds = {"num_seeds": 2}
    mended, enough = runs("mended", 5.0, **seeds), runs("enough", 5.0, guard_bits=6, **seeds)
    assert distance(mended, enough) < 1e-6


def test_a_resumed_run_keeps_what_was_learned(runs, monkeypatch):
    path = runs("mended", 5.0)
    (path / "checkpoints" / str(STEPS)).rename(path / "gone")
    records = (path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (path / "metrics.jsonl").write_text("".join(r for r in records if '"final"' not in r))
    built = guard_bits_built(monkeypatch)
    runs("mended", 5.0)
    assert built == [1, 5]
    assert [r["step"] for r in read_records(path) if r["kind"] == "rebuild"] == [FROM]


def test_the_seed_that_failed_is_named():
    counts = {"a": np.zeros((3, 4)), "b": np.array([[0, 0], [0, 2], [1, 0]])}
    assert Failure(np.int32(3), counts).seed == 1
    assert Failure(np.int32(3), {"a": np.array([0.0, 2.0])}).seed == 0


def test_what_no_guard_bits_bear_ends_the_run_with_a_remedy(runs, tmp_path):
    message = rf"rebuild of step {FROM} failed: x_2 of stack .*lower frac_bits, or take backprop"
    with pytest.raises(ValueError, match=message + rf".*before it is checkpoint {FROM}"):
        runs("hopeless", 500.0)
    assert saved_bits(tmp_path / "hopeless", FROM)


def test_a_loss_that_is_not_finite_is_no_failed_rebuild():
    config = config_of()
    task = drifting_task(0.0)(config)
    (group,) = task.train_groups
    bad = task._replace(train_groups=(group | {"y": np.full_like(group["y"], np.nan)},))
    program = make_program(config, bad)
    _, metrics = program.train_steps(program.init(), bad.train_groups, jnp.int32(3))
    assert metrics["non_finite"].step == 0 and metrics["rebuild"].step == -1
