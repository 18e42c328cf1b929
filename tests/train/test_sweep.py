"""Sweeps and their reports: all runs of an experiment, and tables that say what the runs said."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from toy_runs import points

import train.sweep as program
from train.loop.log import read_records
from train.report import Run, read_sweep, report, rows
from train.report import main as report_main
from train.sweep import EXPERIMENTS, sweep

pytestmark = [pytest.mark.full, pytest.mark.usefixtures("quick_compile")]
DIGITS = "configs/vit_digits.py"


@pytest.fixture(scope="module", autouse=True)
def of_points():
    """A linear model in place of each: what is swept does not matter here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.loop.train.load_task", points)
        yield


@pytest.fixture(scope="module")
def overrides(data_dir):
    return {"num_seeds": 2, "data_dir": data_dir}


@pytest.fixture(scope="module")
def swept(tmp_path_factory, overrides):
    """BDIA and plain, two seeds each, at smoke size."""
    workdir = tmp_path_factory.mktemp("sweep") / "vit_digits"
    command = f"python -m train.sweep --config={DIGITS} --workdir=/home/somebody/x"
    assert sweep(DIGITS, str(workdir), "smoke", ["bdia", "plain"], overrides, command) == []
    return workdir


def test_report_says_what_the_records_say(swept, tmp_path):
    text = report(swept, tmp_path)
    document = json.loads((tmp_path / "vit_digits_smoke.json").read_text())
    with (tmp_path / "vit_digits_smoke.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["run"] for row in table] == ["bdia", "plain"]
    for row in table:
        records = read_records(swept / row["run"])
        values = [r for r in records if r["kind"] == "eval"][-1]["seeds"]["accuracy"]
        assert len(values) == 2
        expected = f"{100 * np.mean(values):.2f} ± {100 * np.std(values, ddof=1):.2f}"
        assert row["accuracy"] == expected and expected in text
        final = document["results"][row["run"]]["final"]
        assert final["accuracy"] == values
        evals = [r["seeds"] for r in records if r["kind"] == "eval"]
        best = {"loss": min, "accuracy": max}
        assert document["results"][row["run"]]["best"] == {
            name: [of([r[name][seed] for r in evals]) for seed in (0, 1)]
            for name, of in best.items()
        }
        assert final["accuracy_gamma_0.25"] == records[-1]["seeds"]["accuracy_gamma_0.25"]
    assert (tmp_path / "vit_digits_smoke.png").stat().st_size > 10_000
    assert document["device"] and document["versions"]["jax"] and document["date"]
    assert document["command"] == f"python -m train.sweep --config={DIGITS}"
    assert str(swept) not in json.dumps(document)


def test_swept_again_it_is_done_and_another_experiment_is_refused(swept, overrides):
    before = (swept / "plain" / "metrics.jsonl").read_bytes()
    assert sweep(DIGITS, str(swept), "smoke", ["plain"], overrides) == []
    assert (swept / "plain" / "metrics.jsonl").read_bytes() == before
    with pytest.raises(ValueError, match="take another --workdir"):
        sweep(DIGITS, str(swept), "", ["plain"], {})


def test_failed_run_does_not_stop_the_others(tmp_path, data_dir):
    diverges = {"learning_rate": 1e38, "grad_clip_norm": 0.0, "data_dir": data_dir}
    failures = sweep(DIGITS, str(tmp_path / "x"), "smoke", ["bdia", "plain"], diverges)
    assert [failure.split(":")[0] for failure in failures] == ["bdia", "plain"]
    assert all("lower learning_rate" in failure for failure in failures)
    with pytest.raises(ValueError, match=r"no run in .* has been evaluated"):
        report(tmp_path / "x", tmp_path / "out")


@pytest.mark.parametrize(
    ("file", "runs", "overrides", "message"),
    [
        (DIGITS, ["rnn"], {}, r"no 'rnn' in .*; its runs are bdia, plain"),
        ("configs/nothing.py", None, {}, "is no experiment"),
        ("configs/common.py", None, {}, "no RUNS"),
        (DIGITS, None, {"model.no_such": 1}, "does not fit configs"),
    ],
)
def test_bad_names(tmp_path, file, runs, overrides, message):
    with pytest.raises(ValueError, match=message):
        sweep(file, str(tmp_path / "x"), "smoke", runs, overrides)
    assert not (tmp_path / "x").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be used"):
        sweep(DIGITS, str(tmp_path / "file"), "smoke", ["bdia"])
    with pytest.raises(SystemExit, match="has no experiment"):
        report_main([str(tmp_path)])


def test_unfinished_sweep_is_reported_as_such(swept, tmp_path):
    shutil.copytree(swept, tmp_path / "x")
    file = tmp_path / "x" / "plain" / "metrics.jsonl"
    lines = [line for line in file.read_text().splitlines() if '"final"' not in line]
    file.write_text("\n".join(lines) + "\n")
    text = report(tmp_path / "x", tmp_path / "out")
    assert "Not run yet: quantized, revnet, midpoint." in text
    header, _, bdia, plain, *_ = text[text.index("| run") :].splitlines()
    assert header.count("|") == bdia.count("|") == plain.count("|")


def test_paper_column_stands_at_the_papers_size_only(swept):
    _, _, runs = read_sweep(swept)
    assert "paper" not in rows(runs, "accuracy")[0]
    with_paper = [Run(**{**vars(run), "paper": 89.1}) for run in runs]
    assert rows(with_paper, "accuracy")[0]["paper"] == "89.10"


def run_main(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["sweep", *arguments])
    with flagsaver.flagsaver():
        program.main(flags.FLAGS(["sweep", *arguments])[:1])


def test_all_are_swept_and_reported_and_what_fails_is_told(tmp_path, data_dir, monkeypatch):
    monkeypatch.setattr(program, "EXPERIMENTS", {"vit_cifar10": 1, "no_such": 1, "vit_cifar100": 1})
    out = tmp_path / "out"
    arguments = ["--all", f"--workdir={tmp_path / 'runs'}", f"--out={out}", "--scale=smoke"]
    arguments += [f"--set=data_dir={data_dir}", "--set=optimizer=adamw"]
    with pytest.raises(SystemExit, match=r"^error: no_such: .*no_such.py is no experiment"):
        run_main(monkeypatch, *arguments)
    for name, runs in (("vit_cifar10", 3), ("vit_cifar100", 3)):
        text = (out / f"{name}_smoke.json").read_text()
        document = json.loads(text)
        assert len(document["results"]) == runs
        assert document["overrides"] == {"num_seeds": 1, "optimizer": "adamw"}
        command = "python -m train.sweep --all --scale=smoke --set=optimizer=adamw"
        assert document["command"] == command
        for file in (text, *((out / f"{name}_smoke{end}").read_text() for end in (".md", ".csv"))):
            assert str(tmp_path) not in file and data_dir not in file


def test_one_or_all_has_to_be_said(monkeypatch):
    for arguments in ([], ["--all"], ["--out=x"], ["--all", "--out=x", f"--config={DIGITS}"]):
        with pytest.raises(ValueError, match=r"expected --config=.*or --all and --out"):
            run_main(monkeypatch, *arguments)


def test_all_are_the_papers_that_need_no_checkpoint():
    all_configs = {path.stem for path in Path("configs").glob("*_*.py")}
    ours = {name for name in all_configs if name.startswith(("dial_", "smollm2_"))}
    ours.add("vit_cifar10_spt")  # another recipe for vit_cifar10's numbers
    assert set(EXPERIMENTS) == all_configs - ours - {"__init__", "gpt2_e2e"}
    assert next(iter(EXPERIMENTS)) == "vit_cifar10"
