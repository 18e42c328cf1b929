"""Which tests run when, the rule of claims and controls, and what is said of the time."""

import json
from pathlib import Path

import pytest
import tiers
from tiers import Pairing, unpaired


def claim(name="exact", tier="quick"):
    return Pairing("claim", name, f"test_{name}_{tier}", tier)


def control(name="exact", tier="quick"):
    return Pairing("control", name, f"test_not_{name}_{tier}", tier)


@pytest.mark.parametrize(
    "pairs",
    [
        [],
        [claim(), control()],
        [claim(tier="full"), control()],
        [claim(tier="full"), control(tier="full")],
        [claim(), claim(tier="full"), control(), control(tier="full")],
        [claim(tier="gpu"), control(tier="full")],
    ],
)
def test_claims_with_a_control_as_fast_are_right(pairs):
    assert unpaired(pairs) == []


@pytest.mark.parametrize(
    ("pairs", "told"),
    [
        ([claim()], "test_exact_quick claims 'exact', which has no control"),
        ([control()], "test_not_exact_quick is the control of 'exact', which no test claims"),
        ([claim("exakt"), claim(), control()], "test_exakt_quick claims 'exakt', which has no"),
        (
            [claim(tier="full"), claim(), control(tier="full")],
            "control, test_not_exact_full, is full",
        ),
        (
            [claim(tier="full"), control(tier="gpu")],
            "control, test_not_exact_gpu, is gpu",
        ),
    ],
)
def test_other_claims_and_controls_are_told(pairs, told):
    (line,) = unpaired(pairs)
    assert told in line


TESTS = """
import pytest

def test_quick(): pass

@pytest.mark.full
@pytest.mark.parametrize("n", [1, 2])
def test_long(n): sum(range(10_000_000))

@pytest.mark.full
@pytest.mark.claim("exact")
def test_longer(): pass

@pytest.mark.gpu
def test_gpu(): pass
"""
CONTROL = "import pytest\n@pytest.mark.control('exact')\ndef test_control(): pass"


@pytest.fixture
def suite(pytester, monkeypatch):
    """A small suite whose one claim has its control."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    pytester.makeconftest('pytest_plugins = ["tiers"]')
    pytester.makeini("[pytest]\ntestpaths = .\naddopts = -m 'not gpu' -p no:cacheprovider")
    pytester.makepyfile(test_one=TESTS, test_two=CONTROL)
    return pytester


@pytest.mark.parametrize(
    ("args", "passed"),
    [
        ([], 2),
        (["--full"], 5),
        (["--full", "-m", "full and not gpu"], 3),
        (["-m", "gpu"], 1),
        (["test_one.py"], 1),
        (["test_one.py::test_longer"], 1),
        (["test_one.py::test_long"], 2),
        (["test_one.py::test_long[2]", "test_two.py"], 2),
        (["test_two.py", "test_one.py::test_quick"], 2),
    ],
)
def test_full_tests_wait_for_their_flag_or_their_name(suite, args, passed):
    result = suite.runpytest_inprocess(*args)
    assert result.ret == 0 and result.parseoutcomes()["passed"] == passed


def test_a_claim_without_its_control_ends_the_whole_suites_collection(suite):
    run = suite.runpytest_inprocess
    suite.path.joinpath("test_two.py").write_text("def test_other(): pass")
    result = run("-rN")  # a summary says it once more, whole where CI is set
    told = "test_one.py::test_longer claims 'exact', which has no control"
    assert result.ret != 0 and result.stdout.str().count(told) == 1
    # a part does not show what is missing
    assert run("test_one.py").ret == 0
    assert run("-k", "quick").ret == 0


BUDGET = """
import tiers
from pathlib import Path

pytest_plugins = ["tiers"]
tiers.BUDGETS["full"] = tiers._LEAST = 0
tiers.DURATIONS = Path(__file__).with_name("durations.json")
"""


@pytest.mark.full
@pytest.mark.parametrize("workers", [[], ["-n", "2"]])
def test_the_time_is_told_and_an_exceeded_budget_does_not_fail(suite, workers):
    suite.makeconftest(BUDGET)
    suite.path.joinpath("durations.json").write_text('{"test_one.py": {"test_long[1]": 123.4}}')
    result = suite.runpytest_subprocess("--full", "--write-durations", *workers)
    assert result.ret == 0
    (at,) = (i for i, line in enumerate(result.outlines) if line.startswith("full tier: 5 tests,"))
    listed = sorted(result.outlines[at + 2 : at + 4])  # the two longest
    assert listed[0].startswith("  was 123.4 s, now ") and listed[0].endswith("test_long[1]")
    assert listed[1].startswith("  was < 0 s, now ") and listed[1].endswith("test_long[2]")


def test_durations_of_all_tests_are_kept_and_no_fewer(suite, monkeypatch):
    kept = suite.path / "durations.json"
    monkeypatch.setattr(tiers, "DURATIONS", kept)
    monkeypatch.setattr(tiers, "_LEAST", 0)
    assert suite.runpytest_inprocess("--full", "--write-durations").ret == 0
    found = json.loads(kept.read_text())
    assert {file: len(tests) for file, tests in found.items()} == {
        "test_one.py": 4,
        "test_two.py": 1,
    }
    part = suite.runpytest_inprocess("--write-durations")
    assert part.ret == pytest.ExitCode.USAGE_ERROR and "add --full" in part.stderr.str()
