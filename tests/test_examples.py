"""The examples run, the loss and the memory fall, and their assertions can fail."""

import importlib.util
import re
from pathlib import Path

import pytest

import bdia_jax

pytestmark = [pytest.mark.full, pytest.mark.usefixtures("quick_compile")]

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))
assert EXAMPLES


def load(path):
    spec = importlib.util.spec_from_file_location(f"example_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.claim("the examples say what is so")
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path, capsys):
    load(path).main(num_steps=3)
    printed = capsys.readouterr().out
    first, *_, last = map(float, re.findall(r"loss (\S+)", printed))
    assert last < first
    plain, reversible = map(int, re.findall(r"(?:plain|reversible) (\d+) MiB", printed))
    assert 3 * reversible < plain
    assert "\nexact with" in printed and " 0 of " in printed and "differ" in printed


@pytest.mark.control("the examples say what is so")
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_its_assertions_can_fail(path, monkeypatch):
    main = load(path).main
    same = bdia_jax.MemoryReport(0, 0, 0, temporaries=2**20)
    monkeypatch.setattr(bdia_jax, "memory_report", lambda *args: same)
    with pytest.raises(AssertionError):
        main(num_steps=0)
