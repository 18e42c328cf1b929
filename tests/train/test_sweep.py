"""Sweeps and their reports: all runs of an experiment, and tables that say what the runs said."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from train.loop.log import read_records
from train.paper import EXPERIMENTS
from train.paper import main as paper_main
from train.report import Run, read_sweep, report, rows
from train.report import main as report_main
from train.sweep import load_experiment, sweep

pytestmark = [pytest.mark.full, pytest.mark.usefixtures("quick_compile")]


@pytest.fixture(scope="module")
def swept(tmp_path_factory, data_dir):
    """BDIA and plain, two seeds each, at smoke size."""
    workdir = tmp_path_factory.mktemp("sweep") / "vit_digits"
    overrides = {"num_seeds": 2, "data_dir": data_dir, "input.inference_gammas": (-0.5, 0.0)}
    command = "python -m train.sweep --config=configs/vit_digits.py --workdir=/home/somebody/x"
    failures = sweep(
        "configs/vit_digits.py", str(workdir), "smoke", ["bdia", "plain"], overrides, command
    )
    assert failures == []
    return workdir


def test_report_says_what_the_records_say(swept, tmp_path):
    text = report(swept, tmp_path)
    document = json.loads((tmp_path / "vit_digits_smoke.json").read_text())
    with (tmp_path / "vit_digits_smoke.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["run"] for row in table] == ["bdia", "plain"]
    for row in table:
        last = [r for r in read_records(swept / row["run"]) if r["kind"] == "eval"][-1]
        values = last["seeds"]["accuracy"]
        assert len(values) == 2
        expected = f"{100 * np.mean(values):.2f} ± {100 * np.std(values, ddof=1):.2f}"
        assert row["accuracy"] == expected and expected in text
        assert document["results"][row["run"]]["final"]["accuracy"] == values
    assert (tmp_path / "vit_digits_smoke.png").stat().st_size > 10_000
    assert document["device"] and document["versions"]["jax"] and document["date"]
    assert document["command"] == "python -m train.sweep --config=configs/vit_digits.py"
    assert str(swept) not in json.dumps(document)


def test_inference_gamma_is_evaluated_for_every_seed(swept):
    (final,) = (r for r in read_records(swept / "bdia") if r["kind"] == "final")
    last = [r for r in read_records(swept / "bdia") if r["kind"] == "eval"][-1]
    np.testing.assert_allclose(
        final["seeds"]["accuracy_gamma_0.0"], last["seeds"]["accuracy"], rtol=1e-6
    )
    assert len(final["seeds"]["accuracy_gamma_-0.5"]) == 2


def test_swept_again_it_is_done_and_another_experiment_is_refused(swept, data_dir):
    overrides = {"num_seeds": 2, "data_dir": data_dir, "input.inference_gammas": (-0.5, 0.0)}
    before = (swept / "plain" / "metrics.jsonl").read_text().count('"train"')
    assert sweep("configs/vit_digits.py", str(swept), "smoke", ["plain"], overrides) == []
    assert (swept / "plain" / "metrics.jsonl").read_text().count('"train"') == before
    with pytest.raises(ValueError, match="take another --workdir"):
        sweep("configs/vit_digits.py", str(swept), "", ["plain"], {})


def test_failed_run_does_not_stop_the_others(tmp_path, data_dir):
    overrides = {"learning_rate": 1e30, "grad_clip_norm": 0.0, "data_dir": data_dir}
    failures = sweep(
        "configs/vit_digits.py", str(tmp_path / "x"), "smoke", ["bdia", "plain"], overrides
    )
    assert [failure.split(":")[0] for failure in failures] == ["bdia", "plain"]
    with pytest.raises(ValueError, match=r"no run in .* has been evaluated"):
        report(tmp_path / "x", tmp_path / "out")
    assert all("lower learning_rate" in failure for failure in failures)


def test_bad_names(tmp_path):
    with pytest.raises(ValueError, match=r"no 'rnn' in .*; its runs are bdia, plain"):
        sweep("configs/vit_digits.py", str(tmp_path / "x"), "smoke", ["rnn"])
    with pytest.raises(ValueError, match="is no experiment"):
        load_experiment("configs/nothing.py")
    with pytest.raises(ValueError, match="no RUNS"):
        load_experiment("configs/common.py")
    with pytest.raises(ValueError, match="does not fit configs"):
        sweep("configs/vit_digits.py", str(tmp_path / "x"), "smoke", None, {"model.no_such": 1})
    assert not (tmp_path / "x").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be used"):
        sweep("configs/vit_digits.py", str(tmp_path / "file"), "smoke", ["bdia"])
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


def test_paper_sweeps_and_reports(tmp_path, data_dir):
    out = tmp_path / "out"
    arguments = ["--workdir", tmp_path / "runs", "--out", out, "--scale", "smoke"]
    arguments += ["--only", "vit_cifar100", "--set", f"data_dir={data_dir}", "num_seeds=1"]
    paper_main([str(word) for word in arguments])
    text = (out / "vit_cifar100_smoke.json").read_text()
    assert set(json.loads(text)["results"]) == {"bdia", "plain", "revnet"}
    command = "python -m train.paper --scale smoke --only vit_cifar100 --set num_seeds=1"
    assert json.loads(text)["command"] == command
    for file in out.glob("*_smoke.*"):
        if file.suffix != ".png":
            assert str(tmp_path) not in file.read_text() and data_dir not in file.read_text()


def test_whole_paper_stops_at_what_it_cannot_do(tmp_path, data_dir, capsys):
    arguments = ["--workdir", tmp_path / "runs", "--out", tmp_path / "out", "--scale", "smoke"]
    arguments += ["--only", "vit_digits", "vit_cifar10"]
    arguments += ["--set", f"data_dir={data_dir}", "dataset=no_such_set"]
    with pytest.raises(SystemExit) as told:
        paper_main([str(word) for word in arguments])
    for name in ("vit_digits", "vit_cifar10"):
        assert f"{name}: dataset is 'no_such_set'" in str(told.value)
    with pytest.raises(SystemExit, match="does not fit"):
        paper_main(["--out", str(tmp_path), "--set", "model.no_such=1"])
    with pytest.raises(SystemExit):
        paper_main(["--out", str(tmp_path), "--set", "num_steps"])
    assert "expected FIELD=VALUE" in capsys.readouterr().err
    # gpt2_e2e starts from a checkpoint, which has to be brought
    all_configs = {path.stem for path in Path("configs").glob("*_*.py")}
    assert set(EXPERIMENTS) == all_configs - {"__init__", "gpt2_e2e"}
