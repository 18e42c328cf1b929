"""The README's program runs, its commands exist, and its numbers are those of the result files."""

import csv
import dataclasses
import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from bdia_jax import interop
from bdia_jax.models.gpt2 import GPT2

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
MIB = 2**20


def result(name):
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def test_quick_start_runs():
    program, _, on_devices = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    names: dict = {}
    exec(program, names)
    exec(on_devices, names)
    report = names["report"]
    wrong = report.mismatches + 1  # the assertion in it can fail
    names["report"] = dataclasses.replace(report, mismatches=wrong)
    with pytest.raises(AssertionError):
        exec(program.splitlines()[-1], names)


def test_fine_tuning_program_runs(tmp_path, monkeypatch):
    _, program, _ = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    monkeypatch.chdir(tmp_path)
    small = GPT2(30, 8, width=16, depth=2, num_heads=2, mlp_dim=32, rngs=nnx.Rngs(0))
    interop.save(small, "gpt2-medium")
    tune = "model.stack.blocks.attention.query.lora_b[...] += 0.1"
    exec(program.replace("...  # train it", f"{tune}  # train it"), {})
    before, after = (
        model.stack.blocks.attention for model in (small, interop.load("mine", rngs=nnx.Rngs(0)))
    )
    for name, tuned in (("query", True), ("key", False), ("value", False)):
        kernels = (np.asarray(getattr(one, name).kernel) for one in (before, after))
        assert np.array_equal(*kernels) != tuned, name


def test_files_and_modules_it_names_exist():
    for path in re.findall(r"\]\(((?!http|#)[^)]+)\)", README):
        assert (ROOT / path).exists(), path
    for name in re.findall(r"-m benchmarks\.(\w+)", README):
        assert (ROOT / "benchmarks" / f"{name}.py").exists(), name
    for name in re.findall(r"-m train\.(\w+)", README):
        assert importlib.util.find_spec(f"train.{name}"), name
    for path in re.findall(r"--config=(configs/[a-z]\w*\.py)", README):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("plain autodiff", "plain"),
        ("per-block `jax.checkpoint`", "remat"),
        ("two-level `jax.checkpoint`", "remat_sqrt"),
        ("RevViT (floating point, another network)", "revnet"),
        ("BDIA, 0 guard bits", "bdia_guard0"),
        ("BDIA, 1 guard bit (default)", "bdia_guard1"),
        ("BDIA, `batch_chunks=4`", "bdia_chunked"),
        ("BDIA, `batch_chunks=4, by_branch=True`", "bdia_lean"),
    ],
)
def test_memory_and_time_row(label, name):
    sizes = result("memory")["results"]["variants"][name]
    step = result("step_time")["results"][name]
    temp = " | ".join(f"{sizes['temp_bytes'][depth] / MIB:.0f} MiB" for depth in ("6", "48", "768"))
    per_block = f"{round(sizes['bytes_per_block'] / MIB, 4):.3g}"
    row = f"| {label} | {temp} | {per_block} MiB | {step['median']:.2f} s |"
    assert row in README, row


def test_a_block_costs_a_sixteenth_of_a_state_and_a_thirty_second_without_guard():
    slopes = {k: v["bytes_per_block"] for k, v in result("memory")["results"]["variants"].items()}
    assert slopes["bdia_guard1"] == pytest.approx(slopes["remat"] / 16, rel=2e-3)
    assert slopes["bdia_guard0"] == pytest.approx(slopes["remat"] / 32, rel=2e-3)
    packed = result("memory")["results"]["variants"]["bdia_guard0"]["packed_bytes_per_block"]
    assert slopes["bdia_guard0"] - packed <= 64  # and a row of gamma


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("plain autodiff", "plain"),
        ("per-block `jax.checkpoint`", "remat"),
        ("the same, gradients of 4 smaller batches summed", "remat_accumulated"),
        ("BDIA", "bdia_guard1"),
        ("BDIA, `batch_chunks=4`", "bdia_chunked"),
        ("BDIA, `batch_chunks=4, by_branch=True`", "bdia_lean"),
        ("BDIA, `batch_chunks=8`", "bdia_chunked_8"),
        ("BDIA, `batch_chunks=4, by_branch=True`, all logits at once", "bdia_lean_full_logits"),
    ],
)
def test_gpt2_memory_row(label, name):
    row = result("gpt2_memory")["results"]["model"][name]
    cells = f"{row['temp_bytes'] / MIB:.0f} MiB | {row['ratio_to_remat']:.2f}"
    assert f"| {label} | {cells} |" in README, cells


@pytest.mark.parametrize(
    ("label", "experiment", "column"),
    [
        ("digits: accuracy, %", "vit_digits", "accuracy"),
        ("CIFAR-10: accuracy, %", "vit_cifar10_small", "accuracy"),
        ("CIFAR-10: loss", "vit_cifar10_small", "loss"),
    ],
)
def test_small_experiment_row(label, experiment, column):
    with (ROOT / "benchmarks" / "results" / f"{experiment}.csv").open() as file:
        table = {row["run"]: row[column] for row in csv.DictReader(file)}
    cells = [table.get(run, "") for run in ("plain", "bdia", "revnet")]
    row = f"| {label} | {' | '.join(cells)} |".replace("|  |", "| |")
    assert row in README, row


def test_text_about_the_small_vits():
    results = result("vit_cifar10_small")["results"]
    losses = {run: results[run]["curves"]["eval"]["loss"][1] for run in ("plain", "bdia")}
    said = {run: f"from {min(loss):.2f} to {loss[-1]:.2f}" for run, loss in losses.items()}
    text = " ".join(README.split())
    assert f"rises {said['plain']}, that of BDIA-ViT {said['bdia']}" in text
    costs = {}
    for run in said:
        means = {k: 100 * np.mean(v) for k, v in results[run]["final"].items() if "gamma" in k}
        costs[run] = means["accuracy_gamma_0.0"] - min(means.values())
    assert f"BDIA-ViT up to {costs['bdia']:.1f} points of accuracy" in text
    assert f"the plain ViT up to {costs['plain']:.1f}." in text


@pytest.mark.parametrize("experiment", ["vit_digits", "vit_cifar10_small"])
def test_config_says_what_we_got(experiment):
    config = ROOT / "configs" / f"{experiment.removesuffix('_small')}.py"
    with (ROOT / "benchmarks" / "results" / f"{experiment}.csv").open() as file:
        for row in csv.DictReader(file):
            assert row["accuracy"].replace("±", "+-") in config.read_text(), row


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("plain autodiff", "plain"),
        ("per-block `jax.checkpoint`", "remat"),
        ("BDIA", "bdia_guard1"),
        ("BDIA, `batch_chunks=4, by_branch=True`", "bdia_lean"),
    ],
)
def test_limits_row(label, name):
    document = result("limits")
    assert document["config"]["budget_bytes"] == 2**28
    batch, tokens = (document["results"][axis][name]["size"] for axis in ("batch", "tokens"))
    assert f"| {label} | {batch} | {tokens} |" in README


def test_text_about_1024_blocks():
    results = result("deep")["results"]
    text = " ".join(README.split())
    audits = results["audits"].values()
    wrong = {audit["mismatches"] + audit["x0_mismatches"] + audit["invalid"] for audit in audits}
    assert wrong == {0} and f"0 of {audit_elements(audits):,} rebuilt elements" in text
    first, last = (np.mean(results["scaled"]["loss"][part]) for part in (slice(5), slice(-5, None)))
    assert f"loss falls from {first:.2f} to {last:.2f}" in text
    rest = {name: row["rest_bytes"] / MIB for name, row in results["planned"].items()}
    assert f"{rest['bdia']:.1f} MiB" in text
    assert f"checkpointing needs {rest['remat']:.1f} and plain autodiff {rest['plain']:.1f}" in text
    stuck = np.mean(results["unscaled"]["loss"][-5:])
    assert f"stays at chance, a loss of {stuck:.2f}" in text and stuck > 2.2


def audit_elements(audits):
    (elements,) = {audit["elements"] for audit in audits}
    return elements


def test_text_about_compile_time():
    rows = result("compile_time")["results"]
    text = " ".join(README.split())
    assert f"512 blocks takes {rows['bdia_guard1']['ratio_of_medians']:.2f} times" in text
    assert f"64 take {rows['loop']['ratio_of_medians']:.2f} times" in text


def test_vit_memory_row():
    results, paper = (result("vit_memory")[part] for part in ("results", "config"))
    labels = {"plain": "ViT", "remat": "ViT, per-block `jax.checkpoint`", "revnet": "RevViT"}
    labels |= {"bdia": "BDIA-ViT", "bdia_by_branch": "BDIA-ViT, `by_branch=True`"}
    labels |= {"bdia_chunked": "BDIA-ViT, `batch_chunks=4`"}
    labels |= {"bdia_chunked_16": "BDIA-ViT, `batch_chunks=16`"}
    megabytes = paper["paper_mb"]
    for run, label in labels.items():
        row = results[run]
        cells = f"{row['total_bytes'] / MIB:.0f} MiB | {row['ratio_to_plain']:.2f}"
        said = " | | |"
        if run in megabytes:
            said = f" | {megabytes[run]} MB | {megabytes[run] / megabytes['plain']:.2f} |"
        assert f"| {label} | {cells}{said}" in README, cells


@pytest.mark.parametrize(
    ("label", "numerics"),
    [
        ("float32", "float32"),
        ("float32, highest precision", "float32-highest"),
        ("bfloat16", "bfloat16"),
        ("bfloat16, h rounded to bfloat16 too", "bfloat16-h"),
        ("bfloat16 without `rounding.py`", "bfloat16-unpinned"),
    ],
)
def test_drift_row(label, numerics):
    rows = [row for row in result("drift")["results"]["rows"] if row["numerics"] == numerics]
    cells = []
    for guard_bits in (0, 1):
        chosen = [row for row in rows if row["guard_bits"] == guard_bits]
        wrong = sum(row["mismatches"] for row in chosen)
        elements = sum(row["elements"] for row in chosen)
        cells.append(f"{wrong:,} of {elements:,}")
    drifts = [row["max_drift"] for row in rows]
    drift = "over 63" if None in drifts else f"{max(drifts):.2g}"
    row = f"| {label} | {drift} | {cells[0]} | {cells[1]} |"
    assert row in README, row


def test_mixed_precision_sentence():
    results = result("mixed_precision")["results"]
    losses = [
        "{mean:.4f} ± {std:.4f}".format(**results["compared"][name]["train_loss"])
        for name in ("float32", "model_bfloat16", "stack_bfloat16")
    ]
    text = README.replace("\n", " ")
    assert "{} in float32, {} with the model's dtype, {} with the stack's".format(*losses) in text
    for run in results["runs"].values():
        audit = run["audit"]
        assert f"{audit['mismatches']:,} of {audit['elements']:,} rebuilt elements" in text
        assert audit["suggested_guard_bits"] == 0


def test_fine_tuning_memory_rows():
    sizes = result("finetune_memory")["results"]
    labels = {
        "plain": "plain autodiff",
        "remat": "per-block `jax.checkpoint`",
        "bdia": "BDIA",
        "bdia_chunked": "BDIA, `batch_chunks=4`",
    }
    for name, label in labels.items():
        lora = "lora" if name == "plain" else f"lora_{name}"
        cells = [
            f"{sizes[each]['total_bytes'] / MIB:.0f} MiB | {sizes[each]['ratio_to_plain']:.2f}"
            for each in (name, lora)
        ]
        assert f"| {label} | {' | '.join(cells)} |" in README, label
    assert f"are {sizes['plain']['state_bytes'] / MIB:.0f} MiB of it" in README


def test_fine_tuning_rows():
    def row(label, folder, run):
        with (ROOT / "benchmarks" / "results" / folder / "gpt2_e2e_small.csv").open() as file:
            (values,) = [each for each in csv.DictReader(file) if each["run"] == run]
        return " | ".join(
            [label, *(values[m] for m in ("loss", "bleu", "nist", "rouge_l", "cider"))]
        )

    for label, folder, run in (
        ("plain, all parameters", "", "plain"),
        ("BDIA, all parameters", "", "bdia"),
        ("LoRA, plain", "e2e_lora", "lora"),
        ("LoRA, BDIA", "e2e_lora", "lora_bdia"),
        ("plain, 200 sentences", "e2e_200", "plain"),
        ("BDIA, 200 sentences", "e2e_200", "bdia"),
    ):
        assert f"| {row(label, folder, run)} |" in README, label
    assert row("", "", "lora").split(" | ")[1] in README
    few = json.loads((ROOT / "benchmarks/results/e2e_200/gpt2_e2e_small.json").read_text())[
        "results"
    ]
    _, plain, _ = few["plain"]["curves"]["eval"]["loss"]
    _, bdia, _ = few["bdia"]["curves"]["eval"]["loss"]
    text = README.replace("\n", " ")
    assert f"falls to {min(plain):.2f} and ends at {plain[-1]:.2f}, that of BDIA at" in text
    assert f"of BDIA at {bdia[-1]:.2f}, where it stays" in text and bdia[-1] - min(bdia) < 0.001
    agreement = result("gpt2_e2e_small_agreement")
    for states in ("fixed_point", "float"):
        assert f"{agreement[states]['loss']:.6f}" in README
    assert agreement["one_block_quanta"]["stack"]["largest"] <= 0.5


def test_communication_rows():
    for row in result("communication")["results"]["bytes"]:
        mesh = ", ".join(f"{axis} {size}" for axis, size in row["mesh"].items())
        bdia, remat = (row[name]["bytes"]["total"] / MIB for name in ("reversible", "remat"))
        cells = f"{mesh} | {bdia:.2f} MiB | {remat:.2f} MiB | {row['ratio_to_remat']:.2f}"
        assert f"| {cells} |" in README, cells
        assert row["reversible"]["integers"] == []


def test_text_about_faults_and_the_soak():
    text = " ".join(README.split())
    kills = result("kills")["results"]
    assert (
        f"after {kills['kills']} `kill -9` at random moments, {kills['moments']['save']} of them "
        f"during a save, {kills['differing_elements']} of {kills['compared_elements']:,} final"
    ) in text
    fuzz = result("fuzz")["results"]
    totals = fuzz["totals"]
    assert f"{sum(totals.values()):,} made-up configs and command lines" in text
    assert f"{totals['accepted']} were accepted" in text
    assert fuzz["failures"] == fuzz["tracebacks_in_processes"] == []
    soak = result("soak")["results"]
    assert f"{soak['total']['elements']:,} rebuilt activations were compared" in text
    assert f"{len(soak['settings'])} settings" in text and soak["total"]["mismatches"] == 0
    drift = {
        dtype: max(
            row["max_drift"]
            for name, row in soak["settings"].items()
            if f"width=64 {dtype}" in name and "frac_bits" not in name
        )
        for dtype in ("float32", "bfloat16")
    }
    assert f"up to {drift['float32']:.2f} quanta in float32" in text
    assert f"by {drift['bfloat16']:.0f} quanta in bfloat16" in text


def test_planned_rows():
    results = result("plan")["results"]
    for plan in results["planned"]:
        mesh = ", ".join(f"{axis} {size}" for axis, size in plan["mesh"].items())
        remat, bdia = plan["remat"], plan["reversible"]
        pairs = (
            f"{remat[name] / 1e9:.1f} / {bdia[name] / 1e9:.1f}"
            for name in ("kept", "block", "total")
        )
        fit = f"{remat['sequences_that_fit']} / {bdia['sequences_that_fit']}"
        where = f"{plan['devices']} x {plan['gigabytes']} GB, {mesh}"
        cells = " | ".join((plan["model"], where, f"{remat['state'] / 1e9:.1f}", *pairs, fit))
        assert f"| {cells} |" in README, cells
    ratios = [case["ratio"] for case in results["compared"].values()]
    assert min(ratios) > 0.9 and max(ratios) < 1.1
    assert f"its totals are {min(ratios):.2f} to {max(ratios):.2f} of what" in README
