"""benchmarks.alternatives: the plain stack under other ways to keep less of it."""

import re
from functools import cache, partial

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from toy import assert_grads_close, relative_error

from bdia_jax.nnx import BDIAStack
from benchmarks.alternatives import (
    LoopStack,
    OffloadStack,
    ScanStack,
    TwoLevelStack,
    nearest_to_sqrt,
)

pytestmark = pytest.mark.usefixtures("quick_compile")

DEPTH = 4
X = jax.random.normal(jax.random.key(3), (4, 5, 13))
REFERENCE = partial(BDIAStack, magnitude=0.0, fixed_point=None, backprop="store")
STACKS = {
    "store": partial(ScanStack, backprop="store"),
    "remat": partial(ScanStack, backprop="remat"),
    "two_level": TwoLevelStack,
    "one_segment": partial(TwoLevelStack, segment=DEPTH),
    "offload": OffloadStack,
    "loop": LoopStack,
}


class Block(nnx.Module):
    """Dropout, a shared input, an aux and a running state: all that a stack has to carry."""

    def __init__(self, rngs):
        self.linear = nnx.Linear(13, 13, rngs=rngs)
        self.dropout = nnx.Dropout(0.3, rngs=rngs)
        self.largest = nnx.BatchStat(jnp.zeros(()))

    def __call__(self, x, shift):
        h = self.dropout(nnx.tanh(self.linear(x))) + shift
        self.largest[...] = jnp.max(jnp.abs(h))
        return h, jnp.mean(h**2)


@cache
def gradient(make, seed=1):
    """(gradients of parameters, x and shift; aux; the blocks' state) of one loss, jitted."""
    graphdef, params, rest = nnx.split(
        make(Block, DEPTH, rngs=nnx.Rngs(0), has_aux=True), nnx.Param, ...
    )

    @jax.jit
    def run(params, x, shift):
        def loss_fn(params, x, shift):
            stack = nnx.merge(graphdef, params, rest, copy=True)
            out, aux = stack(x, shift, rngs=nnx.Rngs(seed))
            return jnp.sum(jnp.sin(out)) + aux.sum(), (aux, stack.blocks.largest[...])

        return jax.grad(loss_fn, argnums=(0, 1, 2), has_aux=True)(params, x, shift)

    grads, (aux, largest) = run(params, X, jnp.linspace(-0.1, 0.1, 13))
    return grads, aux, largest


@pytest.mark.claim("alternatives have the plain stack's gradients")
@pytest.mark.parametrize(
    "name",
    [n if n == "two_level" else pytest.param(n, marks=pytest.mark.full) for n in STACKS],
)
def test_gradients_are_those_of_the_plain_stack(name):
    grads, aux, largest = gradient(STACKS[name])
    expected, expected_aux, expected_largest = gradient(REFERENCE)
    assert_grads_close(grads, expected, 1e-5)
    assert aux.shape == largest.shape == (DEPTH,)
    assert relative_error(aux, expected_aux) < 1e-5
    assert relative_error(largest, expected_largest) < 1e-5


@pytest.mark.control("alternatives have the plain stack's gradients")
def test_other_dropout_masks_give_other_gradients():
    (grads, _, _), (expected, _, _) = gradient(TwoLevelStack, seed=2), gradient(REFERENCE)
    with pytest.raises(AssertionError, match="relative error"):
        assert_grads_close(grads, expected, 1e-2)


class Light(nnx.Module):
    """A block with hardly any parameters, so that states are what takes memory."""

    def __init__(self, rngs):
        self.linear = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x):
        return nnx.tanh(self.linear(x))


def lower(make, depth, platform=None):
    """The gradient, lowered for x [1024, 8]."""
    stack = nnx.eval_shape(lambda: make(Light, depth, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(stack)
    loss = lambda state, x: jnp.sum(nnx.merge(graphdef, state)(x) ** 2)  # noqa: E731
    x = jax.ShapeDtypeStruct((1024, 8), jnp.float32)
    traced = jax.jit(jax.grad(loss, argnums=1)).trace(state, x)
    return traced.lower(lowering_platforms=(platform,) if platform else None)


@cache
def states(make, depth):
    """Compiled temporary memory, in states of x."""
    plan = lower(make, depth).compile().memory_analysis()
    return plan.temp_size_in_bytes / (1024 * 8 * 4)


@pytest.mark.full
def test_memory_of_two_levels_grows_with_the_square_root():
    # K / S + S states: 8 at K = 16, 16 at K = 64
    grown = states(TwoLevelStack, 64) - states(TwoLevelStack, 16)
    assert grown == pytest.approx(8, abs=1)
    remat = STACKS["remat"]  # the control: K states
    assert states(remat, 64) - states(remat, 16) == pytest.approx(48, abs=1)


def test_segment_length():
    expected = {1: 1, 2: 1, 7: 1, 8: 2, 12: 3, 16: 4, 24: 4, 36: 6}
    assert {depth: nearest_to_sqrt(depth) for depth in expected} == expected
    for depth, size in expected.items():
        sizes = [s for s in range(1, depth + 1) if depth % s == 0]
        assert size + depth // size == min(s + depth // s for s in sizes)
    with pytest.raises(ValueError, match="segment is 3, expected a divisor of the depth 4"):
        TwoLevelStack(Light, 4, rngs=nnx.Rngs(0), segment=3)


def placements(make, platform):
    """(where, shape) of what the lowered gradient moves between memories."""
    text = lower(make, 16, platform).as_text()
    found = re.findall(
        r'annotate_device_placement.*_xla_buffer_placement = "(\w+)".*-> tensor<(\w+)>', text
    )
    return sorted(found)


def test_offload_moves_the_state_to_the_host_and_back():
    there_and_back = [("device", "1024x8xf32"), ("pinned_host", "1024x8xf32")]
    assert placements(OffloadStack, "cuda") == there_and_back
    assert placements(STACKS["remat"], "cuda") == []


@pytest.mark.full
def test_offload_is_remat_where_host_and_device_are_one():
    assert placements(OffloadStack, "cpu") == []
    if jax.default_backend() == "cpu":
        assert states(OffloadStack, 64) == states(STACKS["remat"], 64)
