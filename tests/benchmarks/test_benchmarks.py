"""Every benchmark at toy size: the files it writes, and the claims that hold at any size."""

import json
import re
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.experimental.compilation_cache import compilation_cache

from benchmarks import all as all_benchmarks
from benchmarks import (
    compile_time,
    drift,
    limits,
    rebuild_error,
    record,
    step_time,
    vit_memory,
)
from benchmarks.flops import model_flops, peak_flops
from benchmarks.stack import LABELS, TOY, VARIANTS, Shape, lower_step, make_stack

CASES = ("as_compiled", "off")

pytestmark = [pytest.mark.full, pytest.mark.usefixtures("quick_compile")]


@pytest.fixture(scope="module")
def ran(tmp_path_factory, quick_compile):
    """Output folder of `python -m benchmarks.all --toy`."""
    out = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compile_time, "main", partial(_without_cache, compile_time.main))
        all_benchmarks.main(["--toy", "--out", str(out)])
    return out


def _without_cache(main, argv):
    folder = jax.config.values["jax_compilation_cache_dir"]
    _set_cache(None)
    try:
        return main(argv)
    finally:
        _set_cache(folder)


def _set_cache(folder):
    jax.config.update("jax_compilation_cache_dir", folder)
    compilation_cache.reset_cache()


def _load(out, name):
    return json.loads((out / f"{record.stem(name)}.json").read_text())


@pytest.mark.parametrize("name", ["memory", "step_time", "limits", "compile_time", "drift"])
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
    assert {"plain", "remat", "bdia_guard0", "bdia_guard1"} <= set(variants)
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
    config, rows = document["config"], document["results"]
    assert config["rounds"] >= 7
    assert set(rows) == set(step_time.TOY_NAMES)
    for row in rows.values():
        low, high = row["quartiles"]
        assert 0 < low <= row["median"] <= high
        assert len(row["seconds"]) == config["rounds"]
        per_second = config["model_flops"] / row["median"]
        peak = config["peak"]["flops_per_second"]
        assert row["utilization"] == pytest.approx(per_second / peak)
        assert row["tokens_per_second"] * row["median"] == pytest.approx(4 * 64)
    assert rows["remat"]["ratio_to_remat"] == rows["plain"]["ratio_to_plain"] == 1.0
    assert rows["bdia_lean"]["temp_bytes"] < rows["bdia_guard1"]["temp_bytes"]
    assert (ran / f"{record.stem('step_time')}.png").stat().st_size > 10_000


def test_limits_fit_and_were_run(ran):
    document = _load(ran, "limits")
    for axis, unit in document["config"]["units"].items():
        for row in document["results"][axis].values():
            assert row["size"] >= unit and row["size"] % unit == 0
            assert 0 < row["planned_bytes"] <= document["config"]["budget_bytes"]
            assert row["tokens_per_second"] > 0
    assert (ran / f"{record.stem('limits')}.png").stat().st_size > 10_000


@pytest.mark.parametrize(("limit", "start"), [(1000, 8), (1000, 4096), (13, 8), (3, 8), (64, 64)])
def test_largest_fits_and_little_more_does_not(limit, start):
    tried = []
    found = limits.largest(lambda size: tried.append(size) or size <= limit, start, 4)
    assert found <= limit < found + max(4, found // 16)
    assert found in tried or found == 0
    assert all(size % 4 == 0 for size in tried) and len(tried) == len(set(tried)) <= 12


def test_compile_time_against_depth(ran):
    rows = _load(ran, "compile_time")["results"]
    assert set(rows) == {"bdia_guard1", "loop"}
    totals = compile_time.total(rows["bdia_guard1"])
    assert list(totals) == [2, 4]
    assert rows["bdia_guard1"]["ratio_of_medians"] == pytest.approx(totals[4] / totals[2])
    assert (ran / f"{record.stem('compile_time')}.png").stat().st_size > 10_000


def test_compile_time_refuses_a_cache():
    with pytest.raises(RuntimeError, match="JAX_COMPILATION_CACHE_DIR"):
        compile_time.measure(TOY, ["plain"], [2], [2], 1)


def test_every_variant_is_a_training_step():
    assert set(LABELS) == set(VARIANTS)
    shape = Shape(batch=4, tokens=8, width=16, num_heads=2, mlp_dim=16)
    for name, make in VARIANTS.items():
        _, loss, grad_x = lower_step(shape, 4, make).out_info
        assert loss.shape == (), name
        assert grad_x.shape == (4, 8, 16), name


def test_model_flops_are_those_of_the_compiled_forward():
    # one block: XLA counts the body of a loop once, however often it runs
    shape = Shape(batch=2, tokens=32, width=128, num_heads=2, mlp_dim=256)
    stack = nnx.eval_shape(lambda: make_stack(shape, 1, VARIANTS["plain"]))
    graphdef, state = nnx.split(stack)
    forward = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))
    x = jax.ShapeDtypeStruct((2, 32, 128), jnp.float32)
    counted = forward.lower(state, x).compile().cost_analysis()["flops"]
    assert counted == pytest.approx(model_flops(shape, 1) / 3, rel=0.08)
    assert model_flops(shape, 7) == 7 * model_flops(shape, 1)


def test_peak_is_the_fastest_product():
    peak = peak_flops("float32", (32, 64), repeats=1)
    assert peak["flops_per_second"] == max(peak["by_size"].values()) > 0
    assert peak["by_size"][str(peak["matmul_size"])] == peak["flops_per_second"]


def test_drift_rows(ran):
    results = _load(ran, "drift")["results"]
    assert [row["guard_bits"] for row in results["rows"]][:1] == [0]  # then what is suggested
    assert set(results["guard_bits_needed_by_numerics"]) == {"bfloat16-h"}
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
    shape = replace(drift.TOY, dropout_rate=0.0)
    rows = {
        name: rebuild_error.errors(name, shape, 4, off=True)
        for name in ("float_bdia", "bdia_guard0", "bdia_guard1")
    }
    assert not any(rows["bdia_guard1"])
    assert max(rows["bdia_guard0"]) >= 2.0**-9  # a flipped rounding, and what it grows to
    assert rows["float_bdia"][0] > rows["float_bdia"][-1] > 0
    results = {case: dict.fromkeys(rebuild_error.LABELS, rows["float_bdia"]) for case in CASES}
    rebuild_error.draw(results, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_vit_memory_of_a_step():
    model = {"width": 32, "depth": 6, "mlp_dim": 32, "dropout_rate": 0.0}
    # without augmentation and dropout, which are most of what is compiled
    sizes = {"batch_size": 16, "model": model, "input": {"rand_augment_ops": 0}}
    bdia, plain = (vit_memory.measure(run, sizes) for run in ("bdia", "plain"))
    assert bdia["state_bytes"] == plain["state_bytes"] > 0
    assert bdia["temp_bytes"] < plain["temp_bytes"]


@pytest.mark.parametrize(
    "benchmark", [*all_benchmarks.RUNS, rebuild_error, vit_memory], ids=lambda b: b.__name__
)
def test_toy_numbers_cannot_replace_the_committed_ones(benchmark, capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["--toy"])
    assert "--toy needs --out" in capsys.readouterr().err
