"""Every benchmark at toy size: the files it writes, and the claims that hold at any size."""

import json
import re
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from benchmarks import all as all_benchmarks
from benchmarks import drift, memory, rebuild_error, record, step_time, vit_memory

CASES = ("as_compiled", "off")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Output folder of `python -m benchmarks.all --toy`."""
    out = tmp_path_factory.mktemp("results")
    all_benchmarks.main(["--toy", "--out", str(out)])
    return out


def _load(out, name):
    return json.loads((out / f"{record.stem(name)}.json").read_text())


@pytest.mark.parametrize("name", ["memory", "step_time", "drift"])
def test_record_says_where_it_came_from(ran, name):
    text = (ran / f"{record.stem(name)}.json").read_text()
    document = json.loads(text)
    assert document["command"] == f"python -m benchmarks.{name} --toy"
    assert document["device"]["platform"] == jax.default_backend()
    assert document["device"]["cpu_cores"] >= 1
    assert document["device"]["cpu_model"] and document["device"]["kind"]
    assert set(document["versions"]) == {"python", "jax", "jaxlib", "flax", "bdia_jax"}
    assert document["versions"]["jax"] == jax.__version__
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", document["date"])
    assert document["config"]["shape"]["width"] > 0
    assert str(ran) not in text
    assert not re.search(r'["\s=]/\w', text), "an absolute path"


def test_reversible_memory_grows_by_the_packed_bits_only(ran):
    variants = _load(ran, "memory")["results"]["variants"]
    assert set(variants) == set(memory.VARIANTS)
    for name in ("bdia_guard0", "bdia_guard1"):
        row = variants[name]
        assert row["bytes_per_block"] == pytest.approx(row["packed_bytes_per_block"], rel=0.02)
    # negative controls: a state kept per block costs 32 bits an activation, a tape more
    one_bit = variants["bdia_guard0"]["packed_bytes_per_block"]
    assert variants["remat"]["bytes_per_block"] >= 32 * one_bit
    assert variants["plain"]["bytes_per_block"] > 10 * variants["remat"]["bytes_per_block"]
    assert (ran / f"{record.stem('memory')}.png").stat().st_size > 10_000


def test_step_time_has_every_round(ran):
    document = _load(ran, "step_time")
    assert document["config"]["rounds"] >= 7
    assert set(document["results"]) == set(step_time.VARIANTS)
    for row in document["results"].values():
        low, high = row["quartiles"]
        assert 0 < low <= row["median"] <= high
        assert len(row["seconds"]) == document["config"]["rounds"]
    assert document["results"]["remat"]["ratio_to_remat"] == 1.0


def test_drift_rows(ran):
    results = _load(ran, "drift")["results"]
    assert [row["guard_bits"] for row in results["rows"]][:2] == [0, 1]
    assert set(results["guard_bits_needed_by_numerics"]) == {"float32", "bfloat16-h"}
    assert all(row["elements"] > 0 and row["h_max"] > 0 for row in results["rows"])
    for row in results["rows"]:
        assert row["exact"] == (row["mismatches"] + row["x0_mismatches"] + row["invalid"] == 0)


def test_enough_needs_exactness_and_margin():
    def row(guard_bits, max_drift, exact=True):
        return {"guard_bits": guard_bits, "max_drift": max_drift, "exact": exact}

    assert drift.enough([row(0, 0.0), row(1, 0.0)]) == 0
    assert drift.enough([row(0, 0.1), row(1, 0.1)]) == 1
    # 1 guard bit bears 0.5 quanta: 0.3 is exact, without the margin; 2 bear 1.5
    assert drift.enough([row(1, 0.3), row(2, 0.3)]) == 2
    assert drift.enough([row(1, 0.1, exact=False)]) is None
    assert drift.largest([0, 2, 1]) == 2
    assert drift.largest([0, None, 1]) is None


def test_only_h_too_rounds_h():
    x = jnp.zeros((2, 9, 32))

    def h_of(h_dtype, x):
        return drift.Block(drift.TOY, h_dtype, False, nnx.Rngs(0))(x)

    for name, (_, _, h_dtype) in drift.NUMERICS.items():
        h = jax.eval_shape(partial(h_of, h_dtype), x)
        assert (h.dtype == jnp.bfloat16) == (name == "bfloat16-h")


def test_scale_makes_h_larger():
    x = jax.random.normal(jax.random.key(0), (2, 9, 32))
    stacks = [drift.make_stack(drift.TOY, 1, s, jnp.float32, with_size=True) for s in (1.0, 4.0)]
    small, large = (drift.largest_h(stack, x) for stack in stacks)
    assert large > 2 * small


def test_rebuild_errors_where_the_second_evaluation_is_off(tmp_path):
    rows = {
        name: rebuild_error.errors(name, drift.TOY, 4, off=True)
        for name in ("float_bdia", "bdia_guard0", "bdia_guard1")
    }
    assert not any(rows["bdia_guard1"])
    assert max(rows["bdia_guard0"]) >= 2.0**-9  # a flipped rounding, and what it grows to
    assert rows["float_bdia"][0] > rows["float_bdia"][-1] > 0
    results = {case: dict.fromkeys(rebuild_error.LABELS, rows["float_bdia"]) for case in CASES}
    rebuild_error.draw(results, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_vit_memory_of_a_step(quick_compile):
    sizes = {"batch_size": 16, "model": {"width": 32, "depth": 6, "mlp_dim": 32}}
    bdia, plain = (vit_memory.measure(run, sizes) for run in ("bdia", "plain"))
    assert bdia["state_bytes"] == plain["state_bytes"] > 0
    assert bdia["temp_bytes"] < plain["temp_bytes"]


@pytest.mark.parametrize("benchmark", [memory, step_time, drift, rebuild_error, vit_memory])
def test_toy_numbers_cannot_replace_the_committed_ones(benchmark, capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["--toy"])
    assert "--toy needs --out" in capsys.readouterr().err
