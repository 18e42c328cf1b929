"""by_branch, batch_chunks and token_chunks of the Flax stacks, their blocks, and the models."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from toy import GRAD_TOLERANCE, assert_grads_close, assert_same_bits, relative_error

import bdia_jax
from bdia_jax._flax import WHOLE, choose_evaluation
from bdia_jax.models.blocks import PreNormBlock
from bdia_jax.models.gpt2 import GPT2
from bdia_jax.models.transformer import DecoderBlock, Transformer
from bdia_jax.nnx import BDIAStack
from bdia_jax.text.generate import generate

pytestmark = pytest.mark.usefixtures("quick_compile")  # test_parts.py has optimized programs
F32 = GRAD_TOLERANCE[jnp.dtype(jnp.float32)]
ALL = {"by_branch": True, "batch_chunks": 2, "token_chunks": 3}
X = jax.random.normal(jax.random.key(0), (4, 6, 16))


def block(rngs, dropout_rate=0.1):
    return PreNormBlock(16, 2, 32, dropout_rate=dropout_rate, rngs=rngs)


def make(make_block=block, **options):
    return BDIAStack(make_block, 3, rngs=nnx.Rngs(0), **options)


def gradient(stack, *args):
    @nnx.jit
    def grad(stack):
        return nnx.grad(lambda s: jnp.sum(jnp.sin(s(*args, rngs=nnx.Rngs(1)))))(stack)

    return jax.tree.leaves(grad(stack))


# --- the stack for NNX ---------------------------------------------------------------


@pytest.mark.full
def test_a_stack_in_parts_has_the_gradients_of_store():
    assert_grads_close(gradient(make(**ALL), X), gradient(make(**ALL, backprop="store"), X), F32)


@pytest.mark.full
def test_without_dropout_parts_change_rounding_only():
    still = partial(block, dropout_rate=0.0)
    mask = jnp.tril(jnp.ones((1, 1, 6, 6), bool))
    whole, parts = (make(still, **options) for options in ({}, ALL))
    assert_grads_close(gradient(parts, X, mask), gradient(whole, X, mask), 1e-3)
    whole.eval(), parts.eval()
    assert relative_error(parts(X, mask), whole(X, mask)) < 1e-3
    assert relative_error(parts(X), whole(X, mask)) > 1e-2  # the mask reaches the parts


def test_attributes_can_be_set_later_and_inference_takes_what_divides():
    stack = make(partial(block, dropout_rate=0.0))
    stack.batch_chunks, stack.token_chunks = 4, 4
    with pytest.raises(ValueError, match="token_chunks=4 needs"):
        stack(X)
    stack.eval()
    assert stack(X).shape == X.shape  # 6 tokens in 2 parts
    assert stack(X[:3, :5]).shape == (3, 5, 16)
    chosen = choose_evaluation(stack, stack.blocks, X.shape, has_state=False, deterministic=True)
    assert chosen.branches == ("f", "g")
    assert chosen.chunks == {"batch_chunks": 4, "token_chunks": (1, 2), "per_sample": True}
    stack.batch_chunks = 0
    with pytest.raises(ValueError, match="batch_chunks is 0"):
        stack(X)


class Norm(nnx.Module):
    branches = ("f", "g")
    per_token = ("g",)

    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(16, rngs=rngs)

    def f(self, x):
        return self.norm(x)

    def g(self, x):
        return jnp.tanh(x)

    def __call__(self, x):
        f = self.f(x)
        return f + self.g(x + f)


@pytest.mark.parametrize("options", [{"by_branch": True}, {"batch_chunks": 2}])
def test_a_block_with_state_is_refused_in_training_and_whole_at_inference(options):
    stack = make(Norm, **options)
    with pytest.raises(ValueError, match=r"state \(norm.mean, norm.var\)"):
        stack(X)
    stack.eval()
    whole = make(Norm)
    whole.eval()
    assert_same_bits(stack(X), whole(X))


class Silent(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(16, 16, rngs=rngs)

    def __call__(self, x):
        return self.dense(x)


class OneBranch(Silent):
    branches = ("__call__",)


def test_what_a_block_does_not_say_is_named():
    with pytest.raises(ValueError, match="Silent does not say what its branches are"):
        make(Silent, by_branch=True)(X)
    with pytest.raises(ValueError, match="token_chunks is 2, but OneBranch names no branch"):
        make(OneBranch, token_chunks=2)(X)
    assert make(Silent, batch_chunks=2)(X).shape == X.shape


class OneString(Silent):
    branches = "__call__"


class Misspelt(Silent):
    branches = ("__call__",)
    per_token = ("call",)


def test_misspelt_names_are_found():
    with pytest.raises(ValueError, match=r"OneString\.branches is '__call__', expected a tuple"):
        make(OneString, by_branch=True)(X)
    with pytest.raises(ValueError, match=r"Misspelt\.per_token names 'call'"):
        make(Misspelt, token_chunks=2)(X)


class SharedDropout(nnx.Module):
    """Both branches draw from one stream; h is the sum of their masks."""

    branches = ("f", "f_again")

    def __init__(self, rngs):
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.scale = nnx.Param(jnp.ones(()))

    def f(self, x):
        return self.dropout(jnp.ones_like(x)) * self.scale[...]

    f_again = f


def test_branches_that_share_a_stream_draw_differently():
    stack = make(SharedDropout, by_branch=True, magnitude=0.0)
    h = stack(jnp.zeros_like(X))  # 3 blocks of two masks of 0 or 2: of equal ones, no odd pair
    assert np.mean(h % 4 == 2) > 0.3


class WithAux(nnx.Module):
    branches = ("f", "g")

    def __init__(self, rngs):
        self.scale = nnx.Param(jnp.ones(()))

    def f(self, x):
        return self.scale[...] * jnp.tanh(x), jnp.sum(x)

    def g(self, x):
        return jnp.sin(x), None


def test_aux_comes_by_branch():
    _, aux = make(WithAux, by_branch=True, has_aux=True)(X)
    assert aux[0].shape == (3,) and aux[1] is None


def test_nothing_asked_for_is_the_whole_block():
    options = {"has_state": True, "deterministic": False}
    assert choose_evaluation(make(), object(), X.shape, **options) is WHOLE


# --- a block that contradicts itself -------------------------------------------------


class Derived(bdia_jax.nnx.BranchedBlock):
    branches = ("f", "g")

    def __init__(self, rngs):
        self.dense = nnx.Linear(16, 16, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def f(self, x):
        return self.dense(x)

    def g(self, x):
        return self.dropout(jnp.tanh(x))


class Written(Derived):
    def __call__(self, x):
        f = self.f(x)
        return f + self.g(x + f)


class Contradictory(Derived):
    def __call__(self, x):
        return self.f(x) + self.g(x)


@pytest.mark.claim("a block that contradicts itself is told")
@pytest.mark.parametrize("by_branch", [False, True])
def test_a_call_that_is_not_the_sum_of_its_branches_is_told_by_audit(by_branch):
    stack = make(Contradictory, by_branch=by_branch)
    with pytest.raises(ValueError, match=r"Contradictory contradicts itself.* in block 0") as error:
        stack.audit(X)
    assert "BranchedBlock" in str(error.value)


@pytest.mark.control("a block that contradicts itself is told")
def test_a_call_that_is_the_sum_passes_dropout_or_not():
    assert make(Written).audit(X).exact
    stacks = [make(cls) for cls in (Derived, Written)]
    for stack in stacks:
        stack.eval()
    assert_same_bits(*(stack(X) for stack in stacks))


# --- Linen ---------------------------------------------------------------------------


class LinenBlock(bdia_jax.linen.BranchedBlock):
    branches = ("f", "g")
    per_token = ("g",)

    def setup(self):
        self.first, self.second = linen.Dense(16), linen.Dense(16)
        self.dropout = linen.Dropout(0.3)

    def f(self, x, deterministic):
        return linen.tanh(self.first(x)) + x.mean(1, keepdims=True)

    def g(self, x, deterministic):
        return self.dropout(linen.tanh(self.second(x)), deterministic=deterministic)


class LinenShared(linen.Module):
    branches = ("f", "f_again")

    def setup(self):
        self.dropout = linen.Dropout(0.5)
        self.scale = self.param("scale", linen.initializers.ones, ())

    def f(self, x, deterministic):
        return self.dropout(jnp.ones_like(x), deterministic=deterministic) * self.scale

    def f_again(self, x, deterministic):
        return self.f(x, deterministic)

    def __call__(self, x, deterministic):
        return self.f(x, deterministic)


def test_linen_branches_that_share_a_stream_draw_differently():
    stack = bdia_jax.linen.BDIAStack(LinenShared(), 3, by_branch=True, magnitude=0.0)
    variables = stack.init(jax.random.key(0), X, deterministic=True)
    rngs = {"dropout": jax.random.key(2)}
    h = stack.apply(variables, jnp.zeros_like(X), deterministic=False, rngs=rngs)
    assert np.mean(h % 4 == 2) > 0.3


@pytest.mark.full
@pytest.mark.parametrize("make_key", [jax.random.key, jax.random.PRNGKey])
def test_linen_in_parts(make_key):
    stacks = {
        name: bdia_jax.linen.BDIAStack(LinenBlock(), 3, **options)
        for name, options in {
            "parts": ALL,
            "store": ALL | {"backprop": "store"},
            "whole": {},
        }.items()
    }
    variables = stacks["parts"].init(make_key(0), X, deterministic=True)
    rngs = {"gamma": make_key(1), "dropout": make_key(2)}

    def run(name, **options):
        def loss(variables):
            y = stacks[name].apply(variables, X, **options)
            return jnp.sum(jnp.sin(y)), y

        return jax.jit(jax.grad(loss, has_aux=True))(variables)

    grads, y = run("parts", deterministic=False, rngs=rngs)
    expected, stored = run("store", deterministic=False, rngs=rngs)
    assert_same_bits(y, stored)
    assert_grads_close(grads, expected, F32)
    evaluated = [stacks[name].apply(variables, X, deterministic=True) for name in stacks]
    assert relative_error(evaluated[0], evaluated[2]) < 1e-3


@pytest.mark.full
def test_a_linen_block_that_contradicts_itself_is_told_and_another_is_not():
    class Contradictory(LinenBlock):
        def __call__(self, x, deterministic):
            return self.f(x, deterministic) + self.g(x, deterministic)

    class Written(LinenBlock):
        def __call__(self, x, deterministic):
            f = self.f(x, deterministic)
            return f + self.g(x + f, deterministic)

    rngs = {"gamma": jax.random.key(1), "dropout": jax.random.key(2)}

    def audit(block):
        stack = bdia_jax.linen.BDIAStack(block, 3)
        variables = stack.init(jax.random.key(0), X, deterministic=True)
        return stack.audit(variables, X, rngs=rngs)

    assert audit(Written()).exact
    with pytest.raises(ValueError, match="Contradictory contradicts itself"):
        audit(Contradictory())


# --- the models ----------------------------------------------------------------------


@pytest.mark.full
@pytest.mark.parametrize("make_block", [PreNormBlock, DecoderBlock])
def test_the_branches_of_a_block_sum_up_to_it(make_block):
    block = make_block(16, 2, 32, rngs=nnx.Rngs(0))
    memory = (jnp.cos(X), jnp.ones((4, 1, 1, 6), bool)) if make_block is DecoderBlock else ()
    mask = jnp.tril(jnp.ones((1, 1, 6, 6), bool))
    h = jnp.zeros_like(X)
    for name in block.branches:
        h = h + getattr(block, name)(X + h, mask, *memory)
    np.testing.assert_allclose(h, block(X, mask, *memory), rtol=1e-5, atol=1e-6)
    for name in block.per_token:
        first = getattr(block, name)(X[:, :1], mask, *memory)
        np.testing.assert_allclose(
            first, getattr(block, name)(X, mask, *memory)[:, :1], rtol=1e-5, atol=1e-6
        )


@pytest.mark.full
def test_a_model_in_parts_has_the_logits_and_the_tokens_of_the_whole():
    sizes = {"width": 16, "depth": 2, "num_heads": 2, "mlp_dim": 32}
    tokens = jnp.arange(8).reshape(2, 4) % 11
    models = [
        GPT2(11, 12, **sizes, rngs=nnx.Rngs(0), stack=partial(BDIAStack, **options))
        for options in ({}, {"by_branch": True, "batch_chunks": 2, "token_chunks": 2})
    ]
    for model in models:
        model.eval()
    assert relative_error(models[1](tokens), models[0](tokens)) < 1e-3
    # with a cache, which is state, blocks are evaluated whole
    out = [generate(model, tokens, 5, key=jax.random.key(0)) for model in models]
    np.testing.assert_array_equal(*out)


@pytest.mark.full
def test_the_translation_model_in_parts():
    source = jnp.array([[3, 4, 5, 0], [6, 7, 0, 0]])
    target = jnp.array([[1, 3, 4, 6], [1, 5, 2, 0]])

    def grads(backprop="reversible", **options):
        model = Transformer(
            *(11, 4),
            **{"width": 8, "encoder_depth": 2, "decoder_depth": 2, "num_heads": 2, "mlp_dim": 16},
            dropout_rate=0.0,
            stack=partial(BDIAStack, backprop=backprop, **options),
            rngs=nnx.Rngs(0),
        )

        @nnx.jit
        def grad(model):
            def loss(model):
                return jnp.mean(jnp.sin(model(source, target, rngs=nnx.Rngs(1))))

            return nnx.grad(loss)(model)

        return jax.tree.leaves(grad(model))

    parts = {"by_branch": True, "batch_chunks": 2, "token_chunks": 2}
    actual = grads(**parts)
    assert_grads_close(actual, grads("store", **parts), F32)
    assert_grads_close(actual, grads(), 2e-2)  # a quantum more or less is much in this tiny model
