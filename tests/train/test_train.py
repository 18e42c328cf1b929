"""The training program: steps, resume to the bit, and what it refuses."""

import json
import os
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx
from toy_runs import losses, points, saved_bits, tiny

import train.loop.train as program
from configs import resnet15_cifar10, vit_cifar10, vit_cifar100
from train.inference.open_run import open_run
from train.loop import guard_bits
from train.loop.log import read_records
from train.loop.program import make_program
from train.loop.train import train
from train.tasks import open_config

pytestmark = pytest.mark.usefixtures("quick_compile")
FALLING = ((2, 0.25), (4, 2.0**-7))


@pytest.fixture(scope="module")
def straight(tmp_path_factory, data_dir):
    """A run of six steps that nothing interrupts."""
    workdir = tmp_path_factory.mktemp("straight")
    config = tiny(data_dir)
    train(config, str(workdir))
    return workdir, config


def test_run_leaves_records_curve_and_checkpoints(straight):
    workdir, _ = straight
    assert [step for step, *_ in losses(workdir, "train")] == [1, 2, 3, 4, 5, 6]
    assert [step for step, *_ in losses(workdir, "eval")] == [2, 4, 6]
    assert all(np.isfinite(loss) for *_, loss in losses(workdir))
    (start,) = (r for r in read_records(workdir) if r["kind"] == "start")
    assert start["step"] == 0 and start["device"] and start["versions"]["jax"] == jax.__version__
    assert (workdir / "curve.png").stat().st_size > 5_000
    assert json.loads((workdir / "config.json").read_text())["model.width"] == 16


@pytest.mark.claim("resume is bit-equal")
@pytest.mark.control("resume is bit-equal")
@pytest.mark.parametrize(
    "gamma_changes", [(), pytest.param(FALLING, marks=pytest.mark.full)], ids=["", "gamma_changes"]
)
def test_stop_and_resume_equals_straight_through(
    straight, data_dir, tmp_path, monkeypatch, gamma_changes
):
    """Killed after step 4, before it is saved: the checkpoint is of step 2, the last bits equal."""

    class Killed(Exception):
        pass

    def dies(log, step, **metrics):
        log_train(log, step, **metrics)
        if step == 4:
            raise Killed

    expected, config = straight
    if gamma_changes:
        expected, config = tmp_path / "straight", tiny(data_dir, gamma_changes=gamma_changes)
        train(config, str(expected))
        (first, *_, last), (same, *_, other) = losses(expected), losses(straight[0])
        assert first == same and last != other
    log_train, workdir = program.Log.train, tmp_path / "run"
    monkeypatch.setattr(program.Log, "train", dies)
    with pytest.raises(Killed):
        train(config, str(workdir))
    monkeypatch.undo()
    interrupted = saved_bits(workdir, 2)
    train(config, str(workdir))
    assert saved_bits(workdir, 6) == saved_bits(expected, 6) != interrupted
    assert losses(workdir) == losses(expected)


@pytest.mark.full
def test_sigterm_then_damage_then_a_full_disk_and_still_the_same_end(
    tmp_path, data_dir, monkeypatch, capsys
):
    config, workdir = tiny(data_dir), tmp_path / "run"
    monkeypatch.setattr(program, "load_task", points)
    train(config, str(tmp_path / "straight"))
    log_train = program.Log.train

    def terminates(log, step, **metrics):
        log_train(log, step, **metrics)
        if step == 4:  # step 5 has been dispatched
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch, pytest.raises(program.Stopped) as stopped:
        patch.setattr(program.Log, "train", terminates)
        train(config, str(workdir))
    assert stopped.value.code == 0
    assert "stopped by SIGTERM at step 5, saved; the same command" in capsys.readouterr().out
    assert saved_bits(workdir, 5) != saved_bits(workdir, 4)  # the comparison below can fail

    record = workdir / "checkpoints/5/record/metadata"
    record.write_bytes(record.read_bytes()[:-9])
    (workdir / "metrics.tmp").symlink_to("/dev/full")
    with pytest.raises(ValueError, match=r"could not be written: No space left on device; the c"):
        train(config, str(workdir))
    assert "using the one of step 4" in capsys.readouterr().out
    (workdir / "metrics.tmp").unlink()
    train(config, str(workdir))
    assert saved_bits(workdir, 6) == saved_bits(tmp_path / "straight", 6)
    assert losses(workdir) == losses(tmp_path / "straight")


@pytest.mark.full
@pytest.mark.claim("the audit sees the first step")
@pytest.mark.control("the audit sees the first step")
def test_guard_bits_are_chosen_on_what_the_first_step_sees(data_dir):
    """The same examples, augmented alike, and the same random streams of the model."""
    seen, task = [], points()
    small = {name: array[:24] for name, array in task.train_groups[0].items()}

    def metrics(model, batch, rngs):
        values = batch["x"], batch["y"], jax.random.key_data(rngs.params())
        jax.debug.callback(lambda *values: seen.append(values), *values)
        return task.metrics(model, batch, rngs)

    task = task._replace(train_groups=(small, *task.train_groups))
    spied, config = task._replace(metrics=metrics), tiny(data_dir, batch_size=8, seed=3)
    made = make_program(config, spied)
    state, groups = made.init(), made.place(task.train_groups, task.train_sizes)
    (model,) = made.models(state)
    guard_bits.stack_inputs(config, spied, model)
    jax.block_until_ready(made.train_steps(state, groups, 2))
    jax.effects_barrier()
    audited, first, second = seen
    for a, b, other in zip(audited, first, second, strict=True):
        np.testing.assert_array_equal(a, b)
        assert not np.array_equal(a, other)


@pytest.mark.full
def test_reversible_training_equals_stored_training_nearly(straight, tmp_path, data_dir):
    """Same forward bits, gradients equal to rounding: the first loss agrees, later ones nearly."""
    workdir, _ = straight
    train(tiny(data_dir, backprop="store"), str(tmp_path))
    reversible, stored = ([loss for *_, loss in losses(d)] for d in (workdir, tmp_path))
    assert reversible[0] == stored[0]
    np.testing.assert_allclose(reversible, stored, rtol=1e-2)


@pytest.mark.full
@pytest.mark.parametrize(
    "changes",
    [
        {"gamma": 0.6, "backprop": "remat"},
        {"stack": "revnet", "gamma": 0.0, "quantize": False},
        {"stack": "midpoint", "optimizer": "adamw", "gamma": 0.0, "quantize": False},
    ],
)
def test_other_systems_train(tmp_path, data_dir, changes):
    train(tiny(data_dir, num_steps=2, warmup_steps=1, **changes), str(tmp_path))
    kinds = ["start", "train", "train", "eval", "final"]
    assert [r["kind"] for r in read_records(tmp_path)] == kinds


@pytest.mark.full
def test_steps_in_one_dispatch_or_many_are_the_same(straight, tmp_path, data_dir):
    workdir, _ = straight
    sparse = tiny(data_dir, log_every_steps=5, eval_every_steps=6, checkpoint_every_steps=6)
    train(sparse, str(tmp_path))
    assert saved_bits(tmp_path, 6) == saved_bits(workdir, 6)
    each = [loss for *_, loss in losses(workdir, "train")]
    np.testing.assert_allclose(losses(tmp_path)[0][2], np.mean(each[:5]), rtol=1e-6)


@pytest.mark.full
def test_seeds_side_by_side_are_the_seeds_alone(straight, tmp_path, data_dir):
    """And each is evaluated with every constant gamma (Fig. 1); gamma 0 is the evaluation."""
    gammas = {"input": {"inference_gammas": (-0.5, 0.0)}}
    train(tiny(data_dir, num_seeds=2, **gammas), str(tmp_path))
    together = [r["seeds"]["loss"] for r in read_records(tmp_path) if r["kind"] == "train"]
    alone = [loss for *_, loss in losses(straight[0], "train")]
    np.testing.assert_allclose([seeds[0] for seeds in together], alone, rtol=1e-3)
    assert all(first != second for first, second in together)
    *_, last, final = read_records(tmp_path)
    at_zero = final["seeds"]["accuracy_gamma_0.0"]
    np.testing.assert_allclose(at_zero, last["seeds"]["accuracy"], rtol=1e-6)
    assert len(final["seeds"]["accuracy_gamma_-0.5"]) == 2


@pytest.mark.full
def test_loss_falls(tmp_path, data_dir):
    config = tiny(data_dir, num_steps=60, log_every_steps=20, eval_every_steps=60)
    train(config, str(tmp_path))
    (*_, first), *_, (*_, last) = losses(tmp_path, "train")
    assert last < first - 0.1


@pytest.mark.full
def test_a_run_with_x64_has_float32_parameters(tmp_path, data_dir):
    with jax.enable_x64(True):
        train(tiny(data_dir, num_steps=4), str(tmp_path))
        params = nnx.state(open_run(tmp_path, data_dir).model, nnx.Param)
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    assert np.isfinite([loss for *_, loss in losses(tmp_path)]).all()


def test_finished_run_is_left_as_it_is(straight):
    workdir, config = straight
    before = (workdir / "metrics.jsonl").read_bytes()
    final = train(config, str(workdir))
    assert (workdir / "metrics.jsonl").read_bytes() == before
    assert final["loss"] == losses(workdir)[-1][2]


def test_other_examples_are_not_resumed_on(straight, tmp_path):
    workdir, config = straight
    run = shutil.copytree(workdir, tmp_path / "run")
    records = read_records(run)[:-1]  # as if it had been killed before the end
    records[0]["fingerprint"] = "0" * 16
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    with pytest.raises(ValueError, match=r"trained on other examples \(fingerprint 0000"):
        train(config, str(run))
    assert losses(run) == losses(workdir)[:-1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 5000}, "batch_size 5000 exceeds the 1438 examples"),
        ({"token_chunks": 2}, r"token_chunks=2 .*shape \[B, T"),  # of 16 patches and the class
    ],
)
def test_sizes_that_do_not_fit_leave_no_workdir(tmp_path, data_dir, changes, message):
    with pytest.raises(ValueError, match=message):
        train(tiny(data_dir, **changes), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backprop": "magic"}, "backprop is 'magic'"),
        ({"optimizer": "sgd"}, "optimizer is 'sgd'"),
        ({"gamma": 0.6}, "gamma=0.6"),
        ({"gamma": 2.0**-8}, "gamma=0.00390625 .* needs gamma 0.5, 0.25, .. or 0.0078125"),
        ({"quantize": False}, "quantize=False"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"warmup_steps": -5}, "warmup_steps is -5, expected at least 0"),
        ({"model": {"depth": 0}}, "model.depth is 0, expected at least 1"),
        (
            {"input": {"inference_gammas": (0.0, -1.0)}},
            "inference_gammas.1 is -1.0, expected at least -0.5",
        ),
        ({"input": {"rand_augment_magnitude": 99}}, "rand_augment_magnitude is 99"),
        ({"warmup_steps": 6}, "warmup_steps 6 leaves nothing of num_steps 6"),
        ({"model": {"dtype": "float8"}}, "model.dtype is 'float8'"),
        ({"model": {"name": "rnn"}}, "model.name is 'rnn'"),
        ({"model": {"name": "gpt2"}}, "model.name is 'gpt2', expected one of"),
        ({"stack": "ode"}, "stack is 'ode'"),
        ({"stack": "revnet"}, "stack='revnet' with gamma=0.5"),
        ({"batch_size": 32, "batch_chunks": 5}, "batch_chunks 5 does not divide batch_size 32"),
        ({"batch_chunks": 0}, "batch_chunks is 0, expected at least 1"),
    ],
)
def test_bad_values_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny("", **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gamma_changes": ((4, 0.25), (2, 0.5))}, "expected .steps, gamma. with rising steps"),
        ({"gamma_changes": ((4, 0.3),)}, "gamma=0.5, 0.3 .* a power of 1/2"),
        ({"gamma_changes": ((0, 0.25),)}, "gamma_changes.0.0 is 0, expected at least 1"),
        ({"gamma_changes": FALLING, "stack": "revnet", "gamma": 0.0, "quantize": False}, "only"),
    ],
)
def test_changes_of_gamma_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny("", **changes)


@pytest.mark.parametrize("gamma_bits", range(1, 8))
def test_gamma_says_how_many_bits_are_kept(gamma_bits):
    stack = tiny("", gamma=2.0**-gamma_bits).model_arguments["stack"]
    assert stack.keywords["fixed_point"].gamma_bits == gamma_bits


@pytest.mark.parametrize("part", [{"by_branch": True}, {"batch_chunks": 2}, {"token_chunks": 2}])
def test_blocks_that_cannot_be_cut_are_named(part):
    config = resnet15_cifar10.get_config("smoke")
    open_config(config)
    config.update(part)
    message = r"model 'resnet' with by_branch=.*set False.*batch statistics"
    with pytest.raises(ValueError, match=message):
        open_config(config)


def test_paper_configs():
    for module, dataset in ((vit_cifar10, "cifar10"), (vit_cifar100, "cifar100")):
        config = open_config(module.get_config())
        model = config.model
        assert config.dataset == dataset and config.gamma == 0.5 and config.learning_rate == 1e-4
        assert (model.patch_size, model.width, model.depth) == (4, 512, 6)
        assert (model.num_heads, model.mlp_dim, model.dropout_rate) == (8, 512, 0.1)


@pytest.mark.full
def test_command_line_trains(straight, tmp_path, data_dir, quick_processes):
    """As `straight` does."""
    command = [sys.executable, "-m", "train", "--config=configs/vit_digits.py:smoke"]
    command += [f"--workdir={tmp_path / 'run'}", f"--config.data_dir={data_dir}"]
    command += ["--config.num_steps=6", "--config.warmup_steps=2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[1].startswith("step 2/6 33%  loss ")
    assert lines[-1].startswith("final accuracy 0.")
    assert saved_bits(tmp_path / "run", 6) == saved_bits(straight[0], 6)
