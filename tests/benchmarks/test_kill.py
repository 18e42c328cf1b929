"""A run killed at random moments ends with the bits of one that was not."""

import jax
import pytest
from toy_runs import points

from benchmarks import kills

SEED = 20261122  # of the moments


@pytest.mark.full
@pytest.mark.claim("killed and resumed is bit-equal")
@pytest.mark.control("killed and resumed is bit-equal")
def test_killed_at_random_moments_the_end_is_the_same(tmp_path, data_dir):
    """Three kills of a linear model, which starts fast; benchmarks/results/kills.json has 20."""
    cache = jax.config.values["jax_compilation_cache_dir"]
    runs = kills.Runs(kills.make_config(data_dir, 10), tmp_path, cache, points)
    result = kills.measure(runs, 3, SEED)
    assert result["kills"] == 3 == sum(result["moments"].values()), result
    assert result["compared_elements"] >= 10 and result["differing_elements"] == 0, result
    assert result["differing_elements_one_step_before"] >= 9  # a single step too few is noticed
