"""Reversible sends what per-block jax.checkpoint sends (over tensor more: test_benchmarks.py)."""

import jax
import pytest

from bdia_jax.sharding import make_mesh
from benchmarks.communication import TOY, VARIANTS, count

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(jax.device_count() < 4, reason="needs four devices"),
    pytest.mark.usefixtures("quick_compile"),
]
STATES = TOY.batch * TOY.tokens * TOY.width * 4  # bytes


@pytest.mark.claim("no collective carries a state")
def test_no_state_or_side_bit_is_sent_and_as_many_bytes_as_with_remat():
    mesh = make_mesh(fsdp=2, sequence=2)
    row, remat = (count(TOY, VARIANTS[name], mesh) for name in ("reversible", "remat"))
    assert row["integers"] == []
    assert row["bytes"] == remat["bytes"]
    # of parameters, of keys and values: of a quarter of the examples, forward and backward
    assert row["bytes_in_scans"]["all-gather"] >= TOY.depth * 2 * 2 * STATES / 4
    assert row["bytes"]["all-reduce"] > 4 * TOY.depth * 4 * TOY.width**2 / 2
