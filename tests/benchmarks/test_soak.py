"""The soak at toy size: what it counts, that it can fail, and that it goes on where it stopped."""

import json
from dataclasses import replace

import jax
import pytest

from benchmarks.soak import read_lines, soak, verdict
from benchmarks.soak_settings import CONTROLS, SETTINGS, toy

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(jax.device_count() < 4, reason="needs four devices"),
    pytest.mark.usefixtures("quick_compile"),
]
SETTING = toy(SETTINGS[-1])


@pytest.fixture(scope="module")
def ran(tmp_path_factory, quick_compile):
    """(lines, results) of a run that was cut off in its second round, and taken up again."""
    path = tmp_path_factory.mktemp("soak") / "rounds.jsonl"
    controls = [(toy(setting), exact) for setting, exact in CONTROLS[:1]]
    soak([SETTING], controls, path, lambda results: results["total"]["elements"] > 0)
    path.write_text(path.read_text() + '{"setting": "mlp de')
    results = soak([SETTING], controls, path, lambda results: results["total"]["elements"] > 5000)
    return read_lines(path), results


@pytest.mark.claim("soak finds no mismatch")
def test_nothing_differs_and_every_round_is_counted_once(ran):
    lines, results = ran
    rounds = [line for line in lines if "must_be_exact" not in line]
    assert len(lines) - len(rounds) == len(results["controls"]) == 1
    assert [one["seed"] for one in rounds] == [0, len(SETTINGS)]
    assert results["total"]["elements"] == sum(one["elements"] for one in rounds) == 2 * 3 * 1024
    assert results["total"]["mismatches"] == results["total"]["invalid"] == 0
    (row,) = results["settings"].values()
    assert row["unprobed_rounds"] == 1 and row["seeds"] == [0, len(SETTINGS)]
    assert [*results["settings"]] == [SETTING.name] and "data=2" in SETTING.name
    assert json.loads(json.dumps(results)) == results
    assert verdict(results)


@pytest.mark.control("soak finds no mismatch")
def test_the_control_differs(ran):
    _, results = ran
    (parity,) = results["controls"]
    assert parity["mismatches"] > 100 and parity["unprobed_x0_mismatches"] > 0
    for wrong in ({"mismatches": 1}, {"unprobed_x0_mismatches": 1}, {"invalid": 1}):
        assert not verdict(results | {"total": results["total"] | wrong})
    assert not verdict(results | {"controls": [parity | {"as_expected": False}]})


def test_it_stops_at_the_first_difference(tmp_path):
    path = tmp_path / "rounds.jsonl"
    off = toy(CONTROLS[0][0])
    results = soak([off], [], path, lambda results: results["total"]["elements"] > 1e9)
    assert results["total"]["rounds"] == 1 and results["total"]["mismatches"] > 100


def test_settings_are_told_apart_and_cover_what_they_should():
    names = [setting.name for setting in SETTINGS]
    assert len(set(names)) == len(names)
    assert replace(SETTINGS[0], guard_bits=4).name not in names
    for field, values in {
        "dtype": {"float32", "bfloat16"},
        "guard_bits": {1, 2, 3},
        "gamma_bits": {1, 2, 3},
        "frac_bits": {5, 9, 12},
        "data": {1, 2, 4, 8},
    }.items():
        assert values <= {getattr(setting, field) for setting in SETTINGS}
