"""The rule of claims and controls, and which tests run when."""

from pathlib import Path

import pytest
import tiers
from tiers import Pairing, unpaired


def claim(name="exact", is_full=False):
    return Pairing("claim", name, f"test_{name}", is_full)


def control(name="exact", is_full=False):
    return Pairing("control", name, f"test_not_{name}", is_full)


@pytest.mark.parametrize(
    "pairs",
    [
        [],
        [claim(), control()],
        [claim(is_full=True), control()],
        [claim(is_full=True), control(is_full=True)],
        [claim(), claim(is_full=True), control(), control(is_full=True)],
    ],
)
def test_pairs_that_are_right(pairs):
    assert unpaired(pairs) == []


@pytest.mark.parametrize(
    ("pairs", "told"),
    [
        ([claim()], "test_exact claims 'exact', which has no control"),
        ([control()], "test_not_exact is the control of 'exact', which no test claims"),
        ([claim(), control(is_full=True)], "test_exact claims 'exact', whose control is in the"),
        ([claim("exakt"), claim(), control()], "claims 'exakt', which has no control"),
    ],
)
def test_pairs_that_are_wrong(pairs, told):
    (line,) = unpaired(pairs)
    assert told in line


TESTS = """
import pytest

def test_quick(): pass

@pytest.mark.full
@pytest.mark.claim("exact")
def test_slow(): pass
"""


@pytest.fixture
def suite(pytester, monkeypatch):
    """A suite of two tests, one of them full and a claim without a control."""
    monkeypatch.setenv("PYTHONPATH", str(Path(tiers.__file__).parent))
    pytester.makeconftest('pytest_plugins = ["tiers"]')
    pytester.makeini("[pytest]\ntestpaths = .\n")
    pytester.makepyfile(test_one=TESTS)
    return lambda *args: pytester.runpytest_subprocess("-p", "no:cacheprovider", *args)


def test_full_tests_wait_for_their_flag_or_their_name(suite):
    suite("test_one.py").assert_outcomes(passed=1, deselected=1)
    suite("test_one.py", "--full").assert_outcomes(passed=2)
    suite("test_one.py::test_slow").assert_outcomes(passed=1)


@pytest.mark.parametrize("workers", [[], ["-n", "1"]])
def test_the_whole_suite_is_not_run_with_a_claim_that_has_no_control(suite, pytester, workers):
    result = suite(*workers)
    assert result.ret != 0
    assert "claims 'exact', which has no control" in str(result.stdout)
    pytester.makepyfile(test_two=TESTS.replace("claim", "control"))
    suite(*workers, "--full").assert_outcomes(passed=4)
