"""The soak at toy size: what it counts, that it can fail, and that it goes on where it stopped."""

import json
from dataclasses import replace

import jax
import pytest

from benchmarks import record, soak

pytestmark = [
    pytest.mark.skipif(jax.device_count() < 4, reason="needs four devices"),
    pytest.mark.usefixtures("quick_compile"),
]


@pytest.fixture(scope="module")
def ran(tmp_path_factory, quick_compile):
    """(folder, results) of a run that was cut off in its second round, and taken up again."""
    out = tmp_path_factory.mktemp("soak")
    soak.main(["--toy", "--rounds", "1", "--out", str(out)])
    path = out / f"{record.stem('soak_rounds')}.jsonl"
    path.write_text(path.read_text() + '{"setting": "mlp de')
    return out, soak.main(["--toy", "--elements", "5e3", "--out", str(out)])


def test_nothing_differs_and_every_round_is_counted_once(ran):
    out, results = ran
    lines = (out / f"{record.stem('soak_rounds')}.jsonl").read_text().splitlines()
    rounds = [one for one in map(json.loads, lines) if "must_be_exact" not in one]
    assert len(lines) - len(rounds) == len(results["controls"]) == 2
    assert [one["seed"] for one in rounds] == [0, len(soak.SETTINGS)]
    assert results["total"]["elements"] == sum(one["elements"] for one in rounds) == 2 * 3 * 1024
    assert results["total"]["mismatches"] == results["total"]["invalid"] == 0
    assert {row["unprobed_rounds"] for row in results["settings"].values()} == {1}
    assert any("data=2" in name for name in results["settings"])
    document = json.loads((out / f"{record.stem('soak')}.json").read_text())
    assert document["results"] == json.loads(json.dumps(results))
    assert soak.verdict(results)


def test_the_controls_differ(ran):
    parity, guarded = ran[1]["controls"]
    assert parity["mismatches"] > 100 and parity["unprobed_x0_mismatches"] > 0
    assert guarded["mismatches"] == 0 and guarded["corrections"] > 0
    for wrong in ({"mismatches": 1}, {"unprobed_x0_mismatches": 1}, {"invalid": 1}):
        assert not soak.verdict(ran[1] | {"total": ran[1]["total"] | wrong})
    assert not soak.verdict(ran[1] | {"controls": [parity | {"as_expected": False}]})


def test_settings_are_told_apart_and_cover_what_they_should():
    names = [setting.name for setting in soak.SETTINGS]
    assert len(set(names)) == len(names)
    assert replace(soak.SETTINGS[0], guard_bits=4).name not in names
    for field, values in {
        "dtype": {"float32", "bfloat16"},
        "guard_bits": {1, 2, 3},
        "gamma_bits": {1, 2, 3},
        "frac_bits": {5, 9, 12},
        "data": {1, 2, 4, 8},
    }.items():
        assert values <= {getattr(setting, field) for setting in soak.SETTINGS}
