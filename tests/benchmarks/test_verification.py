"""Stacks that drift at random: no wrong gradient is finite, and without verification all are."""

import jax
import pytest

from benchmarks.verification import NAN, RIGHT, SETTINGS, WRONG, run

QUICK = ("float32 whole", "bfloat16 by branch, in chunks")
# every way once; all of both dtypes is what the benchmark is for
FULL = [name for name in SETTINGS if name.startswith("float32") and "gamma" not in name]
FULL += ["float32 gamma 1/16", "bfloat16 gamma 1/128", "bfloat16 4 devices, in chunks"]
pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.mark.claim("no wrong gradient is finite")
@pytest.mark.control("no wrong gradient is finite")
@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
@pytest.mark.parametrize(
    "name", [*QUICK, *(pytest.param(n, marks=pytest.mark.full) for n in FULL if n not in QUICK)]
)
def test_what_is_wrong_is_nan_and_a_number_if_it_is_not_verified(name):
    """A few of the trials of benchmarks/results/verification.json, by the same function."""
    found = run(SETTINGS[name], 30, seed=len(name))
    verified, control = found["verified"], found["unverified"]
    assert (verified[WRONG], found["false_alarms"]) == (0, 0)
    assert verified[NAN] == control[WRONG] > 10 and verified[RIGHT] == control[RIGHT] > 3
