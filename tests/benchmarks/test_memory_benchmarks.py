"""How memory is measured and drawn: what does not fit, side bits, summed gradients, labels."""

import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdia_jax import MemoryReport
from benchmarks import gpt2_memory, lines, measure, vit_memory
from configs import vit_cifar10
from train.tasks import open_config

pytestmark = pytest.mark.full


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


def _program(error=None):
    def compile():
        if error:
            raise jax.errors.JaxRuntimeError(error)

    return SimpleNamespace(compile=compile)


@pytest.mark.parametrize(("limit", "found"), [(None, 7), (22, 7), (21, None)])
def test_sizes_beyond_the_device_are_left_out(monkeypatch, limit, found):
    monkeypatch.setattr(measure, "memory_report", lambda _: MemoryReport(10, 8, 3, 7))  # in all 22
    monkeypatch.setattr(measure, "device_bytes", lambda: limit)
    assert measure.temp_bytes(_program()) == found
    assert measure.temp_bytes(_program("RESOURCE_EXHAUSTED: out of memory")) is None
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        measure.temp_bytes(_program("INTERNAL: another matter"))


@pytest.mark.parametrize(("name", "has_bits"), [("bdia_chunked", True), ("remat", False)])
def test_side_bits_of_a_vit(name, has_bits):
    run, changes = vit_memory.ROWS[name]
    values = vit_cifar10.get_config(run)
    values.update(changes)
    elements = 6 * 128 * 65 * 512
    found = vit_memory.side_bytes(open_config(values))
    assert found == (elements * 2 // 8 if has_bits else 0)


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
