"""Programs as compiled for an H100 stay within what they took: a budget for each, no GPU needed."""

import functools

import jax
import pytest

from bdia_jax import FixedPoint, scan
from bdia_jax.compiled import targets
from bdia_jax.compiled.hlo import read
from bdia_jax.compiled.traffic import work
from bdia_jax.nnx import BDIAStack
from benchmarks import gpu_plan
from benchmarks.gpt2_memory import MEDIUM_GPU
from benchmarks.stack import VARIANTS, lower_gradient, xla_options

pytestmark = pytest.mark.full


@pytest.fixture(autouse=True)
def _compiler():
    try:
        targets.devices("h100")
    except ValueError as error:
        pytest.skip(str(error))


@functools.cache
def row(name: str) -> dict:
    """GPT-2 medium's gradient, trained so."""
    with jax.default_device(targets.devices("h100")[0]):
        lowered = lower_gradient(MEDIUM_GPU, 24, VARIANTS[name])
        return gpu_plan.planned(lowered, "h100", **xla_options(name))


@pytest.mark.claim("a GPU's program is lean")
@pytest.mark.parametrize(
    ("name", "temp_bytes", "moved_bytes", "flops"),
    [("bdia_guard1", 0.40, 0.96, 1.08), ("bdia_chunked", 0.28, 1.31, 1.08)],
)
def test_memory_and_traffic_against_checkpointing(name, temp_bytes, moved_bytes, flops):
    budgets = {"temp_bytes": temp_bytes, "moved_bytes": moved_bytes, "flops": flops}
    for key, budget in budgets.items():
        assert row(name)[key] <= budget * row("remat")[key], key


@pytest.mark.control("a GPU's program is lean")
def test_control_autodiff_is_not():
    assert row("plain")["temp_bytes"] > 5 * row("remat")["temp_bytes"]


def test_an_added_block_costs_its_packed_bits():
    with jax.default_device(targets.devices("h100")[0]):
        temp_bytes = [
            gpu_plan.planned(lower_gradient(MEDIUM_GPU, depth, BDIAStack), "h100")["temp_bytes"]
            for depth in (24, 48)
        ]
    bits = 2 * MEDIUM_GPU.batch * MEDIUM_GPU.tokens * MEDIUM_GPU.width
    assert temp_bytes[1] - temp_bytes[0] == pytest.approx(24 * bits / 8, rel=0.05)


def copied_states(make) -> int:
    """A block, in both loops together."""
    with jax.default_device(targets.devices("h100")[0]):
        compiled = targets.compile(lower_gradient(MEDIUM_GPU, 24, make))
    program = read(compiled.as_text() or "")
    size = 4 * MEDIUM_GPU.batch * MEDIUM_GPU.tokens * MEDIUM_GPU.width
    copies = [one for one in work(program) if one.opcode == "copy" and one.written == size]
    return round(sum(one.times for one in copies if one.loop) / 24)


@pytest.mark.claim("states are not copied from block to block")
@pytest.mark.parametrize("name", ["bdia_guard1", "bdia_chunked"])
def test_no_state_is_copied(name):
    assert copied_states(VARIANTS[name]) == 0


@pytest.mark.control("states are not copied from block to block")
def test_control_a_loop_of_one_block_copies_them(monkeypatch):
    def of_one(body, init, xs, *, reverse=False):
        return jax.lax.scan(body, init, xs, reverse=reverse)

    monkeypatch.setattr(scan, "scan_blocks", of_one)
    # another function, which nothing has traced: a trace is kept for each
    assert copied_states(functools.partial(BDIAStack, fixed_point=FixedPoint())) >= 3


def test_the_papers_vit_in_bfloat16_is_compiled_with_its_odd_number_of_tokens():
    with jax.default_device(targets.devices("h100")[0]):
        lowered = gpu_plan.lower_vit("bdia", {"model": {"dtype": "bfloat16"}})
        found = gpu_plan.planned(lowered, "h100", **xla_options("bdia"))
    assert found["total_bytes"] < 0.29 * 1423 * 2**20  # of the plain one
