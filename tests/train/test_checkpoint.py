"""Checkpoints: what comes back is what was saved, on any mesh, or something older and a line."""

import contextlib
import json
import os
import resource
import shutil
import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import train.loop.train as program
from configs import vit_digits
from train.loop.interrupt import Interrupt, Stopped
from train.loop.log import read_records
from train.loop.train import train
from train.run.checkpoint import Checkpoints
from train.run.checksum import checksums
from train.run.workdir import open_workdir, read_config
from train.tasks import open_config

pytestmark = pytest.mark.usefixtures("quick_compile")


def make_state(step, width=48):
    key = jax.random.key(step)
    return {
        "step": jnp.int32(step),
        "params": {"w": jax.random.normal(key, (64, width)), "b": jnp.ones(8, jnp.bfloat16)},
        "seen": jnp.arange(5) % 2 == 0,
        "pixels": jnp.arange(9, dtype=jnp.uint8),
        "key": key,
    }


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    return checksums(a) == checksums(b)


def raw(array):
    array = (
        jax.random.key_data(array) if jnp.issubdtype(array.dtype, jax.dtypes.prng_key) else array
    )
    return np.asarray(array).tobytes()


def same_bits(a, b):
    return all(raw(x) == raw(y) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))


# --- checksums -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "bool", "uint32"])
def test_every_flipped_bit_changes_the_checksum(dtype):
    array = np.asarray([[0, 1], [0, 3], [1, 2]]).astype(dtype)
    sums = {checksums(array)[""]}
    bits = 1 if dtype == "bool" else 8 * array.itemsize
    for element in range(array.size):
        for bit in range(bits):
            words = array.copy().reshape(-1).view(f"u{array.itemsize}")
            words[element] ^= words.dtype.type(1 << bit)
            sums.add(checksums(words.view(array.dtype).reshape(3, 2))[""])
    assert len(sums) == 1 + array.size * bits
    assert checksums(array[::-1].copy())[""] not in sums  # nor does exchanging rows go unseen


@pytest.mark.parametrize("spec", [("a",), ("a", "b"), (("b", "a"),), (None, "a")])
def test_a_checksum_does_not_depend_on_the_mesh(spec):
    mesh = jax.make_mesh((2, 2), ("a", "b"))
    array = jax.random.normal(jax.random.key(2), (8, 4))
    split = jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))
    assert checksums(split) == checksums(array) != checksums(array.T)


# --- save and restore ----------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A workdir with the states of steps 2 and 4."""
    workdir = tmp_path_factory.mktemp("saved")
    with Checkpoints(workdir, fingerprint="f") as checkpoints:
        for step in (2, 4):
            checkpoints.save(step, make_state(step))
    return workdir


@pytest.fixture
def copied(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run"


def restore(workdir, **options):
    with Checkpoints(workdir, **options) as checkpoints:
        return checkpoints.restore(lambda: make_state(0))


def test_restored_onto_another_mesh_and_back(tmp_path):
    state = make_state(3)
    meshes = [jax.make_mesh((2, 2), ("a", "b")), jax.make_mesh((4,), ("a",))]

    def abstract(mesh):
        def one(leaf):
            spec = PartitionSpec("a") if leaf.ndim == 2 else PartitionSpec()
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

        return jax.tree.map(one, state)

    split = jax.tree.map(
        lambda leaf, its: jax.device_put(leaf, its.sharding), state, abstract(meshes[0])
    )
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, split)
        checkpoints.wait()
        other = checkpoints.restore(abstract(meshes[1]))
        alone = checkpoints.restore(lambda: state)
    assert other["params"]["w"].sharding == abstract(meshes[1])["params"]["w"].sharding
    assert alone["params"]["w"].sharding.device_set == {jax.devices()[0]}
    assert same_bits(other, state) and same_bits(alone, state)
    assert not same_bits(other, make_state(4))


@pytest.mark.parametrize(
    ("keep_last", "keep_best", "kept"), [(1, 0, [6]), (2, 0, [5, 6]), (1, 2, [2, 4, 6])]
)
def test_the_newest_and_the_best_are_kept(tmp_path, keep_last, keep_best, kept):
    losses = {1: 3.0, 2: 1.0, 3: 2.0, 4: np.array([0.5, 0.7]), 5: np.nan}
    for steps in ((1, 2, 3), (4, 5, 6)):  # by two processes, one after the other
        with Checkpoints(tmp_path, keep_last=keep_last, keep_best=keep_best) as checkpoints:
            for step in steps:
                metrics = {"loss": losses[step]} if step in losses else None
                checkpoints.save(step, {"step": jnp.int32(step)}, metrics)
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == kept
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        best = checkpoints.restore(lambda: {"step": jnp.int32(0)}, best=True)
    assert int(best["step"]) == (4 if keep_best else 6)  # with no score left, the newest


# --- damage --------------------------------------------------------------------------


def truncate(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file):
    data = bytearray(file.read_bytes())
    data[3 * len(data) // 5] ^= 4
    file.write_bytes(data)


def delete(file):
    file.unlink()


@pytest.mark.parametrize("damage", [truncate, flip, delete])
def test_damage_to_any_file_is_harmless_or_named(saved, copied, tmp_path, capsys, damage):
    files = [path.relative_to(saved) for path in (saved / "checkpoints/4").rglob("*")]
    states = {step: make_state(step) for step in (2, 4)}
    named = 0
    for number, file in enumerate(path for path in files if (saved / path).is_file()):
        shutil.copytree(saved, tmp_path / str(number))
        damage(tmp_path / str(number) / file)
        state = restore(tmp_path / str(number))
        step, out = int(state["step"]), capsys.readouterr()
        assert same_bits(state, states[step]), file
        assert ("the checkpoint of step 4" in out.out and "using the one of step 2" in out.out) == (
            step == 2
        )
        assert "Traceback" not in out.err
        aside = tmp_path / str(number) / "checkpoints" / "4.damaged"
        assert aside.exists() == (step == 2)
        named += step == 2
    assert named >= 4  # record, metadata, manifest, data


def test_orbax_alone_does_not_see_a_flipped_bit(copied, monkeypatch):
    """The negative control of the checksums: without them another state comes back."""
    data = max((copied / "checkpoints/4/state").rglob("*"), key=lambda path: path.stat().st_size)
    flip(data)
    fine = restore(copied, read_only=True)
    assert int(fine["step"]) == 2
    monkeypatch.setattr("train.run.checkpoint.checksums", lambda state: _recorded(copied))
    wrong = restore(copied, read_only=True)
    assert int(wrong["step"]) == 4 and not same_bits(wrong, make_state(4))


def _recorded(workdir):
    record = json.loads((workdir / "checkpoints/4/record/metadata").read_text())
    return {name: checksum for name, (*_, checksum) in record["arrays"].items()}


def test_a_reader_leaves_damage_and_unfinished_saves_alone(copied, capsys):
    unfinished = copied / "checkpoints" / "6.orbax-checkpoint-tmp"
    (unfinished / "state").mkdir(parents=True)
    delete(copied / "checkpoints/4/record/metadata")
    before = sorted(copied.rglob("*"))
    assert int(restore(copied, read_only=True)["step"]) == 2
    assert "its record cannot be read, No such file" in capsys.readouterr().out
    assert sorted(copied.rglob("*")) == before
    with Checkpoints(copied) as checkpoints:  # the run itself
        checkpoints.save(6, make_state(6))
    assert not unfinished.exists() and int(restore(copied)["step"]) == 6


def test_nothing_starts_anew_when_all_are_damaged(copied):
    for step in (2, 4):
        flip(copied / f"checkpoints/{step}/record/metadata")
    before = sorted(copied.rglob("*"))
    message = r"step 4: its record .*step 2: its record .* delete that folder to start from step 0"
    with pytest.raises(ValueError, match=message), Checkpoints(copied) as checkpoints:
        checkpoints.restore_or(lambda: make_state(0))
    assert sorted(copied.rglob("*")) == before


def test_another_model_or_other_examples_are_not_damage(copied):
    with Checkpoints(copied, fingerprint="g") as checkpoints:
        with pytest.raises(ValueError, match=r"trained on other examples .fingerprint f, now g"):
            checkpoints.restore(lambda: make_state(0))
        with pytest.raises(ValueError, match=r"params.w was .'float32', .64, 48.., is .*64, 50"):
            checkpoints.restore(lambda: make_state(0, width=50))
    assert int(restore(copied, fingerprint="f")["step"]) == 4


def test_a_checkpoint_under_another_step_is_damaged(copied, capsys):
    (copied / "checkpoints/4").rename(copied / "checkpoints/9")
    assert int(restore(copied)["step"]) == 2
    assert "it is of step 4" in capsys.readouterr().out


# --- a full disk ---------------------------------------------------------------------


@contextlib.contextmanager
def files_up_to(size):
    """A larger file cannot be written: the limit of the process, as of a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_save_that_fails_leaves_the_one_before(copied):
    large = make_state(6) | {"more": jax.random.normal(jax.random.key(0), (100_000,))}
    message = r"checkpoint of step 6 could not be written .*File too large; the one of step 4 stays"
    with (
        files_up_to(100_000),
        pytest.raises(ValueError, match=message),
        Checkpoints(copied) as checkpoints,
    ):
        checkpoints.save(6, large)
        checkpoints.wait()
    assert same(restore(copied), make_state(4))
    with Checkpoints(copied) as checkpoints:  # now there is room
        checkpoints.save(6, make_state(6))
    assert same(restore(copied), make_state(6))


# --- signals -------------------------------------------------------------------------


def test_the_second_signal_does_what_it_always_did():
    with Interrupt() as interrupt:
        assert interrupt.requested() == ""
        signal.raise_signal(signal.SIGINT)
        assert interrupt.requested() == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_signals_are_left_alone_outside_the_main_thread_or_if_ignored():
    asked = []

    def run():
        with Interrupt() as interrupt:
            asked.append((interrupt.requested(), signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert asked == [("", signal.SIG_DFL)]
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    with Interrupt() as interrupt:
        signal.raise_signal(signal.SIGINT)
        assert interrupt.requested() == ""
    signal.signal(signal.SIGINT, before)


# --- a run ---------------------------------------------------------------------------


def tiny(data_dir):
    config = vit_digits.get_config("plain,smoke").unlock()
    config.update({"data_dir": data_dir, "num_steps": 6, "optimizer": "adamw"})
    config.update({"log_every_steps": 1, "eval_every_steps": 2, "checkpoint_every_steps": 2})
    return open_config(config.lock())


def arrays_of(workdir, step):
    record = json.loads((workdir / f"checkpoints/{step}/record/metadata").read_text())
    return record["arrays"]


def metrics_of(workdir):
    return [(r["step"], r["kind"], r["loss"]) for r in read_records(workdir) if "loss" in r]


def test_sigterm_then_damage_then_a_full_disk_and_still_the_same_end(
    tmp_path, data_dir, monkeypatch, capsys
):
    config = tiny(data_dir)
    train(config, str(tmp_path / "straight"))
    workdir = tmp_path / "run"
    log_train = program.Log.train

    def terminates(log, step, **metrics):
        log_train(log, step, **metrics)
        if step == 4:  # step 5 has been dispatched
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(program.Log, "train", terminates)
    with pytest.raises(Stopped) as stopped:
        train(config, str(workdir))
    monkeypatch.setattr(program.Log, "train", log_train)
    assert stopped.value.code == 0
    assert "stopped by SIGTERM at step 5, saved; the same command" in capsys.readouterr().out
    assert arrays_of(workdir, 5) != arrays_of(workdir, 4)  # the comparison below can fail

    flip(workdir / "checkpoints/5/record/metadata")
    (workdir / "metrics.tmp").symlink_to("/dev/full")
    with pytest.raises(ValueError, match=r"could not be written: No space left on device; the c"):
        train(config, str(workdir))
    assert "using the one of step 4" in capsys.readouterr().out
    (workdir / "metrics.tmp").unlink()
    train(config, str(workdir))
    assert arrays_of(workdir, 6) == arrays_of(tmp_path / "straight", 6)
    assert metrics_of(workdir) == metrics_of(tmp_path / "straight")


# --- the workdir ---------------------------------------------------------------------


def test_a_kill_before_the_config_leaves_a_usable_workdir(tmp_path, data_dir):
    config = tiny(data_dir)
    (tmp_path / "config.tmp").write_text('{"seed": ')
    open_workdir(str(tmp_path), config)
    assert read_config(tmp_path) == config
    (tmp_path / "config.json").unlink()
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match=r"no config\.json"):
        open_workdir(str(tmp_path), config)


@pytest.mark.parametrize(
    "text", ['{"seed": 0,', "[]", "{}", '{"seed": 0, "model": {}}', "\xff\xfe"]
)
def test_a_damaged_config_is_named(tmp_path, data_dir, text):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"config\.json is damaged, or .*--workdir"):
        read_config(tmp_path)
    with pytest.raises(ValueError, match=r"is damaged|another config"):
        open_workdir(str(tmp_path), tiny(data_dir))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "name a folder"),
        ("  ", "name a folder"),
        ("a\0b", "zero byte"),
        ("x" * 300, "File name too long"),
        ("/proc/run", "cannot be used"),
        ("/dev/null", "cannot be used"),
        ("/dev/null/run", "cannot be used: Not a directory"),
    ],
)
def test_a_workdir_that_cannot_be_is_named(data_dir, monkeypatch, name, message):
    monkeypatch.setattr(program, "load_task", lambda _: open_workdir(name, tiny(data_dir)))
    with pytest.raises(ValueError, match=message):
        train(tiny(data_dir), name)
