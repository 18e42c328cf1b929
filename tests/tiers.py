"""Tiers of the test suite: quick by default, full on demand; claims with their controls; CPU time.

`pytest` runs the quick tier, `pytest --full` all tests; a test named by its node id always runs.
A test marked `claim("name")` holds a claim of the project, one marked `control("name")` shows that
the claim's test can fail; a test that has its own control in it bears both marks. A claim without
a control that runs whenever it does ends the collection of the whole suite with an error.
"""

import json
import resource
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

BUDGETS = {"quick": 600, "full": 2400}  # CPU seconds
DURATIONS = Path(__file__).parent / "durations.json"
_SLOWEST = 15


class Pairing(NamedTuple):
    """kind: "claim" or "control"; name: of the claim; test: its node id; is_full: its tier."""

    kind: str
    name: str
    test: str
    is_full: bool


def unpaired(pairings: Iterable[Pairing]) -> list[str]:
    """What is wrong with them, a line each: claims without a control as fast, and the reverse."""
    pairings = list(pairings)
    found = []
    for name in sorted({each.name for each in pairings}):
        claims, controls = (
            [each for each in pairings if (each.kind, each.name) == (kind, name)]
            for kind in ("claim", "control")
        )
        if not claims:
            found.append(f"{controls[0].test} is the control of {name!r}, which no test claims")
        elif not controls:
            found.append(f"{claims[0].test} claims {name!r}, which has no control")
        elif all(each.is_full for each in controls) and not all(each.is_full for each in claims):
            quick = next(each.test for each in claims if not each.is_full)
            found.append(f"{quick} claims {name!r}, whose control is in the full tier only")
    return found


def pairings(item: Any) -> list[Pairing]:
    """Those of one test."""
    is_full = item.get_closest_marker("full") is not None
    return [
        Pairing(mark.name, mark.args[0], item.nodeid, is_full)
        for mark in item.iter_markers()
        if mark.name in ("claim", "control")
    ]


# --- choosing ----------------------------------------------------------------------------


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="the full tier, not the quick one alone")
    parser.addoption(
        "--write-durations", action="store_true", help=f"write {DURATIONS.name} after --full"
    )


def pytest_configure(config):
    for mark in (
        "full: not in the quick tier",
        "gpu: needs a GPU; run with -m gpu",
        'claim(name): holds a claim of the project, such as "rebuild is exact"',
        "control(name): shows that the test of this claim can fail",
    ):
        config.addinivalue_line("markers", mark)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node):
    node.workerinput["is_whole_suite"] = _is_whole_suite(node.config)


def _is_whole_suite(config) -> bool:
    if hasattr(config, "workerinput"):
        return config.workerinput["is_whole_suite"]
    return config.args_source == config.ArgsSource.TESTPATHS


@pytest.hookimpl(tryfirst=True)  # before -k and -m take tests away
def pytest_collection_modifyitems(config, items):
    if _is_whole_suite(config):
        wrong = unpaired(each for item in items for each in pairings(item))
        if wrong:
            text = "claims need a control in their own or a faster tier:\n  " + "\n  ".join(wrong)
            report = pytest.CollectReport("claims and controls", "failed", text, [])
            config.hook.pytest_collectreport(report=report)  # an exception would be lost by xdist
    if config.getoption("--full"):
        return
    named = [arg.split("[")[0] for arg in config.args if "::" in arg]
    chosen, left_out = [], []
    for item in items:
        waits = item.get_closest_marker("full") and not item.get_closest_marker("gpu")
        is_named = any(arg.split("::", 1)[1] in item.nodeid for arg in named)
        (left_out if waits and not is_named else chosen).append(item)
    items[:] = chosen
    if left_out:
        config.hook.pytest_deselected(items=left_out)


# --- CPU time ----------------------------------------------------------------------------


def _cpu_seconds() -> float:
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    item.cpu_seconds_before = _cpu_seconds()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_makereport(item, call):
    if call.when == "teardown":
        spent = _cpu_seconds() - item.cpu_seconds_before
        item.user_properties.append(("cpu_seconds", spent))


class Durations:
    """Collects the CPU seconds of all tests, of all workers, and says what they come to."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    def pytest_runtest_logreport(self, report):
        properties = dict(report.user_properties)
        if report.when == "teardown" and "cpu_seconds" in properties:
            self.seconds[report.nodeid] = properties["cpu_seconds"]

    def pytest_terminal_summary(self, terminalreporter, config):
        if not self.seconds or not _is_whole_suite(config):
            return
        tier = "full" if config.getoption("--full") else "quick"
        total, budget = sum(self.seconds.values()), BUDGETS[tier]
        write = terminalreporter.write_line
        write(f"{tier} tier: {len(self.seconds)} tests, {total:.0f} CPU seconds of {budget}")
        if total > budget:
            known = json.loads(DURATIONS.read_text()) if DURATIONS.exists() else {}
            write("over budget; the tests that cost most, and what they did when last written:")
            for test in sorted(self.seconds, key=lambda test: -self.seconds[test])[:_SLOWEST]:
                before = known.get(test, "below 0.5")
                write(f"  {self.seconds[test]:6.1f} s, was {before} s: {test}")
        if config.getoption("--write-durations"):
            kept = {test: round(s, 1) for test, s in sorted(self.seconds.items()) if s >= 0.5}
            DURATIONS.write_text(json.dumps(kept, indent=0) + "\n")


def pytest_sessionstart(session):
    if not hasattr(session.config, "workerinput"):
        session.config.pluginmanager.register(Durations())
