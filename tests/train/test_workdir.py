"""The workdir: the run it holds is resumed, another one, or what is no run, is refused by name."""

from dataclasses import replace

import pytest
from toy_runs import tiny

import train.loop.train as program
from train.loop.log import draw_curve, read_records
from train.run.workdir import open_workdir, read_config


@pytest.fixture(scope="module")
def config():
    return tiny("")


def test_another_config_is_named_and_nothing_touched(tmp_path, config, monkeypatch):
    workdir = open_workdir(str(tmp_path / "run"), config)
    before = (workdir / "config.json").read_bytes()
    changed = replace(config, learning_rate=0.5, seed=7)
    with pytest.raises(ValueError, match=r"learning_rate was 0.001, is 0.5; seed was 0, is 7"):
        open_workdir(str(workdir), changed)
    monkeypatch.setattr(program, "load_task", lambda _: pytest.fail("read the data"))
    with pytest.raises(ValueError, match="seed was 0, is 7"):
        program.train(replace(config, seed=7), str(workdir))
    free = {"data_dir": "x", "log_every_steps": 50, "keep_best": 3, "non_finite": "skip"}
    free |= {"mesh": replace(config.mesh, data=2)}
    open_workdir(str(workdir), replace(config, **free))
    assert [path.read_bytes() for path in workdir.iterdir()] == [before]
    assert read_config(workdir) == config


def test_a_kill_before_the_config_leaves_a_usable_workdir(tmp_path, config):
    (tmp_path / "config.tmp").write_text('{"seed": ')
    open_workdir(str(tmp_path), config)
    assert read_config(tmp_path) == config


def test_what_is_no_run_is_left_alone(tmp_path, config):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"no config\.json"):
        open_workdir(str(tmp_path), config)
    with pytest.raises(ValueError, match="cannot be used"):
        open_workdir(str(tmp_path / "thesis.tex"), config)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize(
    "text", ['{"seed": 0,', "[]", "{}", '{"seed": 0, "model": {}}', '{"a": 0, "a.b": 1}', "\xff"]
)
def test_a_damaged_config_is_named(tmp_path, config, text):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"config\.json is damaged, or .*--workdir"):
        read_config(tmp_path)
    with pytest.raises(ValueError, match=r"is damaged|another config"):
        open_workdir(str(tmp_path), config)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "name a folder"),
        ("a\0b", "zero byte"),
        ("x" * 300, "File name too long"),
        ("/proc/run", "cannot be used"),
        ("/dev/null/run", "cannot be used: Not a directory"),
    ],
)
def test_a_workdir_that_cannot_be_is_named(config, monkeypatch, name, message):
    monkeypatch.setattr(program, "load_task", lambda _: open_workdir(name, config))
    with pytest.raises(ValueError, match=message):
        program.train(config, name)


def test_an_incomplete_last_record_is_left_out(tmp_path):
    first = '{"step": 1, "kind": "train", "loss": 1.0, "accuracy": 0.5}\n'
    (tmp_path / "metrics.jsonl").write_text(first + '{"step": 2, "ki')
    assert [r["step"] for r in read_records(tmp_path)] == [1]
    draw_curve(tmp_path)
    assert (tmp_path / "curve.png").exists()
    (tmp_path / "metrics.jsonl").write_text('{"step": 2, "ki\n' + first)
    with pytest.raises(ValueError, match=r"line 1 of .*metrics\.jsonl is damaged"):
        read_records(tmp_path)
