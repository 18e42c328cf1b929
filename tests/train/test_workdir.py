"""The workdir: the run it holds is resumed, another one, or what is no run, is refused by name."""

import errno
import os
import re
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from toy_runs import tiny

import train.loop.train as program
from train.inference.open_run import open_run
from train.loop.log import draw_curve, read_records
from train.run.lock import Lock
from train.run.missing import check_kept
from train.run.workdir import open_workdir, read_config, read_values


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


HOLD = """
import sys, time
from pathlib import Path
from train.run.lock import Lock
with Lock(Path(sys.argv[1])) as lock:
    lock.take()
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.claim("one program trains in a workdir")
@pytest.mark.control("one program trains in a workdir")
def test_the_second_program_is_refused_and_a_kill_leaves_nothing(tmp_path, config, monkeypatch):
    workdir = open_workdir(str(tmp_path / "run"), config)
    command = [sys.executable, "-c", HOLD, str(workdir)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        monkeypatch.setattr(program, "load_task", lambda _: pytest.fail("read the data"))
        host = re.escape(socket.gethostname())
        with pytest.raises(ValueError, match=rf"trained by process {holder.pid} on {host} since 2"):
            program.train(config, str(workdir))
        assert read_config(workdir) == config and read_records(workdir) == []  # readers go on
        holder.kill()
    with Lock(workdir) as lock:
        lock.take()
        lock.take()  # held already
        with pytest.raises(ValueError, match=f"process {os.getpid()} on"), Lock(workdir) as second:
            second.take()
    with Lock(workdir) as lock:  # after an ordinary end, too
        lock.take()


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b'{"pid": '])
def test_a_lock_that_names_nobody_still_locks(tmp_path, content):
    with Lock(tmp_path) as lock, Lock(tmp_path) as second:
        lock.take()
        (tmp_path / "lock").write_bytes(content)
        with pytest.raises(ValueError, match="trained by another program; wait"):
            second.take()


def test_a_lock_on_a_disk_without_locks_or_room(tmp_path, monkeypatch, capsys):
    def without(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    with pytest.raises(ValueError, match="lock cannot be used: Not a directory"):
        Lock(Path("/dev/null")).take()
    (tmp_path / "lock").symlink_to("/dev/full")
    with Lock(tmp_path) as lock:
        lock.take()
    (tmp_path / "lock").unlink()
    monkeypatch.setattr("fcntl.flock", without)
    with Lock(tmp_path) as lock:
        lock.take()
    assert "lock cannot be locked (No locks available): see to it" in capsys.readouterr().out


@pytest.mark.claim("bad input gets one line")
@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("[]", "a list instead of fields"),
        ("3", "a int instead of fields"),
        ('{"kind": "train"}', "step is 'None', expected int"),
        ('{"step": true, "kind": "train"}', "step is 'True', expected int"),
        ('{"step": 1, "kind": []}', r"kind is '\[\]', expected str"),
        ('{"step": 0, "kind": "start"}', "fingerprint is 'None', expected str"),
        ('{"step": 0, "kind": "rebuild", "guard_bits": "3"}', "guard_bits is '3', expected int"),
        ('{"step": 1, "kind": "final", "loss": {}}', "loss is '{}', expected float"),
        ('{"step": 1, "kind": "eval", "loss": null}', "loss is 'None', expected float"),
        ('{"step": 1, "kind": "eval", "seeds": [1]}', "seeds is a list, expected fields"),
        pytest.param("[" * 100_000, "Recursion|nested|Expecting|depth", id="deep"),
    ],
)
@pytest.mark.parametrize("last", ["", '{"step": 2, "kind": "eval", "loss": NaN}\n'])
def test_a_record_of_wrong_content_is_named(tmp_path, line, wrong, last):
    (tmp_path / "metrics.jsonl").write_text(f"{line}\n{last}")
    if line[:2] == "[[" and not last:
        assert read_records(tmp_path) == []  # as a kill may leave it
        return
    with pytest.raises(ValueError, match=rf"^line 1 of .*metrics\.jsonl is damaged \(.*{wrong}"):
        read_records(tmp_path)


def test_what_a_workdir_has_lost_is_named(tmp_path, config, capsys):
    workdir = open_workdir(str(tmp_path), config)
    (workdir / "metrics.jsonl").write_text('{"step": 4, "kind": "eval", "loss": 1.0}\n')
    check_kept(workdir, 0)  # of a run that was never begun
    with pytest.raises(ValueError, match=r"checkpoints is gone, of a run that was at step 4\. B"):
        check_kept(workdir, 4)
    with pytest.raises(FileNotFoundError, match="or bring checkpoints/ back from a copy"):
        open_run(workdir)
    (workdir / "checkpoints").mkdir()
    check_kept(workdir, 4)
    assert "begins again at step 0" in capsys.readouterr().out
    (workdir / "checkpoints" / "2").mkdir()
    check_kept(workdir, 4)
    assert not capsys.readouterr().out
    (workdir / "config.json").unlink()
    readers = (open_run, read_values, read_config, lambda path: open_workdir(str(path), config))
    for read in readers:
        with pytest.raises((ValueError, FileNotFoundError), match=r"no config\.json.* from a copy"):
            read(workdir)
