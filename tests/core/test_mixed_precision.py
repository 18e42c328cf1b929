"""A stack's dtype: bfloat16 blocks under float32 parameters and states; guard bits by audit."""

from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from toy import assert_grads_close, relative_error
from toy_models import BF16, filled

from bdia_jax import FixedPoint, linen, lora
from bdia_jax._flax import cast_floats, choose_guard_bits
from bdia_jax.audit import Audit
from bdia_jax.baselines import FloatBDIAStack, MidpointStack, RevStack
from bdia_jax.models.blocks import PreNormBlock
from bdia_jax.nnx import BDIAStack

pytestmark = pytest.mark.usefixtures("quick_compile")  # tests of exactness ask for `optimized`
WIDTH = 13
X = jnp.asarray(2 * np.random.default_rng(3).normal(size=(4, 5, WIDTH)), jnp.float32)
CONST = jnp.linspace(-1.0, 1.0, WIDTH)


class Block(nnx.Module):
    """Layers that name no dtype, or all the same; what they saw is in `seen`."""

    seen: ClassVar[list] = []

    def __init__(self, rngs, dtype=None):
        options = {"dtype": dtype, "rngs": rngs}
        self.norm = nnx.LayerNorm(WIDTH, **options)
        self.dense = nnx.Linear(WIDTH, WIDTH, **options)

    def __call__(self, x, const=None, count=None):
        h = nnx.tanh(self.dense(self.norm(x)))
        Block.seen.append((x, self.dense.kernel[...], const, count, h))
        return h if const is None else h + const


class Norm(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.norm = nnx.BatchNorm(WIDTH, momentum=0.9, dtype=jnp.bfloat16, rngs=rngs)

    def __call__(self, x):
        h = nnx.tanh(self.norm(self.dense(x)))
        return h, {"balance": jnp.mean(h)}


def make(block, dtype=jnp.bfloat16, **options):
    return filled(lambda: BDIAStack(block, 4, rngs=nnx.Rngs(0), dtype=dtype, **options))


@nnx.jit
def forward(stack, *consts):
    return stack(X, *consts, rngs=nnx.Rngs(1))


@nnx.jit
def gradient(stack):
    def loss(stack, const):
        return jnp.sum(jnp.sin(stack(X, const, jnp.arange(3), rngs=nnx.Rngs(1))))

    return nnx.grad(loss, argnums=(0, 1))(stack, CONST)


# --- dtype ---------------------------------------------------------------------------


def test_blocks_compute_in_dtype_and_everything_else_stays_float32():
    Block.seen.clear()
    stack = make(Block)
    y = forward(stack, CONST, jnp.arange(3))
    for *floats, count, h in Block.seen:
        assert {leaf.dtype for leaf in (*floats, h)} == {jnp.dtype(jnp.bfloat16)}
        assert count.dtype == jnp.int32
    assert y.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(stack, nnx.Param))} == {X.dtype}
    difference = relative_error(y, forward(make(Block, dtype=None), CONST, jnp.arange(3)))
    assert 1e-5 < difference < BF16


def test_keys_and_integers_are_not_cast():
    tree = {"key": jax.random.key(0), "count": jnp.arange(3), "mask": CONST > 0, "none": None}
    cast = cast_floats(tree | {"x": CONST}, jnp.bfloat16)
    assert cast.pop("x").dtype == jnp.bfloat16
    assert jax.tree.map(lambda leaf: leaf.dtype, cast) == jax.tree.map(lambda a: a.dtype, tree)


def test_it_is_the_stack_of_layers_that_name_the_dtype():
    layers = make(partial(Block, dtype=jnp.bfloat16), dtype=None)
    consts = CONST, jnp.arange(3)
    assert relative_error(forward(layers, *consts), forward(make(Block), *consts)) < 5e-3
    named = make(partial(Block, dtype=jnp.float32))  # a layer's own dtype is the last word
    Block.seen.clear()
    nnx.eval_shape(lambda: named(X, rngs=nnx.Rngs(1)))
    assert Block.seen[0][0].dtype == jnp.bfloat16 and Block.seen[0][-1].dtype == jnp.float32


@pytest.mark.full
@pytest.mark.claim("gradients equal store's")
def test_gradients_reach_float32_parameters_and_consts():
    expected = gradient(make(Block, backprop="store"))
    actual = gradient(make(Block))
    assert {leaf.dtype for leaf in jax.tree.leaves(actual)} == {jnp.dtype(jnp.float32)}
    assert_grads_close(actual, expected, BF16)


@pytest.mark.claim("rebuild is exact")
def test_the_rebuild_of_bfloat16_blocks_is_exact(optimized):
    audit = make(Block).audit(X, CONST, rngs=nnx.Rngs(1))
    assert audit.exact and audit.max_drift == 0, audit


def test_state_is_not_cast_and_aux_is_float32():
    stack, reference = make(Norm, has_aux=True), make(Norm, dtype=None, has_aux=True)
    before = 1 / 3 * jnp.ones((4, WIDTH))
    for each, dtype in ((stack, jnp.float32), (reference, jnp.bfloat16)):
        each.blocks.norm.mean[...] = before
        _, aux = forward(each)
        assert aux["balance"].dtype == dtype
    mean, expected = (each.blocks.norm.mean[...] for each in (stack, reference))
    assert mean.dtype == jnp.float32 and np.any(mean != before)
    assert relative_error(mean, expected) < BF16
    # 0.9 / 3, and not 0.9 times the bfloat16 next to 1/3
    batch_mean = (mean[0] - 0.3) / 0.1
    dense = nnx.state(stack.blocks.dense, nnx.Param)
    kernel, bias = (dense[name][...][0].astype(jnp.bfloat16) for name in ("kernel", "bias"))
    rows = (jnp.rint(X * 512) / 512).astype(jnp.bfloat16) @ kernel + bias
    np.testing.assert_allclose(batch_mean, rows.astype(jnp.float32).mean((0, 1)), atol=1e-3)


@pytest.mark.parametrize("stack_class", [MidpointStack, FloatBDIAStack, RevStack])
def test_float_baselines_have_it_too(stack_class):
    seen = []

    class Seeing(PreNormBlock):
        def g(self, x, *consts):
            seen.append(self.mlp_norm.scale.dtype)
            return super().g(x, *consts)

    def run(dtype):
        stack = stack_class(
            lambda rngs: Seeing(8, 2, 8, rngs=rngs), 2, rngs=nnx.Rngs(0), dtype=dtype
        )
        return stack(X[..., :8], rngs=nnx.Rngs(1))

    for dtype in (jnp.bfloat16, None):
        assert nnx.eval_shape(partial(run, dtype)).dtype == jnp.float32
        assert seen.pop() == (dtype or jnp.float32)


def test_adapters_are_float32_masters_too():
    stack = make(Block)
    lora.add(stack, ("dense",), rank=2, alpha=4, rngs=nnx.Rngs(0))
    loss = lambda stack: jnp.sum(jnp.sin(stack(X, rngs=nnx.Rngs(1))))  # noqa: E731
    trained = nnx.DiffState(0, nnx.LoRAParam)
    grads = jax.tree.leaves(nnx.jit(nnx.grad(loss, argnums=trained))(stack))
    assert {leaf.dtype for leaf in grads} == {jnp.dtype(jnp.float32)}
    assert [bool(jnp.any(leaf)) for leaf in grads] == [False, True]  # B starts at zero


@pytest.mark.parametrize("dtype", [jnp.int32, "brainfloat", 16])
def test_another_dtype_is_refused(dtype):
    with pytest.raises(ValueError, match=r"expected a float type such as jnp.bfloat16, or None"):
        make(Block, dtype=dtype)
    stack = linen.BDIAStack(LinenBlock(), 2, dtype=dtype)
    with pytest.raises(ValueError, match=r"expected a float type such as jnp.bfloat16, or None"):
        stack.init(jax.random.key(0), X, deterministic=True)


# --- linen ---------------------------------------------------------------------------


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x, const=None, train=False):
        h = nn.tanh(nn.Dense(WIDTH)(x))
        h = nn.BatchNorm(use_running_average=not train, momentum=0.9)(h)
        assert h.dtype == x.dtype
        return h if const is None else h + const


@pytest.mark.full
def test_linen_stack_has_the_same_dtype():
    plain, half = (linen.BDIAStack(LinenBlock(), 4, dtype=dtype) for dtype in (None, jnp.bfloat16))
    key = jax.random.key(1)
    variables = jax.jit(partial(plain.init, deterministic=True))(key, X)
    leaves = jax.tree.leaves(jax.eval_shape(partial(half.init, deterministic=True), key, X))
    assert {leaf.dtype for leaf in leaves} == {X.dtype}

    def call(stack, params, const):
        given, modes = variables | {"params": params}, {"deterministic": False, "train": True}
        rngs, mutable = {"gamma": key}, ["batch_stats"]
        return stack.apply(given, X, const, **modes, rngs=rngs, mutable=mutable)

    def gradient(stack):
        def loss(params, const):
            y, state = call(stack, params, const)
            return jnp.sum(jnp.sin(y)), (y, state)

        return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(variables["params"], CONST)

    y, _ = jax.jit(partial(call, plain))(variables["params"], CONST)
    actual, (y16, state) = gradient(half)
    assert {leaf.dtype for leaf in jax.tree.leaves((actual, y16, state))} == {X.dtype}
    assert 1e-5 < relative_error(y16, y) < BF16
    assert_grads_close(actual, gradient(half.clone(backprop="store"))[0], BF16)


# --- guard bits ----------------------------------------------------------------------


@jax.custom_vjp
def off(h, by):
    """h; where it is evaluated to be differentiated, as in the rebuild, +-by beside it."""
    return h


def _off_fwd(h, by):
    return h + by * jax.random.rademacher(jax.random.key(7), h.shape, h.dtype), by


off.defvjp(_off_fwd, lambda by, ct: (ct, jnp.zeros_like(by)))


class Drifting(nnx.Module):
    def __init__(self, by, rngs):
        self.by = nnx.Param(jnp.float32(by))
        self.kernel = nnx.Param(jnp.eye(WIDTH))

    def __call__(self, x):
        return off(jnp.tanh(x @ self.kernel[...]), self.by[...])


def drifting(quanta, **options):
    block = partial(Drifting, quanta * 2.0**-9 / 1.5)  # times 1 + gamma
    return BDIAStack(block, 4, rngs=nnx.Rngs(0), **options)


@pytest.mark.claim("guard bits are chosen by audit")
@pytest.mark.control("guard bits are chosen by audit")
def test_the_chosen_number_is_exact_and_the_one_before_was_not(monkeypatch):
    audits, audit = [], BDIAStack.audit

    def record(stack, *args, **options):
        audits.append(audit(stack, *args, **options))
        return audits[-1]

    monkeypatch.setattr(BDIAStack, "audit", record)
    stack = drifting(1.2)
    found = stack.choose_guard_bits(X, draws=2)
    before, again, after = audits
    assert again.fixed_point == before.fixed_point
    assert before.fixed_point.guard_bits == 1 and not before.exact  # that bears half a quantum
    assert found is after and after.exact and 1 < after.max_drift < 1.5
    assert stack.fixed_point == after.fixed_point == FixedPoint(guard_bits=3)


def found_with(guard_bits, max_drift):
    """A function that audits: each draw suggests the next of guard_bits."""
    suggestions = iter(guard_bits)
    none = np.zeros(1)

    def audit_with(fixed_point):
        suggested = next(suggestions)
        return Audit(fixed_point, 1, none, none, none, none, 0, 0, max_drift, 0.0, suggested)

    return audit_with


def test_the_draw_that_asks_for_most_decides():
    audit_with = found_with([1, 4, 2, 4], 0.1)
    chosen = choose_guard_bits(audit_with, FixedPoint(), at_least=1, draws=3)
    assert chosen.fixed_point.guard_bits == 4
    with pytest.raises(ValueError, match="no number of guard bits"):
        choose_guard_bits(found_with([1, None, 2], 9.0), FixedPoint(), at_least=1, draws=3)
    with pytest.raises(ValueError, match="draws is 0"):
        choose_guard_bits(found_with([], 0.0), FixedPoint(), at_least=1, draws=0)


@pytest.mark.parametrize("at_least", [pytest.param(1, marks=pytest.mark.full), 0])
def test_without_drift_the_least_is_taken(at_least):
    stack = drifting(0.0, fixed_point=FixedPoint(frac_bits=7, guard_bits=1))
    assert stack.choose_guard_bits(X, at_least=at_least).exact
    assert stack.fixed_point == FixedPoint(frac_bits=7, guard_bits=at_least)


@pytest.mark.parametrize(
    ("drift", "x", "message"),
    [
        (300.0, X, "no number of guard bits is enough for a drift of"),
        (0.0, X.at[0, 0, 0].set(jnp.nan), "elements of the states are NaN"),
    ],
)
def test_where_no_number_helps_the_stack_stays_as_it_is(drift, x, message):
    stack = drifting(drift)
    with pytest.raises(ValueError, match=message):
        stack.choose_guard_bits(x)
    assert stack.fixed_point == FixedPoint()
