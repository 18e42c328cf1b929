"""Fuzzed Hugging Face folders: refused by an error of ours, or accepted; no traceback."""

import json

import pytest
from toy_models import small

from bdia_jax import interop
from bdia_jax.interop import gpt2
from benchmarks.fuzz_folders import fuzz_folders, open_folder, spoil_folder
from benchmarks.outcome import ACCEPTED, FAILED, REFUSED, outcome_of
from train import cli

pytestmark = [pytest.mark.full, pytest.mark.usefixtures("quick_compile")]


@pytest.mark.claim("bad input gets one line")
def test_no_folder_ends_in_another_exception(tmp_path):
    """A few of what benchmarks/results/fuzz_folders.json has, by the same function."""
    found = fuzz_folders(tmp_path, range(30))
    assert found["failures"] == []
    assert found["totals"][REFUSED] > 15 and found["totals"][ACCEPTED]
    assert found["spoilt"].keys() == {"config", "header", "index", "bytes", "generation"}
    for folder in ("a", "b"):
        spoil_folder(17, tmp_path / "sound", tmp_path / folder)
    a, b = ({f.name: f.read_bytes() for f in (tmp_path / n).iterdir()} for n in ("a", "b"))
    assert a == b


@pytest.mark.control("bad input gets one line")
def test_without_the_check_of_fields_a_folder_fails(tmp_path, monkeypatch):
    folder = tmp_path / "gpt2"
    interop.save(small("gpt2", width=8), folder)
    config = json.loads((folder / "config.json").read_text()) | {"n_inner": "abc"}
    (folder / "config.json").write_text(json.dumps(config))

    def outcome():
        with cli.told():
            open_folder(folder, tmp_path / "out")

    assert outcome_of(outcome).kind == REFUSED
    monkeypatch.setattr(gpt2, "read_fields", lambda config, _: config)
    assert outcome_of(outcome).kind == FAILED
