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
    more = {kind: sent - remat["bytes"][kind] for kind, sent in row["bytes"].items()}
    # a number beside the gradients of each block: whether the rebuilt states were right
    assert 0 < more.pop("all-reduce") == more.pop("total") <= 8 * TOY.depth
    assert row["bytes"].keys() == remat["bytes"].keys() and not any(more.values())
    # of parameters, of keys and values: of a quarter of the examples, forward and backward
    assert row["bytes_in_scans"]["all-gather"] >= TOY.depth * 2 * 2 * STATES / 4
    assert row["bytes"]["all-reduce"] > 4 * TOY.depth * 4 * TOY.width**2 / 2
