"""The training program: steps, resume to the bit, and what it refuses."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import jax
import numpy as np
import pytest

from configs import resnet15_cifar10, vit_cifar10, vit_cifar100, vit_digits
from train.config import Config
from train.loop.log import draw_curve, read_records
from train.loop.program import make_program
from train.loop.train import train
from train.run.checkpoint import Checkpoints
from train.run.workdir import open_workdir
from train.tasks import load_task, open_config

pytestmark = pytest.mark.usefixtures("quick_compile")


def tiny(data_dir, **changes):
    config = vit_digits.get_config("smoke").unlock()
    config.update({"data_dir": data_dir, "num_steps": 6, "warmup_steps": 2})
    config.update({"log_every_steps": 1, "eval_every_steps": 2, "checkpoint_every_steps": 2})
    config.update(changes)
    return open_config(config.lock())


def final_state(workdir, config):
    with Checkpoints(workdir) as checkpoints:
        return checkpoints.restore_or(make_program(config, load_task(config)).init)


def assert_same_bits(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.fixture(scope="module")
def straight(tmp_path_factory, data_dir):
    """A run of six steps that nothing interrupts."""
    workdir = tmp_path_factory.mktemp("straight")
    config = tiny(data_dir)
    train(config, str(workdir))
    return workdir, config


def test_run_leaves_records_curve_and_checkpoints(straight):
    workdir, _ = straight
    records = read_records(workdir)
    assert [r["step"] for r in records if r["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in records if r["kind"] == "eval"] == [2, 4, 6]
    assert all(np.isfinite(loss) for *_, loss in losses(workdir))
    (start,) = (r for r in records if r["kind"] == "start")
    assert start["step"] == 0 and start["device"] and start["versions"]["jax"] == jax.__version__
    assert (workdir / "curve.png").stat().st_size > 5_000
    assert json.loads((workdir / "config.json").read_text())["model.width"] == 16


def losses(workdir):
    return [(r["step"], r["kind"], r["loss"]) for r in read_records(workdir) if "loss" in r]


class Killed(Exception):
    pass


def test_stop_and_resume_equals_straight_through(straight, tmp_path, monkeypatch):
    """Killed after step 4, before it is saved: the checkpoint is of step 2, the last bits equal."""
    import train.loop.train as program

    log_train = program._log_train

    def dies(*arguments):
        *_, step, _, _ = arguments
        log_train(*arguments)
        if step == 4:
            raise Killed

    straight_workdir, config = straight
    monkeypatch.setattr(program, "_log_train", dies)
    with pytest.raises(Killed):
        train(config, str(tmp_path / "run"))
    monkeypatch.setattr(program, "_log_train", log_train)
    interrupted = final_state(tmp_path / "run", config)
    assert int(interrupted["step"]) == 2
    train(config, str(tmp_path / "run"))
    expected = final_state(straight_workdir, config)
    assert int(expected["step"]) == 6
    assert_same_bits(final_state(tmp_path / "run", config), expected)
    with pytest.raises(AssertionError):  # the comparison can tell two states apart
        assert_same_bits(interrupted, expected)

    assert losses(tmp_path / "run") == losses(straight_workdir)


def test_reversible_training_equals_stored_training_nearly(straight, tmp_path, data_dir):
    """Same forward bits, gradients equal to rounding: the first loss agrees, later ones nearly."""
    workdir, _ = straight
    train(tiny(data_dir, backprop="store"), str(tmp_path))
    reversible, stored = ([loss for *_, loss in losses(d)] for d in (workdir, tmp_path))
    assert reversible[0] == stored[0]
    np.testing.assert_allclose(reversible, stored, rtol=1e-2)


@pytest.mark.parametrize(
    "changes",
    [
        {"gamma": 0.6, "backprop": "remat"},
        {"gamma": 0.25, "optimizer": "adamw", "schedule": "constant"},
        {"stack": "revnet", "gamma": 0.0, "quantize": False},
        {"stack": "midpoint", "gamma": 0.0, "quantize": False},
    ],
)
def test_other_systems_train(tmp_path, data_dir, changes):
    train(tiny(data_dir, num_steps=2, warmup_steps=1, **changes), str(tmp_path))
    assert [r["kind"] for r in read_records(tmp_path)] == [
        *("start", "train", "train", "eval", "final")
    ]


def test_steps_in_one_dispatch_or_many_are_the_same(straight, tmp_path, data_dir):
    workdir, config = straight
    sparse = tiny(data_dir, log_every_steps=5, eval_every_steps=6, checkpoint_every_steps=6)
    train(sparse, str(tmp_path))
    assert_same_bits(final_state(tmp_path, sparse), final_state(workdir, config))
    each, mean = losses(workdir), losses(tmp_path)
    each = [loss for _, kind, loss in each if kind == "train"]
    np.testing.assert_allclose(mean[0][2], np.mean(each[:5]), rtol=1e-6)


def test_seeds_side_by_side_are_the_seeds_alone(straight, tmp_path, data_dir):
    workdir, _ = straight
    train(tiny(data_dir, num_seeds=2), str(tmp_path))
    together = [r["seeds"]["loss"] for r in read_records(tmp_path) if r["kind"] == "train"]
    alone = [loss for _, kind, loss in losses(workdir) if kind == "train"]
    np.testing.assert_allclose([seeds[0] for seeds in together], alone, rtol=1e-3)
    assert all(first != second for first, second in together)


def test_finished_run_is_left_as_it_is(straight):
    workdir, config = straight
    before = (workdir / "metrics.jsonl").read_bytes()
    final = train(config, str(workdir))
    assert (workdir / "metrics.jsonl").read_bytes() == before
    assert final["loss"] == losses(workdir)[-1][2]


def test_other_examples_are_not_resumed_on(straight, tmp_path, data_dir):
    workdir, config = straight
    shutil.copytree(workdir, tmp_path / "run")
    records = read_records(tmp_path / "run")[:-1]  # as if it had been killed before the end
    records[0]["fingerprint"] = "0" * 16
    text = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "run" / "metrics.jsonl").write_text(text)
    with pytest.raises(ValueError, match=r"trained on other examples \(fingerprint 0000"):
        train(config, str(tmp_path / "run"))
    assert losses(tmp_path / "run") == losses(workdir)[:-1]


def test_loss_falls(tmp_path, data_dir):
    config = tiny(data_dir, num_steps=60, log_every_steps=20, eval_every_steps=60)
    train(config, str(tmp_path))
    trained = [loss for _, kind, loss in losses(tmp_path) if kind == "train"]
    assert trained[-1] < trained[0] - 0.1


def test_not_finite_stops_before_saving(tmp_path, data_dir):
    config = tiny(data_dir, learning_rate=1e30, grad_clip_norm=0.0, warmup_steps=0)
    with pytest.raises(ValueError, match=r"step \d is not finite.*learning_rate"):
        train(config, str(tmp_path))
    assert int(final_state(tmp_path, config)["step"]) <= 2


def test_other_config_on_a_workdir_is_named(straight):
    workdir, config = straight
    before = sorted(p.name for p in workdir.iterdir())
    changed = Config(**{**vars(config), "learning_rate": 0.5, "seed": 7})
    with pytest.raises(ValueError, match=r"learning_rate was 0.001, is 0.5; seed was 0, is 7"):
        open_workdir(str(workdir), changed)
    assert sorted(p.name for p in workdir.iterdir()) == before
    open_workdir(str(workdir), Config(**{**vars(config), "log_every_steps": 50}))


def test_foreign_or_unusable_workdir(tmp_path, data_dir):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"no config\.json"):
        open_workdir(str(tmp_path), tiny(data_dir))
    with pytest.raises(ValueError, match="cannot be used"):
        open_workdir(str(tmp_path / "thesis.tex"), tiny(data_dir))
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_batch_larger_than_the_data(tmp_path, data_dir):
    with pytest.raises(ValueError, match="batch_size 5000 exceeds the 1438 examples"):
        train(tiny(data_dir, batch_size=5000), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backprop": "magic"}, "backprop is 'magic'"),
        ({"optimizer": "sgd"}, "optimizer is 'sgd'"),
        ({"gamma": 0.6}, "gamma=0.6"),
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
        ({"model": {"name": "gpt2"}}, "unknown field model.linformer_dim"),
        ({"stack": "ode"}, "stack is 'ode'"),
        ({"stack": "revnet"}, "stack='revnet' with gamma=0.5"),
        ({"batch_size": 32, "batch_chunks": 5}, "batch_chunks 5 does not divide batch_size 32"),
        ({"batch_chunks": 0}, "batch_chunks is 0, expected at least 1"),
    ],
)
def test_bad_values_are_named(data_dir, changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(data_dir, **changes)


@pytest.mark.parametrize("part", [{"by_branch": True}, {"batch_chunks": 2}, {"token_chunks": 2}])
def test_blocks_that_cannot_be_cut_are_named(part):
    config = resnet15_cifar10.get_config("smoke")
    open_config(config)
    config.update(part)
    message = r"model 'resnet' with by_branch=.*batch statistics.*set False"
    with pytest.raises(ValueError, match=message):
        open_config(config)


def test_what_cannot_be_traced_leaves_no_workdir(tmp_path, data_dir):
    workdir = tmp_path / "run"
    with pytest.raises(ValueError, match=r"token_chunks=2 .*shape \[B, T"):
        train(tiny(data_dir, token_chunks=2), str(workdir))  # 17 tokens: 16 patches and the class
    assert not workdir.exists()


def test_another_config_is_refused_before_anything_is_read(straight, monkeypatch):
    import train.loop.train as program

    workdir, config = straight
    monkeypatch.setattr(program, "load_task", lambda _: pytest.fail("read the data"))
    with pytest.raises(ValueError, match="seed was 0, is 7"):
        train(replace(config, seed=7), str(workdir))


def test_incomplete_record_is_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "kind": "train", "loss": 1.0, "accuracy": 0.5}\n{"step": 2, "ki'
    )
    assert [r["step"] for r in read_records(tmp_path)] == [1]
    draw_curve(tmp_path)
    assert (tmp_path / "curve.png").exists()


def test_paper_configs():
    for module, dataset in ((vit_cifar10, "cifar10"), (vit_cifar100, "cifar100")):
        config = open_config(module.get_config())
        model = config.model
        assert config.dataset == dataset and config.gamma == 0.5 and config.learning_rate == 1e-4
        assert (model.patch_size, model.width, model.depth) == (4, 512, 6)
        assert (model.num_heads, model.mlp_dim, model.dropout_rate) == (8, 512, 0.1)


def run_program(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "train", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
    )


def test_unprepared_data_is_told_at_once(tmp_path):
    done = run_program(
        "--config=configs/vit_cifar10.py",
        f"--workdir={tmp_path / 'run'}",
        f"--config.data_dir={tmp_path}",
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: dataset cifar10 is not prepared")
    assert f"tfds build cifar10 --file_format=array_record --data_dir={tmp_path}" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_command_line_trains(tmp_path, data_dir):
    done = run_program(
        "--config=configs/vit_digits.py",
        f"--workdir={tmp_path / 'run'}",
        f"--config.data_dir={data_dir}",
        "--config.model.width=8",
        "--config.model.depth=2",
        "--config.num_steps=2",
        "--config.warmup_steps=0",
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[1].startswith("step 2/2 100%  loss ")
    assert lines[-2].startswith("final accuracy 0.")
    assert "the plain model" in lines[-1]
