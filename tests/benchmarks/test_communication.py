"""Reversible sends what per-block jax.checkpoint sends; more only where tensor is split."""

import json

import jax
import pytest

from bdia_jax.sharding import make_mesh
from benchmarks import communication, record
from benchmarks.communication import TOY, VARIANTS, count

pytestmark = [
    pytest.mark.skipif(jax.device_count() < 4, reason="needs four devices"),
    pytest.mark.usefixtures("quick_compile"),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory, quick_compile):
    out = tmp_path_factory.mktemp("communication")
    communication.main(["--toy", "--bytes_only", "--out", str(out)])
    return json.loads((out / f"{record.stem('communication')}.json").read_text())["results"]


def test_as_many_bytes_as_remat_and_no_state_or_side_bit(results):
    (row,) = results["bytes"]
    assert row["mesh"] == {"fsdp": 2, "sequence": 2} and row["ratio_to_remat"] == 1
    assert row["reversible"]["bytes"] == row["remat"]["bytes"]
    assert row["reversible"]["integers"] == []
    # of parameters, of keys and values: of a quarter of the examples, forward and backward
    states = TOY.batch // 2 * TOY.tokens * TOY.width * 4
    gathered = row["reversible"]["bytes_in_scans"]["all-gather"]
    assert gathered >= TOY.depth * 2 * 2 * states / 2
    assert row["reversible"]["bytes"]["all-reduce"] > 4 * TOY.depth * 4 * TOY.width**2 / 2


def test_over_tensor_one_all_reduce_of_h_more_per_block():
    mesh = make_mesh(tensor=4)
    reversible, remat = (count(TOY, VARIANTS[name], mesh) for name in ("reversible", "remat"))
    more = reversible["bytes"]["total"] - remat["bytes"]["total"]
    assert more == TOY.depth * 2 * (TOY.batch * TOY.tokens * TOY.width * 4) * 3 / 4
    assert reversible["integers"] == []
