"""A run over several devices and processes: the same batches, the same training, less a device."""

import os
import shutil
import socket
import subprocess
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from toy_runs import points

from configs import vit_digits
from train.config import MeshConfig
from train.devices.mesh import check_shares, open_mesh
from train.devices.processes import join
from train.devices.shards import local_rows, place, take
from train.inference.open_run import open_run
from train.launch import launch
from train.loop.log import read_records
from train.loop.program import make_program
from train.loop.train import train
from train.run.fingerprint import data_fingerprint
from train.tasks import load_task, open_config

pytestmark = [
    pytest.mark.usefixtures("quick_compile"),
    pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices"),
]
CONFIG = open_config(vit_digits.get_config("smoke"))


def on(config, data=1, fsdp=1, tensor=1, sequence=1):
    return replace(config, mesh=MeshConfig(data, fsdp, tensor, sequence))


def test_a_batch_is_taken_from_wherever_its_examples_are():
    mesh = open_mesh(MeshConfig(2, 2, 1, 1))
    group = {"image": np.arange(11 * 3, dtype=np.uint8).reshape(11, 3), "label": np.arange(11)}
    (placed,) = place([group], [11], mesh)
    assert placed["label"].sharding.spec == P(("data", "fsdp")) and len(placed["label"]) == 12
    for index in (jnp.array([10, 0, 7, 3, 3, 1, 2, 9]), jnp.array([5, 10, 4])):  # 4 divides 8
        batch = jax.jit(lambda group, index: take(group, index, mesh))(placed, index)
        for name, array in group.items():
            np.testing.assert_array_equal(batch[name], array[np.asarray(index)])


def test_what_a_process_holds_of_the_examples():
    assert list(local_rows(11, open_mesh(MeshConfig(4, 1, 1, 1)))) == [*range(11)]
    assert list(local_rows(3, None)) == [0, 1, 2]


def test_all_that_is_of_parameters_is_split_over_fsdp(data_dir):
    config = on(replace(CONFIG, data_dir=data_dir), data=2, fsdp=2)
    state = make_program(config, load_task(config)).abstract_state
    kernels = [
        leaf.sharding.spec
        for path, leaf in jax.tree.leaves_with_path(state)
        if "hidden" in str(path) and "kernel" in str(path)
    ]
    assert kernels == [P(None, "fsdp", None)] * 3  # it, and both moments


def params_of(workdir, data_dir):
    params = nnx.state(open_run(workdir, data_dir).model, nnx.Param)
    return jax.tree.leaves(nnx.to_pure_dict(params))


def worst(tree, other):
    return max(float(np.max(np.abs(a - b))) for a, b in zip(tree, other, strict=True))


@pytest.mark.full
@pytest.mark.claim("a mesh trains as one device")
@pytest.mark.control("a mesh trains as one device")
def test_two_processes_then_other_devices_train_as_one_device_does(
    tmp_path, data_dir, quick_processes
):
    """Two devices each; then eight of one process, from what the two had saved half-way."""
    changes = {"data_dir": data_dir, "num_steps": 4, "checkpoint_every_steps": 2}
    changes |= {"frac_bits": 20}  # with 9, sums that round otherwise now and then move a quantum
    config = replace(CONFIG, **changes)
    train(config, str(tmp_path / "one"))
    one = params_of(tmp_path / "one", data_dir)
    arguments = ["--config=configs/vit_digits.py:smoke", f"--workdir={tmp_path / 'two'}"]
    arguments += [f"--config.{name}={value}" for name, value in changes.items()]
    arguments += ["--config.mesh.data=2", "--config.mesh.fsdp=2"]
    assert launch(arguments, processes=2, devices=2) == 0
    two = params_of(tmp_path / "two", data_dir)
    assert worst(two, one) < 1e-5

    shutil.rmtree(tmp_path / "two" / "checkpoints" / "4")  # as if it had been stopped
    records = (tmp_path / "two" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "two" / "metrics.jsonl").write_text("".join(records[:-1]))
    assert worst(params_of(tmp_path / "two", data_dir), one) > 1e-4  # the control
    train(on(config, data=2, fsdp=2, tensor=2), str(tmp_path / "two"))
    resumed = params_of(tmp_path / "two", data_dir)
    starts = [r["step"] for r in read_records(tmp_path / "two") if r["kind"] == "start"]
    assert starts == [0, 2]
    assert 0 < worst(resumed, two) < 1e-5


def test_a_fingerprint_is_of_every_example():
    task = points()
    (group,), (held_out,) = task.train_groups, task.eval_groups
    changed = [{**group, "y": group["y"] + (np.arange(64) == row)} for row in (0, 63)]
    changed.append({name: array[::-1] for name, array in group.items()})
    tasks = [task, *(task._replace(train_groups=(each,)) for each in changed)]
    tasks.append(task._replace(eval_groups=({**held_out, "y": -held_out["y"]},)))
    assert len({data_fingerprint(each, None) for each in tasks}) == len(tasks)
    assert data_fingerprint(points(), None) == data_fingerprint(task, None)


@pytest.mark.full
def test_two_processes_read_half_of_the_examples_each(data_dir):
    script = """
import sys
from dataclasses import replace
from train.devices.processes import join
join(False, sys.argv[1], 2, int(sys.argv[2]))
from configs import vit_digits
from train.config import MeshConfig
from train.devices.mesh import open_mesh
from train.run.fingerprint import data_fingerprint
from train.tasks import load_task, open_config
config = open_config(vit_digits.get_config("smoke"))
config = replace(config, data_dir=sys.argv[3], mesh=MeshConfig(-1, 1, 1, 1))
task = load_task(config)
fingerprint = data_fingerprint(task, open_mesh(config.mesh))
print(len(task.train_groups[0].images), *task.train_sizes, fingerprint, file=sys.stderr)
"""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    commands = [[sys.executable, "-c", script, address, index, data_dir] for index in "01"]
    alone = os.environ | {"XLA_FLAGS": ""}
    processes = [
        subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=alone)
        for command in commands
    ]
    said = [process.communicate()[1].splitlines()[-1] for process in processes]
    whole = load_task(replace(CONFIG, data_dir=data_dir))
    count, fingerprint = len(whole.train_groups[0].images), data_fingerprint(whole, None)
    assert said == [f"{count // 2} {count} {fingerprint}"] * 2


def test_a_mesh_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"mesh.fsdp is 0"):
        MeshConfig(data=1, fsdp=0, tensor=1, sequence=1)
    with pytest.raises(ValueError, match=r"3 \(fsdp \* tensor \* sequence\) does not divide the 8"):
        open_mesh(MeshConfig(-1, 3, 1, 1))
    assert open_mesh(MeshConfig(1, 1, 1, 1)) is None


@pytest.mark.parametrize(
    ("data", "changes", "message"),
    [
        (3, {}, r"batch_size 32 in batch_chunks 1 .* 3 devices"),
        (8, {"batch_chunks": 8}, r"batch_size 32 in batch_chunks 8"),
        (2, {"num_seeds": 2}, r"num_seeds is 2 with a mesh"),
    ],
)
def test_what_the_devices_cannot_share_is_refused(data, changes, message):
    config = replace(on(CONFIG, data=data), **changes)
    with pytest.raises(ValueError, match=message):
        check_shares(config, open_mesh(config.mesh))


def test_processes_that_cannot_be_joined_are_refused():
    with pytest.raises(ValueError, match="give all three"):
        join(False, "localhost:1", 2, 2)
