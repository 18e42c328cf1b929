"""Model FLOPs of a training step, and what the device can do, measured."""

import time

import jax
import jax.numpy as jnp

from benchmarks.stack import Shape


def model_flops(shape: Shape, depth: int) -> float:
    """Matrix-product FLOPs of one forward and backward pass without any recomputation.

    K (6 P B T + 12 B T^2 D): P parameters stand in matrix products (4 D^2 in attention,
    2 D M in the MLP), a multiplication and an addition each, once forward and twice backward;
    Q K^T and the product with V take 2 B T^2 D each, likewise three times. Attention here sees
    all tokens; a causal one would count half of the second term. The rest (norms, softmax,
    GELU, fixed point) is left out, as is usual.
    """
    tokens = shape.batch * shape.tokens
    params = 4 * shape.width**2 + 2 * shape.width * shape.mlp_dim
    return depth * (6.0 * params * tokens + 12.0 * tokens * shape.tokens * shape.width)


def peak_flops(dtype: str, sizes: tuple[int, ...], repeats: int = 3) -> dict:
    """FLOP/s of the fastest square matrix product [n, n] x [n, n] of this dtype.

    Args:
        dtype: of the operands and of the result; accumulation is the device's choice.
        sizes: the n to try.
        repeats: timings of each, the best counts.

    Returns:
        flops_per_second, the n it was reached at, and the best of every n.
    """
    by_size = {}
    product = jax.jit(jnp.matmul)
    for n in sizes:
        a = jax.random.normal(jax.random.key(0), (n, n), jnp.dtype(dtype))
        product(a, a).block_until_ready()  # compiles
        calls = min(50, max(1, int(0.2 / _seconds(product, a, 1))))
        seconds = min(_seconds(product, a, calls) for _ in range(repeats))
        by_size[n] = 2.0 * n**3 / seconds
    best = max(by_size, key=lambda n: by_size[n])
    return {
        "flops_per_second": by_size[best],
        "matmul_size": best,
        "by_size": {str(n): value for n, value in by_size.items()},
    }


def _seconds(product, a, calls: int) -> float:
    """Mean seconds of a call, over this many in a row."""
    start = time.perf_counter()
    out = a
    for _ in range(calls):
        out = product(a, a)
    out.block_until_ready()
    return (time.perf_counter() - start) / calls
