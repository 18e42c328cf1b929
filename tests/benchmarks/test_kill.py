"""A run killed at random moments ends with the bits of one that was not."""

from dataclasses import replace
from pathlib import Path

from benchmarks import kills

SEED = 20261122  # of the moments


def test_killed_at_random_moments_the_end_is_the_same(tmp_path, data_dir):
    """Three here, in the plain model, which starts faster; benchmarks/results/kills.json has 20."""
    config = kills.make_config(data_dir, "plain,smoke", num_steps=10)
    config = replace(config, optimizer="adamw", model=replace(config.model, width=8, mlp_dim=8))
    result = kills.measure(kills.Runs(config, Path(tmp_path), unoptimized=True), 3, SEED)
    assert result["kills"] == 3 == sum(result["moments"].values()), result
    assert result["compared_elements"] > 1_000 and result["differing_elements"] == 0, result
    # the comparison would notice a single step too few
    assert result["differing_elements_one_step_before"] > 500
