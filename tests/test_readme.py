"""README and docs: numbers are the result files', programs run, and what is named exists."""

import ast
import csv
import dataclasses
import importlib.util
import json
import pkgutil
import re
import shutil
import types
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict
from PIL import Image

from bdia_jax import interop
from bdia_jax.models.gpt2 import GPT2
from bdia_jax.models.vit import ViT
from benchmarks import tables
from train.datasets import registry
from train.inference.open_run import open_run
from train.loop.train import train
from train.run.experiment import load_experiment
from train.tasks import TASKS, open_config

ROOT = Path(__file__).parent.parent
PAGES = {path.name: path.read_text("utf-8") for path in tables.pages()}
TEXT = "\n".join([*PAGES.values(), (ROOT / "CONTRIBUTING.md").read_text("utf-8")])
TEXT = TEXT.replace("\\\n", "")  # a command on two lines


def programs(page):
    return re.findall(r"^```python\n(.*?)^```", PAGES[page], flags=re.S | re.M)


# the others have a test of their own
PROGRAMS = [p for p in PAGES if programs(p) and p not in ("README.md", "your_data.md")]


@pytest.mark.claim("numbers are the result files'")
def test_every_table_and_number_is_that_of_the_result_files():
    assert [*tables.differences()] == []


@pytest.mark.control("numbers are the result files'")
def test_any_changed_digit_is_found_and_named(tmp_path):
    def copy():
        shutil.rmtree(tmp_path, ignore_errors=True)
        shutil.copytree(ROOT / "benchmarks/results", tmp_path / "benchmarks/results")
        shutil.copytree(ROOT / "docs", tmp_path / "docs")
        shutil.copy(ROOT / "README.md", tmp_path)

    copy()
    assert [*tables.differences(tmp_path)] == []
    found = 0
    for path in tables.pages(tmp_path):
        text = path.read_text("utf-8")
        for pattern in (tables.TABLE, tables.NUMBER):
            for match in pattern.finditer(text):
                at = match.start(3) + re.search(r"\d(?=\D*$)", match[3]).start()
                wrong = str((int(text[at]) + 1) % 10)
                path.write_text(text[:at] + wrong + text[at + 1 :], "utf-8")
                (said,) = tables.differences(tmp_path)
                assert said.startswith(f"{path.relative_to(tmp_path)}, ") and match[2] in said
                found += 1
        path.write_text(text, "utf-8")
    assert found > 50
    file = tmp_path / "benchmarks/results/memory.json"  # and the other way round
    measured = json.loads(file.read_text())
    sizes = measured["results"]["variants"]["plain"]["temp_bytes"]
    was, sizes["6"] = f"{sizes['6'] / 2**20:.0f} MiB", 123 * 2**20
    file.write_text(json.dumps(measured))
    said = f"README.md, table memory: has '| plain autodiff | {was}"
    with pytest.raises(SystemExit, match=re.escape(said)):
        tables.main(["--check"], tmp_path)
    tables.main([], tmp_path)
    assert [*tables.differences(tmp_path)] == []
    assert "| plain autodiff | 123 MiB" in (tmp_path / "README.md").read_text("utf-8")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("<!-- table: memory -->", "lacks its other half"),
        ("<!-- table: nonsense -->\n<!-- end -->", "no table nonsense"),
        ("it is <!--n memory:results/nonsense-->1<!--/n-->", "KeyError 'nonsense'"),
        ("it is <!--n nonsense:results-->1<!--/n-->", "FileNotFoundError"),
        (
            "<!--n memory:results/variants; nonsense-->1<!--/n-->",
            "memory:results/variants; nonsense",
        ),
    ],
)
def test_a_marker_that_leads_nowhere_is_told(text, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        tables.Results().right(text)


def test_configs_say_what_we_got():
    for experiment in ("vit_digits", "vit_cifar10_small"):
        config = ROOT / "configs" / f"{experiment.removesuffix('_small')}.py"
        with (ROOT / "benchmarks" / "results" / f"{experiment}.csv").open() as file:
            for row in csv.DictReader(file):
                assert row["accuracy"].replace("±", "+-") in config.read_text(), row


@pytest.mark.full
def test_quick_start_runs_and_its_assertion_can_fail():
    (program,) = programs("README.md")
    names: dict = {}
    exec(program, names)
    report = names["report"]
    names["report"] = dataclasses.replace(report, mismatches=report.mismatches + 1)
    with pytest.raises(AssertionError):
        exec(program.splitlines()[-1], names)


@pytest.mark.full
@pytest.mark.parametrize("page", PROGRAMS)
def test_the_programs_of_a_page_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = GPT2(30, 8, width=16, depth=2, num_heads=2, mlp_dim=32, rngs=nnx.Rngs(0))
    if page == "finetune.md":
        interop.save(small, "gpt2-medium")
    names: dict = {"__name__": page.removesuffix(".md")}
    for program in programs(page):
        tune = "model.stack.blocks.attention.query.lora_b[...] += 0.1"
        exec(program.replace("...  # train it", f"{tune}  # train it"), names)
    if page == "finetune.md":
        before, after = (
            model.stack.blocks.attention
            for model in (small, interop.load("mine", rngs=nnx.Rngs(0)))
        )
        for name, tuned in (("query", True), ("key", False), ("value", False)):
            kernels = (np.asarray(getattr(one, name).kernel) for one in (before, after))
            assert np.array_equal(*kernels) != tuned, name


def page_module(number, name):
    """A program of your_data.md as what it says it is: a module."""
    module: Any = types.ModuleType(name)
    exec(programs("your_data.md")[number], module.__dict__)
    return module


@pytest.mark.full
def test_the_image_data_set_of_the_page_prepares_itself(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    leaves = page_module(0, "leaves")
    for kind in leaves.CLASSES:
        (tmp_path / "leaves" / kind).mkdir(parents=True)
        for index in range(5):
            pixels = np.full((40, 30, 3), 20 * index, np.uint8)
            Image.fromarray(pixels).save(tmp_path / "leaves" / kind / f"{index}.png")
    monkeypatch.setitem(registry.BUNDLED, "leaves", leaves.Leaves)
    with (
        monkeypatch.context() as elsewhere,
        pytest.raises(ValueError, match="no example for split"),
    ):
        elsewhere.chdir(tmp_path / "leaves")
        registry.open_split("leaves", "train", str(tmp_path / "other"), "image", "label")
    for split, count in {"train": 8, "validation": 2}.items():
        examples, builder = registry.open_split("leaves", split, "data", "image", "label")
        assert len(examples) == count and examples[0]["image"].shape == (32, 32, 3)
        assert builder.info.features["label"].num_classes == 2


@pytest.mark.full
def test_the_task_of_the_page_trains(tmp_path, data_dir, monkeypatch, unoptimized):
    monkeypatch.setitem(TASKS, "numbers", page_module(1, "numbers").KIND)
    values = load_experiment(str(ROOT / "configs/vit_digits.py")).get_config("smoke").to_dict()
    values |= {"task": "numbers", "input": {"scale": 10.0}, "data_dir": data_dir}
    final = train(open_config(ConfigDict(values)), str(tmp_path / "run"))
    assert final.keys() == {"loss", "error"} and 0 < final["error"] < 1
    assert isinstance(open_run(tmp_path / "run").model, ViT)


def test_files_modules_and_configs_named_exist():
    for page, text in PAGES.items():
        for path in re.findall(r"\]\(((?!http|#)[^)#]+)", text):
            where = ROOT if page == "README.md" else ROOT / "docs"
            assert (where / path).exists(), (page, path)
    for name in set(re.findall(r"`((?:bdia_jax|train|tests|benchmarks|examples)/[\w/.]+)`", TEXT)):
        assert (ROOT / name).exists() or (ROOT / f"{name}.py").exists(), name
    for name in set(re.findall(r"`(bdia_jax(?:\.\w+)+)", TEXT)):
        assert pkgutil.resolve_name(name), name
    for name in set(re.findall(r"-m ((?:benchmarks|train)\.\w+)", TEXT)):
        assert importlib.util.find_spec(name), name


def test_commands_have_configs_and_fields_that_exist():
    commands = re.findall(r"--config=(configs/[a-z]\w*\.py)(:[\w,]+)?([^\n`]*)", TEXT)
    assert len(commands) > 10
    for file, words, rest in commands:
        config = load_experiment(str(ROOT / file)).get_config(words.removeprefix(":"))
        for field in re.findall(r"--config\.([\w.]+)=", rest):
            reduce(lambda group, name: group[name], field.split("."), config)


def test_the_messages_a_run_ends_with_are_those_of_the_program():
    section = PAGES["training.md"].split("## Why a run stopped")[1].split("\n## ")[0]
    said = [m for m in re.findall(r"`([^`\n]*…[^`\n]*)`", section) if not m.startswith("--")]
    assert len(said) > 15
    texts = [
        node.value
        for path in [*(ROOT / "train").rglob("*.py"), *(ROOT / "bdia_jax").rglob("*.py")]
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    for message in said:
        for part in filter(str.strip, message.split("…")):
            assert any(part in text for text in texts), (message, part)
