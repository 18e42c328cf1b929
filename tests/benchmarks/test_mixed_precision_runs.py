"""The benchmark of bfloat16: its blocks are the library's, and what its differences mean."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from toy import assert_same_bits, relative_error
from toy_models import BF16, filled

from bdia_jax.models.blocks import PreNormBlock
from bdia_jax.nnx import BDIAStack, pure_blocks
from benchmarks import mixed_precision

pytestmark = [pytest.mark.full, pytest.mark.usefixtures("quick_compile")]


def test_the_benchmarks_blocks_without_a_dtype_are_the_librarys_blocks():
    x = jnp.asarray(np.random.default_rng(3).normal(size=(4, 5, 8)), jnp.float32)

    def block(rngs):
        return PreNormBlock(8, 2, 8, rngs=rngs)

    def run(make, **options):
        stack = filled(lambda: make(block, 2, rngs=nnx.Rngs(0), **options))
        pure = pure_blocks(stack, nnx.Rngs(1), lambda block, x: block(x))
        params = jax.tree.map(lambda leaf: leaf[0], pure.params)
        return jax.jit(pure.block_fns[0])(params, x)[0]

    expected = run(BDIAStack)
    assert_same_bits(run(mixed_precision.plain_stack), expected)
    h = run(mixed_precision.plain_stack, dtype=jnp.bfloat16)
    assert h.dtype == jnp.bfloat16 and 1e-5 < relative_error(h, expected) < BF16


def test_the_benchmark_measures_differences_against_the_scatter():
    def row(by):
        losses = np.array([[9.0, 9.0, 9.0], *[[1.0, 2.0, 3.0]] * 5]) + by
        return {"train_loss": losses.tolist(), "held_out": {"loss": [4.0, 6.0, 8.0 + by]}}

    compared = mixed_precision.compare({"float32": row(0.0), "other": row(0.5)})
    found = compared["other"]["train_loss"]
    assert found["difference"] == found["difference_in_scatters"] == 0.5 and found["mean"] == 2.5
    assert found["standard_error"] == 0.0 and found["scatter"] == 1.0
    held_out = compared["other"]["held_out_loss"]
    assert held_out["standard_error"] == pytest.approx(held_out["difference"]) == 0.5 / 3
