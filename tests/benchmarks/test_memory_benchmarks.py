"""Benchmarks of memory, and 1,024 blocks: the claims that hold at any size."""

import dataclasses
import itertools
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdia_jax import MemoryReport
from benchmarks import deep, digits, finetune_memory, gpt2_memory, lines, memory, record, vit_memory
from benchmarks.stack import TOY
from configs import vit_cifar10
from train.tasks import open_config

pytestmark = pytest.mark.full


def _load(out, name):
    text = (out / f"{record.stem(name)}.json").read_text()
    assert str(out) not in text
    return json.loads(text)


@pytest.mark.parametrize(
    "wanted", [[0.0, 1.0, 2.0, 50.0], [3.0, 3.0, 3.0], [0.0, 20.0, 40.0], [0.0, 9.0, 9.0, 18.0]]
)
def test_labels_stand_apart_and_in_order(wanted):
    heights = [10.0, 20.0, 10.0, 10.0][: len(wanted)]
    centres = lines.apart(wanted, heights)
    for (low, high), (a, b) in zip(
        itertools.pairwise(centres), itertools.pairwise(heights), strict=True
    ):
        assert high - low >= (a + b) / 2 - 1e-9
    assert np.mean(np.subtract(centres, wanted)) == pytest.approx(0, abs=5)


def test_labels_that_do_not_overlap_stay():
    assert lines.apart([0.0, 30.0, 60.0], [10.0, 10.0, 10.0]) == [0.0, 30.0, 60.0]


def test_memory_against_length(unoptimized):
    sizes = memory.against_length(["bdia_lean"], TOY, 2, [32, 64])["bdia_lean"]["temp_bytes"]
    assert sizes["64"] > 1.4 * sizes["32"]
    remat = memory.against_length(["remat"], TOY, 2, [64])["remat"]["temp_bytes"]
    assert sizes["64"] < 0.6 * remat["64"]


def _program(error=None):
    def compile():
        if error:
            raise jax.errors.JaxRuntimeError(error)

    return SimpleNamespace(compile=compile)


@pytest.mark.parametrize(("limit", "found"), [(None, 7), (22, 7), (21, None)])
def test_sizes_beyond_the_device_are_left_out(monkeypatch, limit, found):
    monkeypatch.setattr(memory, "memory_report", lambda _: MemoryReport(10, 8, 3, 7))  # in all 22
    monkeypatch.setattr(memory, "device_bytes", lambda: limit)
    assert memory.temp_bytes(_program()) == found
    assert memory.temp_bytes(_program("RESOURCE_EXHAUSTED: out of memory")) is None
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        memory.temp_bytes(_program("INTERNAL: another matter"))


def test_only_reversible_blocks_keep_side_bits():
    assert memory.side_bytes("remat", TOY) == memory.side_bytes("bdia_remat", TOY) == {}
    packed = {
        name: memory.side_bytes(name, TOY)["packed_bytes_per_block"]
        for name in ("bdia_guard0", "bdia_guard1", "bdia_lean")
    }
    bits = TOY.batch * TOY.tokens * TOY.width
    assert packed == {"bdia_guard0": bits / 8, "bdia_guard1": bits / 4, "bdia_lean": bits / 4}


@pytest.mark.parametrize(("name", "has_bits"), [("bdia_chunked", True), ("remat", False)])
def test_side_bits_of_a_vit(name, has_bits):
    run, changes = vit_memory.ROWS[name]
    values = vit_cifar10.get_config(run)
    values.update(changes)
    elements = 6 * 128 * 65 * 512
    found = vit_memory.side_bytes(open_config(values))
    assert found == (elements * 2 // 8 if has_bits else 0)


def test_gpt2_memory(tmp_path, unoptimized):
    gpt2_memory.main(["--toy", "--out", str(tmp_path)])
    results = _load(tmp_path, "gpt2_memory")["results"]
    assert results["stack"]["bdia_lean"]["ratio_to_remat"] < 0.5
    model = {name: row["temp_bytes"] for name, row in results["model"].items()}
    # half of the vocabulary at a time
    assert model["bdia_lean"] < 0.6 * model["bdia_lean_full_logits"]
    assert {*model} == {"remat", "bdia_lean", "remat_accumulated", "bdia_lean_full_logits"}


def test_summed_gradients_of_parts_are_those_of_the_whole():
    def loss(params, rest, tokens, key):
        return jnp.mean(jnp.sin(params["w"] * tokens)) + rest

    params, tokens = {"w": jnp.arange(3.0)}, jnp.arange(24.0).reshape(8, 3)
    operands = params, 2.0, tokens, jax.random.key(0)
    whole, parts = (
        gpt2_memory.accumulated(jax.value_and_grad(loss), count)(*operands) for count in (1, 4)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), whole, parts)
    first = jax.value_and_grad(loss)(params, 2.0, tokens[:2], jax.random.key(0))
    assert not np.allclose(first[1]["w"], whole[1]["w"])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A record of 1,024 narrow blocks, trained for some steps."""
    out = tmp_path_factory.mktemp("deep")
    size = digits.Size(patch_size=4, batch=16, steps=25)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deep, "TOY", size)
        deep.main(["--toy", "--out", str(out)])
    assert (out / f"{record.stem('deep')}.png").stat().st_size > 10_000
    return _load(out, "deep")


@pytest.mark.parametrize("when", ["start", "end"])
def test_1024_blocks_are_rebuilt_exactly(trained, when):
    audit = trained["results"]["audits"][when]
    assert audit["exact"] and audit["states"] == 1023
    assert audit["elements"] == 1023 * 16 * 5 * 32
    assert 0 < audit["largest_output"] < 100


def test_1024_blocks_cost_their_packed_bits(trained):
    assert trained["config"]["depths"] == [512, 1024]
    stack = trained["results"]["stack"]
    row, remat = stack["bdia_guard1"], stack["remat"]
    assert row["packed_bytes_per_block"] == 16 * 5 * 32 * 2 // 8
    kept = row["packed_bytes_per_block"] + row["gamma_bytes_per_block"]
    assert row["bytes_per_block"] == kept
    assert remat["bytes_per_block"] >= 16 * row["packed_bytes_per_block"]  # control: a state
    planned = trained["results"]["planned"]
    assert planned["bdia"]["rest_bytes"] < planned["remat"]["rest_bytes"]


def test_1024_blocks_learn(trained):
    losses = trained["results"]["scaled"]["loss"]
    assert len(losses) == 25 and np.isfinite(losses).all()
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.2


def test_batch_on_a_gpu_is_the_first_that_checkpointing_cannot_hold():
    limit = 100 * 2**30

    def states(batch):
        return 4 * digits.GPU.depth * batch * 65 * 512

    batch = digits.beyond(limit, digits.GPU).batch
    assert states(batch) > limit >= states(batch - digits.GPU.parts)
    assert batch % digits.GPU.parts == 0
    assert dataclasses.replace(digits.GPU, batch=batch) == digits.beyond(limit, digits.GPU)


@pytest.mark.parametrize("benchmark", [deep, gpt2_memory], ids=lambda b: b.__name__)
def test_toy_numbers_cannot_replace_the_committed_ones(benchmark, capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["--toy"])
    assert "--toy needs --out" in capsys.readouterr().err


def test_fine_tuning_memory(unoptimized):
    sizes = {"input": {"length": 192, "tokenizer": "bytes"}}
    sizes["model"] = {"width": 16, "depth": 4, "num_heads": 2, "mlp_dim": 64}
    plain, lora = (
        finetune_memory.measure(name, sizes | changes, vocab_size=300)
        for name, changes in (("plain", {}), ("lora_bdia", {"batch_chunks": 4}))
    )
    assert lora["trained_parameters"] == 4 * 2 * (16 * 4 + 4 * 16)  # blocks, q and v, A and B
    # neither moments nor gradients of what is frozen, and one part of a block at a time
    assert lora["state_bytes"] < plain["state_bytes"] / 2
    assert lora["temp_bytes"] < plain["temp_bytes"] / 4
    assert plain["total_bytes"] == plain["state_bytes"] + plain["temp_bytes"]
