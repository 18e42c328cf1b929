"""train.plan: what it counts is what the compiler plans, and what its rows ought to be."""

import functools
import subprocess
import sys

import pytest

from benchmarks.plan import compare, gpt2
from configs import gpt2_e2e, gpt2_openwebtext, vit_cifar10
from train.plan.compare import first_depth, make_plans, table
from train.plan.estimate import make_plan
from train.tasks import abstract_task, open_config

_HUGE = {"batch": 64, "length": 512, "depth": 48}  # so that it matters what blocks keep
_SMALL = {"batch": 8, "length": 128, "width": 64, "depth": 4, "vocab": 512}


@pytest.mark.full
@pytest.mark.claim("planned memory is compiled memory")
@pytest.mark.control("planned memory is compiled memory")
def test_a_plan_is_within_a_tenth_of_the_compiled_program():
    """One case here; benchmarks/results/plan.json has all meshes, and a ViT."""
    mesh = {"fsdp": 2, "sequence": 2}
    row = compare(*gpt2(mesh, "reversible", **_HUGE), default=False)
    assert abs(row["ratio"] - 1) < 0.1
    for other, less in (
        (gpt2(mesh, "remat", **_HUGE), 1.1),
        (gpt2({}, "reversible", **_HUGE), 1.5),
    ):
        assert make_plan(*other, "cpu").total > less * row["compiled"]


@functools.cache
def _cached(axes, backprop, sizes):
    return make_plan(*gpt2(dict(axes), backprop, **dict(sizes)))


def _plan(mesh=None, backprop="reversible", **sizes):
    return _cached(tuple((mesh or {}).items()), backprop, tuple((_SMALL | sizes).items()))


def test_rows_are_what_arithmetic_says():
    plan, remat = _plan(), _plan(backprop="remat")
    elements = 8 * 128 * 64
    row = 4 * 4 * 8  # bytes, for 4 blocks and 8 samples: of gamma, of checksums
    assert plan.kept == 4 * elements * 2 // 8 + 2 * row  # two bits in each of 4 blocks
    assert remat.kept == 4 * elements * 4 + row
    # two states, two cotangents; and of each sample whether it is sound, and a checksum
    assert 4 * elements * 4 < plan.states <= 4 * elements * 4 + 8 * 8
    assert plan.optimizer == 2 * plan.parameters + 8  # Adam's, and two counts
    assert plan.parameters == remat.parameters
    assert plan.gradients <= plan.parameters


@pytest.mark.full
def test_each_axis_divides_what_it_splits():
    one = _plan()
    for mesh, divides_parameters, divides_kept in (
        ({"fsdp": 2}, True, True),
        ({"tensor": 2}, True, False),
        ({"sequence": 2}, False, True),
    ):
        two = _plan(mesh)
        # vectors stay whole, and with tensor the embeddings
        assert (two.parameters < 0.8 * one.parameters) == divides_parameters, mesh
        assert (2 * two.kept < 1.01 * one.kept) == divides_kept, mesh
        assert (2 * two.states < 1.01 * one.states) == divides_kept, mesh
        assert two.block < one.block, mesh


@pytest.mark.full
def test_more_devices_than_there_are_can_be_planned():
    assert _plan({"data": 4, "fsdp": 64, "tensor": 8, "sequence": 2}, batch=256).total > 0


@pytest.mark.full
def test_reversible_is_below_remat_from_first_depth_on():
    def plans(depth):
        return {name: _plan(None, name, depth=depth) for name in ("reversible", "remat")}

    at_4 = plans(4)
    depth = first_depth(at_4["reversible"], at_4["remat"], 4)
    assert depth and depth > 1
    below, above = plans(depth), plans(depth - 1)
    assert below["reversible"].total < below["remat"].total
    assert above["reversible"].total >= above["remat"].total


@pytest.mark.full
def test_flash_attention_writes_no_weights_and_a_mask_does():
    def block(length, isolate):
        values = gpt2_openwebtext.get_config()
        values.update({"input": {"length": length, "isolate_documents": isolate}})
        values.update({"model": {"width": 256, "num_heads": 4, "mlp_dim": 1024}})
        config = open_config(values)
        return make_plan(config, abstract_task(config)).block

    assert block(2048, False) / block(1024, False) == pytest.approx(2, rel=0.05)
    assert block(2048, True) / block(1024, True) > 2.5


@pytest.mark.full
def test_frozen_parameters_have_no_gradients():
    config = open_config(gpt2_e2e.get_config("lora_bdia"))
    plan = make_plan(config, abstract_task(config))
    assert plan.parameters > 1e9 > 100 * plan.gradients > 0


@pytest.mark.full
def test_a_table_has_the_ways_that_a_config_can_take():
    values = vit_cifar10.get_config("revnet")
    values.dataset = "digits"
    values.model.patch_size = 2
    config = open_config(values)
    plans = make_plans(config)
    assert list(plans) == ["reversible", "store"]
    assert "smallest: reversible" in table(config, plans)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mesh": {"data": -1}}, "how many"),
        ({"num_seeds": 2, "mesh": {"data": 2}}, "one seed"),
        ({"input": {"tokenizer": "bpe"}}, "vocab_size"),
        ({"dataset": "cifar10", "data_dir": "/nowhere"}, "not prepared"),
    ],
)
def test_what_cannot_be_planned_is_said(changes, message):
    values = (vit_cifar10 if "dataset" in changes else gpt2_openwebtext).get_config()
    values.update(changes)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        make_plans(open_config(values))


def test_the_device_is_one_of_two():
    config, task = gpt2({}, "remat", **_SMALL)
    with pytest.raises(ValueError, match="'gpu' or 'cpu'"):
        make_plan(config, task, "tpu")


@pytest.mark.full
def test_the_program_prints_a_table():
    command = [sys.executable, "-m", "train.plan", "--config=configs/gpt2_openwebtext.py:small"]
    done = subprocess.run([*command, "--config.mesh.fsdp=8"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "on 8 GPUs (fsdp 8)" in done.stdout and "from depth" in done.stdout
