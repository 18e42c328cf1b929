"""Fuzzed command lines and configs: refused by an error of ours, or accepted; no traceback."""

import os
import sys
import time

import pytest
from ml_collections import ConfigDict

from benchmarks.fuzz import checked, fuzz, make_scratch, run_case
from benchmarks.fuzz_cases import CONFIGS, Case, make_case
from benchmarks.fuzz_file_cases import FileCase, make_file
from benchmarks.fuzz_files import apart, fuzz_files
from benchmarks.outcome import ACCEPTED, FAILED, REFUSED, USAGE
from configs import vit_digits
from train.config import Config
from train.datasets.registry import LOCAL
from train.tasks import open_config


@pytest.fixture(scope="module")
def scratch(tmp_path_factory, data_dir):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TFDS_DATA_DIR", data_dir)
        yield make_scratch(tmp_path_factory.mktemp("fuzz") / "a" / "b")


@pytest.mark.claim("bad input gets one line")
@pytest.mark.parametrize(
    ("cases", "tiny", "processes"), [(100, 0, 0), pytest.param(200, 2, 2, marks=pytest.mark.full)]
)
def test_no_case_ends_in_another_exception(scratch, cases, tiny, processes):
    """A hundredth of what benchmarks/results/fuzz.json has, by the same function."""
    found = fuzz(scratch, range(cases), range(tiny), range(processes))
    assert (found["failures"], found["tracebacks_in_processes"]) == ([], [])
    totals = found["totals"]
    assert totals[REFUSED] > cases // 3 and totals[ACCEPTED] and totals[USAGE]
    assert len(found["programs"]) >= 8 and sum(totals.values()) == cases + tiny


def test_the_same_number_is_the_same_case():
    assert make_case(17) == make_case(17) != make_case(18)


@pytest.mark.control("bad input gets one line")
def test_a_foreign_exception_is_a_failure(scratch):
    def broken(config, workdir, command=""):
        raise KeyError("planted")

    case = Case("train", [f"--config={CONFIGS / 'vit_digits.py'}", "--workdir={S}/planted"])
    assert run_case(case, scratch, checked).kind == ACCEPTED
    outcome = run_case(case, scratch, broken)
    assert outcome.kind == FAILED and "planted" in outcome.message


@pytest.mark.control("bad input gets one line")
def test_without_the_check_of_types_a_case_fails(scratch, monkeypatch):
    case = Case("config", [], _digits() | {"gamma": "abc"})
    assert run_case(case, scratch, checked).message == "error: gamma is 'abc', expected a number"

    def unchecked(config, **values):
        for name, value in values.items():
            object.__setattr__(config, name, value)
        config.__post_init__()

    monkeypatch.setattr(Config, "__init__", unchecked)
    assert run_case(case, scratch, checked).kind == FAILED


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("batch_size", 1.5, "batch_size is 1.5, expected a whole number"),
        ("batch_size", True, "batch_size is True, expected a whole number"),
        ("seed", 2**31, "seed is 2147483648, expected at most 2147483647"),
        ("learning_rate", float("nan"), "learning_rate is nan, expected a finite number"),
        ("learning_rate", 10**400, "learning_rate is 1000.*characters.*, expected a number"),
        ("gamma", 1.5, "gamma is 1.5, expected at most 1"),
        ("quantize", 1, "quantize is 1, expected True or False"),
        ("data_dir", "a\0b", "data_dir is 'a.x00b', expected text, without zero bytes"),
        ("data_dir", "\ud800", r"data_dir is '.ud800', expected text, without zero bytes"),
        ("dataset", None, "dataset is None, expected text"),
        ("non_finite", "ignore", "non_finite is 'ignore', expected one of 'stop' or 'skip'"),
        ("mesh", 3, "mesh is 3, expected a group of fields"),
        ("mesh.fsdp", 0, "mesh.fsdp is 0, expected at least 1"),
        ("task", "image", "task is 'image', expected one of .'images'"),
        ("model.width", "8", "model.width is '8', expected a whole number"),
        ("model.widht", 8, "unknown field model.widht"),
        ("input.inference_gammas", 0.5, "input.inference_gammas is 0.5, expected several"),
        ("input.inference_gammas", ("a",), "input.inference_gammas.0 is 'a', expected a number"),
    ],
)
def test_types_are_checked_at_the_door(field, value, message):
    values = _digits()
    *where, name = field.split(".")
    (values[where[0]] if where else values)[name] = value
    with pytest.raises(ValueError, match=f"^{message}") as error:
        open_config(ConfigDict(values))
    assert type(error.value) is ValueError and "\n" not in str(error.value)


def test_all_that_is_wrong_with_a_group_is_told_at_once():
    values = _digits()
    del values["seed"], values["stack"]
    with pytest.raises(ValueError, match=r"^no field seed; no field stack; gamma is 2, expected"):
        open_config(ConfigDict(values | {"gamma": 2}))


def test_an_int_stands_for_a_float_and_a_list_for_several():
    values = _digits() | {"learning_rate": 1}
    values["input"]["inference_gammas"] = [0]
    config = open_config(ConfigDict(values))
    assert isinstance(config.learning_rate, float) and config.input.inference_gammas == (0.0,)


def _digits():
    return vit_digits.get_config("smoke").to_dict()


@pytest.mark.full
@pytest.mark.claim("a downloaded file cannot run code, crash, fill the memory or hang")
def test_no_file_ends_in_another_way():
    """A small part of what benchmarks/results/fuzz_files.json has, by the same function."""
    found = fuzz_files(range(120))
    assert found["failures"] == []
    assert found["totals"][REFUSED] > 20 and found["totals"][ACCEPTED] > 20
    assert {*LOCAL} < {*found["readers"]} and make_file(17) == make_file(17)


def _exits(case, folder):
    os._exit(7)


def _hangs(case, folder):
    time.sleep(60)


def _fills(case, folder):
    try:
        return ACCEPTED, str(len(bytearray(2**30)))
    except MemoryError:
        return FAILED, "MemoryError"


@pytest.mark.full
@pytest.mark.control("a downloaded file cannot run code, crash, fill the memory or hang")
@pytest.mark.parametrize("read", [_exits, _hangs, _fills])
def test_what_ends_a_process_is_seen(read, tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.fuzz_files._SECONDS", 1)
    monkeypatch.setattr("benchmarks.fuzz_files._BYTES", 2**20)
    assert apart(FileCase("e2e", b""), tmp_path, read)[0] == FAILED


# --- a command line, by hand -----------------------------------------------------------------

NO_CONFIGS = {
    "x = 1": "FILE has no function get_config, as configs/vit_digits.py has",
    "def get_config(:": "FILE, line 1 is no Python: invalid syntax",
    "def get_config(): return 1 / 0": "ZeroDivisionError: division by zero (FILE, line 1)",
    "import nonsense": "ModuleNotFoundError: No module named 'nonsense' (FILE, line 1)",
    "def get_config(): return 3": "get_config() returned a int, expected a ConfigDict",
}


@pytest.mark.parametrize("text", NO_CONFIGS)
def test_a_file_that_is_no_config_is_told_in_a_line(text, tmp_path, scratch, monkeypatch):
    monkeypatch.delitem(sys.modules, "config_config", raising=False)  # of a config before
    file = tmp_path / "mine.py"
    file.write_text(text)
    found = run_case(Case("train", [f"--config={file}", "--workdir=w"]), scratch, checked)
    assert found.kind == REFUSED
    assert NO_CONFIGS[text].replace("FILE", str(file)) in found.message
    assert "\n" not in found.message


@pytest.mark.parametrize("name", ["model", "input"])
def test_a_group_of_fields_is_no_field(name, scratch):
    arguments = [f"--config={CONFIGS / 'vit_digits.py'}", f"--config.{name}=vit", "--workdir=w"]
    found = run_case(Case("train", arguments), scratch, checked)
    assert f"this is a group of fields; give one, --config.{name}.NAME=VALUE" in found.message
