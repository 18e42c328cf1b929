"""Checkpoints: what comes back is what was saved, on any mesh, or something older and a line."""

import asyncio
import json
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from train.run.arrays import patient
from train.run.checkpoint import Checkpoints
from train.run.checksum import checksums

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


def raw(array):
    is_key = jnp.issubdtype(array.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(array) if is_key else array).tobytes()


def same_bits(a, b):
    return all(raw(x) == raw(y) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))


# --- checksums -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "bool"])
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


@pytest.mark.parametrize("spec", [("a",), (("b", "a"),), (None, "a")])
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
    return shutil.copytree(saved, tmp_path / "run")


def restore(workdir, width=48, **options):
    with Checkpoints(workdir, **options) as checkpoints:
        return checkpoints.restore(jax.eval_shape(lambda: make_state(0, width)))


def test_restored_onto_another_mesh_and_back(tmp_path):
    state = make_state(3)
    meshes = [jax.make_mesh((2, 2), ("a", "b")), jax.make_mesh((4,), ("a",))]

    def abstract(mesh):
        def one(leaf):
            spec = PartitionSpec("a") if leaf.ndim == 2 else PartitionSpec()
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

        return jax.tree.map(one, state)

    split = jax.tree.map(
        lambda leaf, like: jax.device_put(leaf, like.sharding), state, abstract(meshes[0])
    )
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, split)
        checkpoints.wait()
        other = checkpoints.restore(abstract(meshes[1]))
        alone = checkpoints.restore(jax.eval_shape(lambda: state))
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
        best = checkpoints.restore({"step": jax.ShapeDtypeStruct((), jnp.int32)}, best=True)
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


@pytest.mark.claim("damage is noticed")
@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", [truncate, flip, delete])
def test_damage_to_any_file_is_harmless_or_named(saved, tmp_path, capsys, damage):
    files = [path.relative_to(saved) for path in (saved / "checkpoints/4").rglob("*")]
    states = {step: make_state(step) for step in (2, 4)}
    named = 0
    for number, file in enumerate(path for path in files if (saved / path).is_file()):
        workdir = shutil.copytree(saved, tmp_path / str(number))
        damage(workdir / file)
        state = restore(workdir)
        step, out = int(state["step"]), capsys.readouterr()
        assert same_bits(state, states[step]), file
        said = "the checkpoint of step 4" in out.out and "using the one of step 2" in out.out
        assert said == (step == 2) == (workdir / "checkpoints" / "4.damaged").exists()
        assert out.err == ""
        named += step == 2
    assert named >= 4  # record, metadata, manifest, data


@pytest.mark.control("damage is noticed")
def test_orbax_alone_does_not_see_a_flipped_bit(copied, monkeypatch):
    """Without the checksums another state comes back."""
    data = max((copied / "checkpoints/4/state").rglob("*"), key=lambda path: path.stat().st_size)
    flip(data)
    assert int(restore(copied, read_only=True)["step"]) == 2
    record = json.loads((copied / "checkpoints/4/record/metadata").read_text())
    recorded = {name: checksum for name, (*_, checksum) in record["arrays"].items()}
    monkeypatch.setattr("train.run.checkpoint.checksums", lambda state: recorded)
    wrong = restore(copied, read_only=True)
    assert int(wrong["step"]) == 4 and not same_bits(wrong, make_state(4))


def test_a_failed_read_waits_for_those_beside_it():
    """Else Orbax closes their event loop, and Python tells of each (a control is in here)."""

    class Handler:
        async def deserialize(self, infos, args=None):
            self.other = asyncio.ensure_future(asyncio.sleep(0.01, "read"))
            raise OSError("damaged")

    for handler, waits in ((patient(Handler()), True), (Handler(), False)):
        loop = asyncio.new_event_loop()
        with pytest.raises(OSError, match="damaged"):
            loop.run_until_complete(handler.deserialize([]))
        assert handler.other.done() == waits
        loop.run_until_complete(handler.other)
        loop.close()


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
    message = r"step 4: its record .*step 2: its record .* and that folder to begin at step 0"
    with pytest.raises(ValueError, match=message), Checkpoints(copied) as checkpoints:
        checkpoints.restore_or(pytest.fail, jax.eval_shape(lambda: make_state(0)))
    assert sorted(copied.rglob("*")) == before


def test_another_run_is_no_damage_another_step_is(copied, capsys):
    with pytest.raises(ValueError, match=r"trained on other examples .fingerprint f, now g"):
        restore(copied, fingerprint="g")
    with pytest.raises(ValueError, match=r"params.w was .'float32', .64, 48.., is .*64, 50"):
        restore(copied, width=50)
    assert int(restore(copied, fingerprint="f")["step"]) == 4
    (copied / "checkpoints/4").rename(copied / "checkpoints/9")
    assert int(restore(copied)["step"]) == 2
    assert "it is of step 4" in capsys.readouterr().out


# --- a full disk ---------------------------------------------------------------------


@pytest.fixture
def full_disk():
    """No file can have more than 100,000 bytes: the limit of the process."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax's writes
def test_a_save_that_fails_leaves_the_one_before(copied, full_disk):
    large = make_state(6) | {"more": jax.random.normal(jax.random.key(0), (100_000,))}
    message = r"checkpoint of step 6 could not be written .*File too large; the one of step 4 stays"
    with pytest.raises(ValueError, match=message), Checkpoints(copied) as checkpoints:
        checkpoints.save(6, large)
        checkpoints.wait()
    assert same_bits(restore(copied), make_state(4))
    with Checkpoints(copied) as checkpoints:  # a smaller one has room
        checkpoints.save(6, make_state(6))
    assert same_bits(restore(copied), make_state(6))
