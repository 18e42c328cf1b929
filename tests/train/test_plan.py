"""train.plan: its total is the compiled program's, and its formulas are numbers counted by hand."""

import functools
import subprocess
import sys

import jax
import pytest

from bdia_jax import memory_report
from bdia_jax.compiled import targets
from benchmarks.plan import most
from configs import gpt2_e2e, gpt2_openwebtext, vit_cifar10
from train.plan.closed_form import at_depth, mesh_sizes, parts
from train.plan.compiled import Plan, Where, compile_steps, make_plan, open_devices, ways
from train.plan.table import fits, table
from train.tasks import abstract_task, open_config

BATCH, LENGTH, WIDTH, DEPTH = 8, 128, 64, 4


def config_of(**changes):
    values = gpt2_openwebtext.get_config()
    values.update({"input": {"tokenizer": "bytes", "length": LENGTH, "isolate_documents": False}})
    values.update({"model": {"width": WIDTH, "depth": DEPTH, "num_heads": 2, "mlp_dim": 128}})
    values.update({"model": {"dtype": "float32"}, "batch_size": BATCH})
    values.update(changes)
    return open_config(values)


@functools.cache
def counted(backprop="reversible", **mesh):
    config = config_of(backprop=backprop, mesh=mesh)
    return parts(config, abstract_task(config))


def on_cpu(count=1):
    if jax.device_count() < count:
        pytest.skip(f"needs {count} devices")
    return Where(jax.local_devices(backend="cpu"), None)


def has_compiler():
    try:
        targets.devices("h100")
    except ValueError:
        return False
    return True


def test_parts_are_what_arithmetic_says():
    found, remat = counted(), counted("remat")
    elements = BATCH * LENGTH * WIDTH
    row = 4 * DEPTH * BATCH  # bytes, for every block and sample: of gamma, of checksums
    assert found.kept == DEPTH * elements * 2 // 8 + 2 * row  # two bits in each block
    assert remat.kept == DEPTH * elements * 4 + row
    of_block = 4 * WIDTH**2 + 2 * WIDTH * 128 + 128 + 9 * WIDTH + 4 * WIDTH
    assert found.parameters == pytest.approx(4 * DEPTH * of_block, rel=0.25)  # and embeddings
    assert found.gradients == found.parameters == remat.parameters
    assert found.optimizer == 2 * found.parameters + 8  # Adam's, and two counts
    assert found.batch == BATCH * (LENGTH + 1) * 4


@pytest.mark.full
@pytest.mark.parametrize(
    ("mesh", "divides_parameters", "divides_kept"),
    [({"fsdp": 2}, True, True), ({"tensor": 2}, True, False), ({"sequence": 2}, False, True)],
)
def test_each_axis_divides_what_it_splits(mesh, divides_parameters, divides_kept):
    one, two = counted(), counted(**mesh)
    # vectors stay whole, and with tensor the embeddings
    assert (two.parameters < 0.8 * one.parameters) == divides_parameters
    assert (2 * two.kept < 1.01 * one.kept) == divides_kept


def test_parts_need_no_devices():
    assert counted(fsdp=8).batch == counted().batch // 8


@pytest.mark.full
def test_frozen_parameters_have_no_gradients():
    config = open_config(gpt2_e2e.get_config("lora_bdia"))
    found = parts(config, abstract_task(config))
    assert found.parameters > 1e9 > 100 * found.gradients > 0


@pytest.mark.full
@pytest.mark.claim("planned memory is compiled memory")
@pytest.mark.control("planned memory is compiled memory")
def test_the_total_is_the_compiled_programs_and_depth_adds_what_is_counted():
    """On two devices. The control: what is counted for `jax.checkpoint` is not BDIA's."""
    where, mesh = on_cpu(2), {"fsdp": 2}
    config = config_of(mesh=mesh, model={"depth": 32})
    plan = make_plan(config, abstract_task(config), where)
    compiled = compile_steps(config, abstract_task(config), where)
    assert plan.total == memory_report(compiled).total
    assert plan.temporaries > plan.parts.kept and plan.collectives and plan.sent
    shallow = config_of(mesh=mesh)
    small = make_plan(shallow, abstract_task(shallow), where)
    assert at_depth(small.total, small.parts, plan.parts) == pytest.approx(plan.total, rel=0.05)
    remat = config_of(mesh=mesh, model={"depth": 32}, backprop="remat")
    wrong = parts(remat, abstract_task(remat))
    assert at_depth(small.total, small.parts, wrong) > 1.1 * plan.total


@pytest.mark.full
@pytest.mark.skipif(not has_compiler(), reason="needs the extra gpu-plan")
def test_a_mesh_of_gpus_is_planned():
    config = config_of(mesh={"fsdp": 2})
    plan = make_plan(config, abstract_task(config), open_devices("h100", 2))
    assert plan.work and plan.work.kernels and plan.sent
    assert plan.parts == counted(fsdp=2)


def plan_of(temporaries, work=None):
    numbers = {"parameters": 2**20, "optimizer": 2**21, "batch": 0, "collectives": 3, "sent": 2**30}
    return Plan(**numbers, temporaries=temporaries, parts=counted(), work=work)


def test_a_table_has_a_column_for_each_way():
    lines = table({"remat": plan_of(2**20), "reversible": plan_of(0)}).splitlines()
    assert lines[0].split()[-2:] == ["remat", "reversible"]
    assert [line.split()[-2:] for line in lines if line.startswith("total")] == [["4.0", "3.0"]]
    assert lines[-1].split() == ["GiB", "sent", "1.00", "1.00"]  # a CPU has no bound of time


def test_what_fits_leaves_room():
    h100 = targets.TARGETS["h100"]
    assert h100.usable / 2**30 == pytest.approx(60.59, abs=0.05)
    told = fits({"remat": plan_of(h100.usable), "reversible": plan_of(0)}, h100)
    assert "60.6 of 79.1 GiB" in told and told.endswith(": reversible; too large: remat")


def test_ways_are_those_that_a_config_can_have():
    assert list(ways(config_of())) == ["store", "remat", "reversible", "in 4 chunks"]
    assert "in 4 chunks" not in ways(config_of(mesh={"fsdp": 4}))  # 2 examples on 4 devices
    assert "in 4 chunks" not in ways(config_of(batch_size=6))
    values = vit_cifar10.get_config("revnet")
    assert list(ways(open_config(values))) == ["store", "reversible"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mesh": {"data": -1}}, "how many"),
        ({"num_seeds": 2, "mesh": {"data": 2}}, "one seed"),
        ({"mesh": {"fsdp": 3}}, "cannot share"),
        ({"input": {"tokenizer": "bpe"}}, "vocab_size"),
        ({"dataset": "cifar10", "data_dir": "/nowhere"}, "not prepared"),
    ],
)
def test_what_cannot_be_planned_is_said(changes, message):
    values = (vit_cifar10 if "dataset" in changes else gpt2_openwebtext).get_config()
    values.update(changes)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        config = open_config(values)
        mesh_sizes(config.mesh)
        make_plan(config, abstract_task(config), on_cpu())


def test_an_unknown_device_is_said():
    with pytest.raises(ValueError, match="'tpu', expected cpu, a100"):
        open_devices("tpu", 1)


def test_without_the_compiler_a_cpu_stands_in_and_the_remedy_is_said():
    if has_compiler():
        pytest.skip("this machine has the extra gpu-plan")
    where = open_devices("h100", 1)
    assert where.target is None and where.devices[0].platform == "cpu"
    assert "compiled for a CPU" in where.told and "-e '.[gpu-plan]'" in where.told


@pytest.mark.full
def test_the_program_prints_a_table():
    """Of the plain transformer, which is not reversible."""
    command = [
        sys.executable,
        "-m",
        "train.plan",
        "--config=configs/gpt2_openwebtext.py:plain,smoke",
    ]
    command += ["--config.mesh.fsdp=2", "--device=cpu"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "on 2 x CPU (fsdp 2)" in done.stdout
    assert "store         remat\n" in done.stdout


@pytest.mark.parametrize(("limit", "count"), [(9, 0), (10, 1), (95, 9), (800, 54), (5000, 334)])
def test_the_most_that_fits_is_found_in_few_tries(limit, count):
    """Of a total that is a straight line up to another, steeper one."""
    asked = []

    def total(n):
        asked.append(n)
        return max(10 * n, 15 * n - 10 if n > 3 else 0) if limit > 95 else 10 * n

    assert most(total, limit, 10) == count
    assert len(asked) < 14
