"""Fuzzed command lines and configs: refused by an error of ours, or accepted; no traceback."""

from collections import Counter

import pytest
from ml_collections import ConfigDict

from benchmarks.fuzz import ACCEPTED, FAILED, REFUSED, USAGE, make_scratch, run_case
from benchmarks.fuzz_cases import Case, make_case
from train.config import Config
from train.tasks import open_config


@pytest.fixture(scope="module")
def scratch(tmp_path_factory, data_dir):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TFDS_DATA_DIR", data_dir)
        yield make_scratch(tmp_path_factory.mktemp("fuzz") / "a" / "b")


@pytest.mark.full
def test_no_case_ends_in_another_exception(scratch):
    kinds, programs, failures = Counter(), set(), {}
    for seed in range(300):
        case = make_case(seed)
        outcome = run_case(case, scratch)
        kinds[outcome.kind] += 1
        programs.add(case.program)
        if outcome.kind == FAILED:
            failures[seed] = outcome.message
    assert failures == {}
    assert kinds[REFUSED] > 100 and kinds[ACCEPTED] > 5 and kinds[USAGE] > 5
    assert len(programs) >= 10


def test_the_same_number_is_the_same_case():
    assert make_case(17) == make_case(17) != make_case(18)


def test_control_a_foreign_exception_is_a_failure(scratch):
    def broken(config, workdir, command=""):
        raise KeyError("planted")

    configs = "--config=" + str(make_case.__globals__["CONFIGS"] / "vit_digits.py")
    case = Case("train", [configs, "--workdir={S}/planted"])
    assert run_case(case, scratch).kind == ACCEPTED
    outcome = run_case(case, scratch, broken)
    assert outcome.kind == FAILED and "planted" in outcome.message


def test_control_without_the_check_of_types_a_case_fails(scratch, monkeypatch):
    case = Case("config", [], {})
    case = case._replace(values=_digits() | {"gamma": "abc"})
    assert run_case(case, scratch).message.startswith("error: gamma is 'abc', expected")

    def unchecked(config, **values):
        for name, value in values.items():
            object.__setattr__(config, name, value)
        config.__post_init__()

    monkeypatch.setattr(Config, "__init__", unchecked)
    assert run_case(case, scratch).kind == FAILED


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("batch_size", 1.5, "batch_size is 1.5, expected a whole number"),
        ("batch_size", True, "batch_size is True, expected a whole number"),
        ("seed", 2**31, "seed is 2147483648, expected at most 2147483647"),
        ("learning_rate", float("nan"), "learning_rate is nan, expected a finite number"),
        ("learning_rate", 10**400, "learning_rate is 1000.*characters.*, expected a number"),
        ("quantize", 1, "quantize is 1, expected True or False"),
        ("data_dir", "a\0b", "data_dir is 'a.x00b', expected text, without zero bytes"),
        ("dataset", None, "dataset is None, expected text"),
        ("non_finite", "ignore", "non_finite is 'ignore', expected one of"),
        ("mesh", 3, "mesh is 3, expected a group of fields"),
        ("input.inference_gammas", 0.5, "input.inference_gammas is 0.5, expected several"),
        ("input.inference_gammas", ("a",), "input.inference_gammas.0 is 'a', expected a number"),
    ],
)
def test_types_are_checked_at_the_door(field, value, message):
    values = _digits()
    *where, name = field.split(".")
    (values[where[0]] if where else values)[name] = value
    with pytest.raises(ValueError, match=message):
        open_config(ConfigDict(values))


def test_an_int_stands_for_a_float():
    config = open_config(ConfigDict(_digits() | {"learning_rate": 1}))
    assert isinstance(config.learning_rate, float)


def _digits():
    from configs import vit_digits

    return vit_digits.get_config("smoke").to_dict()
