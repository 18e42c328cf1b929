"""Exactness where it is not given: compiled for a GPU, in the formats people train in.

`check` and its like hold the claims; at toy size they are tried on any device, in programs that
are not optimized, which compile in half the time. Run the rest with `-m gpu`.
"""

import re
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from toy import GRAD_TOLERANCE, assert_grads_close
from toy_models import filled

from bdia_jax import FixedPoint, memory_report
from bdia_jax.models.attention import Attention
from bdia_jax.models.blocks import PreNormBlock
from bdia_jax.models.resnet import BasicBlock
from bdia_jax.nnx import BDIAStack

TOY = {"batch": 2, "tokens": 5, "width": 16, "depth": 3}
FULL = {"batch": 16, "tokens": 65, "width": 512, "depth": 24}


def make_stack(width, depth, dtype, guard_bits, backprop="reversible", dropout_rate=0.1):
    def make_block(rngs):
        return PreNormBlock(width, 2, width, dropout_rate=dropout_rate, dtype=dtype, rngs=rngs)

    return BDIAStack(
        make_block,
        depth,
        rngs=nnx.Rngs(0),
        fixed_point=FixedPoint(guard_bits=guard_bits),
        backprop=backprop,
    )


def gradient(stack, x):
    @nnx.jit
    def grad(stack, x):
        return nnx.grad(lambda s: jnp.mean(s(x, rngs=nnx.Rngs(1)) ** 2))(stack)

    return jax.tree.leaves(grad(stack, x))


def check(batch, tokens, width, depth, dtype, precision, guard_bits):
    """If the drift is within the guard's bound every bit comes back, and so do the gradients."""
    x = jax.random.normal(jax.random.key(1), (batch, tokens, width))
    with jax.default_matmul_precision(precision):
        audit = make_stack(width, depth, dtype, guard_bits).audit(x)
        print(f"{dtype.__name__} {precision} {audit}")
        assert audit.max_drift > 0 or audit.exact  # no drift, no error, whatever the guard
        if audit.max_drift < audit.fixed_point.drift_bound:
            assert audit.exact, audit
        if audit.exact:
            actual = gradient(make_stack(width, depth, dtype, guard_bits), x)
            expected = gradient(make_stack(width, depth, dtype, guard_bits, "store"), x)
            assert_grads_close(actual, expected, GRAD_TOLERANCE[jnp.dtype(dtype)])
    return audit


@pytest.mark.full
@pytest.mark.claim("gradients equal store's")
def test_the_check_itself_at_toy_size(unoptimized):
    audit = check(**TOY, dtype=jnp.bfloat16, precision="default", guard_bits=4)
    assert audit.elements == 160 and audit.exact


@pytest.mark.gpu
@pytest.mark.parametrize(
    "dtype, precision",
    [(jnp.float32, "default"), (jnp.float32, "highest"), (jnp.bfloat16, "default")],
)
@pytest.mark.parametrize("guard_bits", [0, 1, 2, 3, 4])
def test_pre_norm_blocks_on_the_gpu(dtype, precision, guard_bits):
    check(**FULL, dtype=dtype, precision=precision, guard_bits=guard_bits)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_suggested_guard_bits_are_enough_on_the_gpu(dtype):
    x = jax.random.normal(jax.random.key(1), (16, 65, 512))
    suggested = make_stack(512, 24, dtype, 1).audit(x).suggested_guard_bits
    assert suggested is not None
    assert make_stack(512, 24, dtype, suggested).audit(x).exact


def check_convolutions(batch, size, width, dtype):
    """A ResNet's stage, whose convolution kernels may differ between the passes: bits suggested
    by the audit are enough."""
    make_block = lambda rngs: BasicBlock(width, dtype=dtype, rngs=rngs)  # noqa: E731
    stack = BDIAStack(make_block, 5, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (batch, size, size, width))
    audit = stack.audit(x, rngs=nnx.Rngs(1))
    print(f"{dtype.__name__} {audit}")
    assert audit.suggested_guard_bits is not None
    if audit.suggested_guard_bits > audit.fixed_point.guard_bits:
        stack.fixed_point = FixedPoint(guard_bits=audit.suggested_guard_bits)
        audit = stack.audit(x, rngs=nnx.Rngs(1))
    assert audit.exact
    return audit


@pytest.mark.full
def test_the_check_of_convolutions_at_toy_size(unoptimized):
    assert check_convolutions(2, 4, 8, jnp.float32).elements == 2 * 4 * 4 * 8


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_convolutions_on_the_gpu(dtype):
    check_convolutions(128, 32, 64, dtype)


HEADS = 8


def flash_stack(width, depth, implementation, guard_bits=1, mlp_dim=None, **options):
    attention = partial(Attention, is_causal=True, implementation=implementation)

    def make_block(rngs):
        part = {"attention": attention, "dtype": jnp.bfloat16}
        return PreNormBlock(width, HEADS, mlp_dim or width, rngs=rngs, **part)

    fixed_point = FixedPoint(guard_bits=guard_bits)
    make = partial(BDIAStack, make_block, depth, fixed_point=fixed_point, **options)
    return filled(lambda: make(rngs=nnx.Rngs(0)), scale=0.05)


def compiled_gradient(width, depth, tokens, implementation, **options):
    stack = flash_stack(width, depth, implementation, **options)
    graphdef, params, rest = nnx.split(stack, nnx.Param, ...)

    def loss(params, rest, x):
        return jnp.mean(nnx.merge(graphdef, params, rest)(x, rngs=nnx.Rngs(1)) ** 2)

    x = jax.ShapeDtypeStruct((4, tokens, width), jnp.float32)
    return jax.jit(jax.grad(loss)).lower(params, rest, x).compile()


def check_flash(width, depth, tokens, implementation):
    """Bits suggested by the audit are enough; and what stands in the compiled program."""
    x = jax.random.normal(jax.random.key(1), (4, tokens, width))
    audit = flash_stack(width, depth, implementation).audit(x)
    print(f"{implementation} {audit}")
    assert audit.suggested_guard_bits is not None
    if audit.suggested_guard_bits > 1:
        audit = flash_stack(width, depth, implementation, audit.suggested_guard_bits).audit(x)
    assert audit.exact
    compiled = compiled_gradient(width, depth, tokens, implementation)
    text = compiled.as_text()
    weights = re.search(rf"\[(\d+,)*{tokens},{tokens}\]", text)  # [B, H, T, T] of any grouping
    return "__cudnn$fmha" in text, weights is not None, memory_report(compiled).temporaries


@pytest.mark.full
def test_the_check_of_attention_at_toy_size(unoptimized):
    has_cudnn, has_weights, _ = check_flash(32, 2, 24, "xla")
    assert has_weights and not has_cudnn


@pytest.mark.gpu
def test_cudnn_attention_is_exact_and_writes_no_weights_on_the_gpu():
    xla_cudnn, xla_weights, xla_bytes = check_flash(512, 12, 1088, "xla")
    assert xla_weights and not xla_cudnn
    has_cudnn, has_weights, flash_bytes = check_flash(512, 12, 1088, None)  # chosen by itself
    assert has_cudnn and not has_weights
    assert xla_bytes - flash_bytes > 2 * 4 * HEADS * 1088**2


def check_parts(width, depth, tokens):
    """By branch one gradient needs less memory, and with the batch in parts too, less again."""
    ways = ({}, {"by_branch": True}, {"by_branch": True, "batch_chunks": 4})
    whole, branches, parts = (
        memory_report(
            compiled_gradient(width, depth, tokens, None, mlp_dim=4 * width, **way)
        ).temporaries
        for way in ways
    )
    print(f"{whole=} {branches=} {parts=}")
    assert parts < branches < whole


@pytest.mark.gpu
def test_parts_of_a_block_need_less_on_the_gpu():
    check_parts(512, 12, 1088)
