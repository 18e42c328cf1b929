"""The programs at toy size, and what holds of their results at any size."""

import importlib
import json
import re
from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.compilation_cache import compilation_cache

from benchmarks import all as all_benchmarks
from benchmarks import compile_time, digits, drift, gpu_run, limits, memory, record
from benchmarks.flops import model_flops, peak_flops
from benchmarks.stack import LABELS, TOY, VARIANTS, Shape, lower_step, make_stack

pytestmark = pytest.mark.usefixtures("quick_compile")
IN_ALL = [module.__name__.split(".")[-1] for module in all_benchmarks.RUNS]
ALONE = ["rebuild_error", "gpt2_memory", "deep"]
ALONE += ["communication", "soak", "verification", "plan", "context"]
DRAWN = {"memory", "step_time", "limits", "compile_time", "rebuild_error", "deep"}


@pytest.fixture(scope="module")
def toy(tmp_path_factory, quick_compile):
    """name -> what `python -m benchmarks.NAME --toy` records, run once."""
    out = tmp_path_factory.mktemp("results")

    @cache
    def run_all():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(compile_time, "main", partial(_without_cache, compile_time.main))
            all_benchmarks.main(["--toy", "--out", str(out)])

    @cache
    def run(name):
        if name in IN_ALL:
            run_all()
        else:
            bytes_only = ["--bytes_only"] if name == "communication" else []
            importlib.import_module(f"benchmarks.{name}").main(
                ["--toy", *bytes_only, "--out", str(out)]
            )
        text = (out / f"{record.stem(name)}.json").read_text()
        assert str(out) not in text
        if name in DRAWN:
            assert (out / f"{record.stem(name)}.png").stat().st_size > 10_000
        return json.loads(text)

    return run


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


@pytest.mark.full
@pytest.mark.parametrize("name", [*IN_ALL, *ALONE])
def test_a_program_records_where_its_result_came_from(toy, name):
    document = toy(name)
    assert document["command"].startswith(f"python -m benchmarks.{name} --toy")
    assert document["device"]["platform"] == jax.default_backend()
    assert document["device"]["cpu_cores"] >= 1
    assert document["device"]["cpu_model"] and document["device"]["kind"]
    assert set(document["versions"]) == {"python", "jax", "jaxlib", "flax", "bdia_jax"}
    assert document["versions"]["jax"] == jax.__version__
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", document["date"])
    assert document["config"] and document["results"]
    assert not re.search(r'["\s=]/\w', json.dumps(document)), "an absolute path"


@pytest.mark.parametrize("name", [*IN_ALL, *ALONE])
def test_toy_numbers_cannot_replace_the_committed_ones(name, capsys):
    with pytest.raises(SystemExit):
        importlib.import_module(f"benchmarks.{name}").main(["--toy"])
    assert "--toy needs --out" in capsys.readouterr().err


# --- memory ------------------------------------------------------------------------------


@pytest.mark.full
@pytest.mark.claim("an added block costs its packed bits")
@pytest.mark.control("an added block costs its packed bits")
def test_reversible_memory_grows_by_the_packed_bits_only(toy):
    rows = toy("memory")["results"]["variants"]
    bdia = rows["bdia_guard1"]
    assert bdia["bytes_per_block"] == pytest.approx(bdia["packed_bytes_per_block"], rel=0.02)
    # the controls: a state kept per block costs 32 bits an activation, a tape more
    assert rows["remat"]["bytes_per_block"] >= 16 * bdia["packed_bytes_per_block"]
    assert rows["plain"]["bytes_per_block"] > 10 * rows["remat"]["bytes_per_block"]
    sizes = toy("memory")["results"]["by_length"]["bdia_guard1"]["temp_bytes"]
    assert sizes["64"] > 1.4 * sizes["32"]


def test_only_reversible_blocks_keep_side_bits():
    assert memory.side_bytes("remat", TOY) == memory.side_bytes("bdia_remat", TOY) == {}
    bits = TOY.batch * TOY.tokens * TOY.width
    for name, each in {"bdia_guard0": 1, "bdia_guard1": 2, "bdia_lean": 2}.items():
        assert memory.side_bytes(name, TOY)["packed_bytes_per_block"] == each * bits / 8, name


@pytest.mark.full
def test_what_is_planned_for_a_gpu_runs_where_we_are(tmp_path, quick_processes):
    (row,) = gpu_run.main(["--toy", "--out", str(tmp_path)]).values()
    assert row["audit"]["exact"] and row["planned_bytes"] > row["temp_bytes"] > 0
    assert len(row["all_seconds"]) == 2 and row["seconds"] > 0
    assert (row["measured_bytes"] is None) == (jax.default_backend() == "cpu")


@pytest.mark.full
def test_gpt2_memory(toy):
    results = toy("gpt2_memory")["results"]
    assert results["stack"]["bdia_lean"]["ratio_to_remat"] < 0.5
    model = {name: row["temp_bytes"] for name, row in results["model"].items()}
    # half of the vocabulary at a time
    assert model["bdia_lean"] < 0.6 * model["bdia_lean_full_logits"]
    assert {*model} == {"remat", "bdia_lean", "remat_accumulated", "bdia_lean_full_logits"}


@pytest.mark.full
def test_vit_memory(toy):
    rows = toy("vit_memory")["results"]
    bdia, plain = rows["bdia"], rows["plain"]
    assert bdia["state_bytes"] == plain["state_bytes"] > 0
    assert bdia["temp_bytes"] < plain["temp_bytes"]
    assert bdia["side_bytes"] == 6 * 16 * 65 * 32 * 2 // 8 and plain["side_bytes"] == 0


@pytest.mark.full
def test_fine_tuning_memory(toy):
    rows = toy("finetune_memory")["results"]
    plain, lora = rows["plain"], rows["lora_bdia_chunked"]
    assert lora["trained_parameters"] == 4 * 2 * (16 * 4 + 4 * 16)  # blocks, q and v, A and B
    # neither moments nor gradients of what is frozen, and one part of a block at a time
    assert lora["state_bytes"] < plain["state_bytes"] / 2
    assert lora["temp_bytes"] < plain["temp_bytes"] / 4
    assert plain["total_bytes"] == plain["state_bytes"] + plain["temp_bytes"]


@pytest.mark.full
def test_in_backward_has_bytes_and_seconds_of_both_ways(toy):
    results = toy("in_backward")["results"]
    rows, times = results["here"], results["step_time"]
    assert 0 < rows["in_backward"]["temp_bytes"] < rows["ordinary"]["temp_bytes"]
    pairs = zip(times["seconds"]["in_backward"], times["seconds"]["ordinary"], strict=True)
    ratios = sorted(own / base for own, base in pairs)
    assert ratios[0] <= times["ratio"] <= ratios[-1]


# --- time --------------------------------------------------------------------------------


@pytest.mark.full
def test_step_time_has_every_round(toy):
    document = toy("step_time")
    config, rows = document["config"], document["results"]
    assert config["rounds"] >= 7 and set(rows) == {"remat", "bdia_guard1"}
    for row in rows.values():
        low, high = row["quartiles"]
        assert 0 < low <= row["median"] <= high
        assert len(row["seconds"]) == len(row["ratios_to_remat"]) == config["rounds"]
        per_second = config["model_flops"] / row["median"]
        peak = config["peak"]["flops_per_second"]
        assert row["utilization"] == pytest.approx(per_second / peak)
        assert row["tokens_per_second"] * row["median"] == pytest.approx(4 * 64)
    assert rows["remat"]["ratio_to_remat"] == 1.0


@pytest.mark.full
def test_limits_fit_and_were_run(toy):
    document = toy("limits")
    for axis, unit in document["config"]["units"].items():
        for row in document["results"][axis].values():
            assert row["size"] >= unit and row["size"] % unit == 0
            assert 0 < row["planned_bytes"] <= document["config"]["budget_bytes"]
            assert row["tokens_per_second"] > 0


@pytest.mark.parametrize(("limit", "start"), [(1000, 8), (1000, 4096), (13, 8), (3, 8), (64, 64)])
def test_largest_fits_and_little_more_does_not(limit, start):
    tried = []
    found = limits.largest(lambda size: tried.append(size) or size <= limit, start, 4)
    assert found <= limit < found + max(4, found // 16)
    assert found in tried or found == 0
    assert all(size % 4 == 0 for size in tried) and len(tried) == len(set(tried)) <= 12


@pytest.mark.full
def test_compile_time_against_depth(toy):
    rows = toy("compile_time")["results"]
    assert set(rows) == {"bdia_guard1", "loop"}
    totals = compile_time.total(rows["bdia_guard1"])
    assert list(totals) == [2, 4]
    assert rows["bdia_guard1"]["ratio_of_medians"] == pytest.approx(totals[4] / totals[2])


def test_compile_time_refuses_a_cache():
    with pytest.raises(RuntimeError, match="JAX_COMPILATION_CACHE_DIR"):
        compile_time.measure(TOY, ["plain"], [2], [2], 1)


@pytest.mark.full
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


# --- exactness ---------------------------------------------------------------------------


@pytest.mark.full
def test_drift_rows(toy):
    results = toy("drift")["results"]
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


@pytest.mark.full
def test_scale_makes_h_larger_and_only_one_case_rounds_it():
    x = jax.random.normal(jax.random.key(0), (2, 9, 32))
    stacks = [drift.make_stack(drift.TOY, 1, s, jnp.float32, with_size=True) for s in (1.0, 4.0)]
    small, large = (drift.largest_h(stack, x) for stack in stacks)
    assert large > 2 * small
    for name, (_, _, h_dtype) in drift.NUMERICS.items():
        block = partial(drift.Block, drift.TOY, h_dtype, False)
        h = jax.eval_shape(lambda x, block=block: block(nnx.Rngs(0))(x), x)
        assert (h.dtype == jnp.bfloat16) == (name == "bfloat16-h")


@pytest.mark.full
@pytest.mark.claim("the guard absorbs a drift below its bound")
@pytest.mark.control("the guard absorbs a drift below its bound")
@pytest.mark.control("a deep stack is rebuilt exactly")
def test_rebuild_errors_where_the_second_evaluation_is_off(toy):
    rows = toy("rebuild_error")["results"]["off"]
    assert len(rows["bdia_guard1"]) == 63 and not any(rows["bdia_guard1"])
    assert max(rows["bdia_guard0"]) >= 2.0**-9  # a flipped rounding, and what it grows to
    assert rows["float_bdia"][0] > rows["float_bdia"][-1] > 0


@pytest.mark.full
@pytest.mark.claim("a deep stack is rebuilt exactly")
@pytest.mark.parametrize("when", ["start", "end"])
def test_a_deep_stack_is_rebuilt_exactly(toy, when):
    audit = toy("deep")["results"]["audits"][when]
    assert audit["exact"] and audit["states"] == 63
    assert audit["elements"] == 63 * 16 * 5 * 32
    assert 0 < audit["largest_output"] < 100


@pytest.mark.full
def test_a_deep_stack_costs_its_packed_bits_and_learns(toy):
    document = toy("deep")
    assert document["config"]["depths"] == [32, 64]
    row = document["results"]["stack"]["bdia_guard1"]
    assert row["packed_bytes_per_block"] == 16 * 5 * 32 * 2 // 8
    kept = sum(row[f"{name}_bytes_per_block"] for name in ("packed", "gamma", "checksum"))
    assert row["bytes_per_block"] == kept
    losses = document["results"]["scaled"]["loss"]
    assert len(losses) == 25 and np.isfinite(losses).all()
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.2


def test_batch_on_a_gpu_is_the_first_that_checkpointing_cannot_hold():
    limit = 100 * 2**30

    def states(batch):
        return 4 * digits.GPU.depth * batch * 65 * 512

    batch = digits.beyond(limit, digits.GPU).batch
    assert states(batch) > limit >= states(batch - digits.GPU.parts)
    assert batch % digits.GPU.parts == 0
    assert replace(digits.GPU, batch=batch) == digits.beyond(limit, digits.GPU)


@pytest.mark.full
def test_one_guard_bit_bears_what_the_soaks_control_finds(toy):
    parity, guarded = toy("soak")["results"]["controls"]
    assert parity["mismatches"] > 100 and parity["as_expected"]
    assert guarded["mismatches"] == 0 and guarded["corrections"] > 0


@pytest.mark.full
def test_over_tensor_one_all_reduce_of_h_more_per_block(toy):
    document = toy("communication")
    size, (row,) = document["config"]["size"], document["results"]["bytes"]
    state = size["batch"] * size["tokens"] * size["width"] * 4
    assert row["mesh"] == {"tensor": 4} and row["reversible"]["integers"] == []
    more = row["reversible"]["bytes"]["total"] - row["remat"]["bytes"]["total"]
    assert more == size["depth"] * 2 * state * 3 / 4
