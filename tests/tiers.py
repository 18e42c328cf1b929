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
from typing import NamedTuple

import pytest

BUDGETS = {"quick": 600, "full": 2400}  # CPU seconds; a tier has the tests of those before it
DURATIONS = Path(__file__).parent / "durations.json"
_TIERS = ("quick", "full", "gpu")  # fastest first
_LEAST, _LISTED = 0.5, 15  # seconds worth to be kept; tests named when a budget is exceeded


class Pairing(NamedTuple):
    """kind: "claim" or "control"; name: of the claim; test: its node id; tier: the test's."""

    kind: str
    name: str
    test: str
    tier: str


def unpaired(pairings: Iterable[Pairing]) -> list[str]:
    """What is wrong with them, a line each: claims without a control as fast, and the reverse."""
    fastest_first = sorted(pairings, key=lambda each: _TIERS.index(each.tier))
    found = []
    for name in sorted({each.name for each in fastest_first}):
        claims, controls = (
            [each for each in fastest_first if (each.kind, each.name) == (kind, name)]
            for kind in ("claim", "control")
        )
        if not claims:
            found.append(f"{controls[0].test} is the control of {name!r}, which no test claims")
        elif not controls:
            found.append(f"{claims[0].test} claims {name!r}, which has no control")
        elif _TIERS.index(controls[0].tier) > _TIERS.index(claims[0].tier):
            fastest = f"its fastest control, {controls[0].test}, is {controls[0].tier}"
            found.append(f"{claims[0].test} claims {name!r} and is {claims[0].tier}; {fastest}")
    return found


def _tier(item: pytest.Item) -> str:
    return next((tier for tier in ("gpu", "full") if item.get_closest_marker(tier)), "quick")


# --- choosing ----------------------------------------------------------------------------


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="the full tier, not the quick one alone")
    parser.addoption("--write-durations", action="store_true", help=f"keep in {DURATIONS.name}")


def pytest_configure(config):
    for mark in (
        "full: not in the quick tier",
        "gpu: needs a GPU; run with -m gpu",
        'claim(name): holds a claim of the project, such as "rebuild is exact"',
        "control(name): shows that the test of this claim can fail",
    ):
        config.addinivalue_line("markers", mark)
    if config.getoption("--write-durations") and not config.getoption("--full"):
        raise pytest.UsageError("--write-durations keeps those of all tests: add --full")


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node):
    node.workerinput["collects_all"] = _collects_all(node.config)


def _collects_all(config) -> bool:
    if hasattr(config, "workerinput"):  # a worker of xdist is given the paths as if typed
        return config.workerinput["collects_all"]
    partly = ("keyword", "deselect", "ignore", "ignore_glob", "lf")
    from_testpaths = config.args_source == config.ArgsSource.TESTPATHS
    return from_testpaths and not any(config.getoption(name, None) for name in partly)


@pytest.hookimpl(tryfirst=True)  # before -m takes tests away
def pytest_collection_modifyitems(config, items):
    for item in items:
        if isinstance(item, pytest.DoctestItem):  # a program each, and tests hold what they show
            item.add_marker("full")
    if _collects_all(config):
        wrong = unpaired(
            Pairing(mark.name, mark.args[0], item.nodeid, _tier(item))
            for item in items
            for mark in item.iter_markers()
            if mark.name in ("claim", "control")
        )
        if wrong:
            text = "a claim needs a control in its own or a faster tier; mark it control(name):\n  "
            # as a report: workers lose exceptions, and the same report is printed once
            report = pytest.CollectReport("claims", "failed", text + "\n  ".join(wrong), [])
            config.hook.pytest_collectreport(report=report)
    if config.getoption("--full"):
        return
    chosen, left_out = [], []
    for item in items:
        waits = _tier(item) == "full" and not _is_named(item, config)
        (left_out if waits else chosen).append(item)
    if left_out:
        items[:] = chosen
        config.hook.pytest_deselected(items=left_out)


def _is_named(item, config) -> bool:
    in_file = item.nodeid.partition("::")[2]
    return any(
        (config.invocation_params.dir / path).resolve() == item.path
        and f"{in_file}[".startswith((f"{name}[", f"{name}::"))
        for path, _, name in (arg.partition("::") for arg in config.args if "::" in arg)
    )


# --- CPU time ----------------------------------------------------------------------------


def _cpu_seconds() -> float:
    """Of this process and of the children that it has waited for."""
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    item.cpu_seconds_before = _cpu_seconds()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_makereport(item, call):
    if call.when == "teardown":
        item.user_properties.append(("cpu_seconds", _cpu_seconds() - item.cpu_seconds_before))


def pytest_terminal_summary(terminalreporter, config):
    seconds = {
        report.nodeid: value
        for reports in terminalreporter.stats.values()
        for report in reports
        for name, value in getattr(report, "user_properties", ())
        if report.when == "teardown" and name == "cpu_seconds"
    }
    if not seconds or not _collects_all(config) or hasattr(config, "workerinput"):
        return  # workers have a terminal, too, that nobody sees
    tier = "full" if config.getoption("--full") else "quick"
    total = _cpu_seconds()  # workers have ended by now, and are children that were waited for
    terminalreporter.write_line(
        f"{tier} tier: {len(seconds)} tests, {total:.0f} CPU seconds of {BUDGETS[tier]}"
        f" ({total - sum(seconds.values()):.0f} outside tests)"
    )
    if total > BUDGETS[tier]:
        known = json.loads(DURATIONS.read_text()) if DURATIONS.exists() else {}
        terminalreporter.write_line("over its budget; the tests that cost most:")
        for test in sorted(seconds, key=lambda test: -seconds[test])[:_LISTED]:
            file, _, name = test.partition("::")
            was = known.get(file, {}).get(name, f"< {_LEAST}")
            terminalreporter.write_line(f"  was {was} s, now {seconds[test]:.1f} s: {test}")
    if config.getoption("--write-durations"):
        kept: dict[str, dict[str, float]] = {}
        for test in sorted(test for test in seconds if seconds[test] >= _LEAST):
            file, _, name = test.partition("::")
            kept.setdefault(file, {})[name] = round(seconds[test], 1)
        DURATIONS.write_text(json.dumps(kept, indent=1) + "\n")
