"""Which residual blocks qualify: the answer of each row of docs/qualify.md, tested."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from toy import GRAD_TOLERANCE, assert_grads_close, assert_same_bits, relative_error

import bdia_jax as bdia
from bdia_jax.models.attention import Attention
from bdia_jax.models.cache import Cache
from bdia_jax.nnx import BDIAStack

pytestmark = pytest.mark.usefixtures("quick_compile")

F32 = GRAD_TOLERANCE[jnp.dtype(jnp.float32)]
X = jax.random.normal(jax.random.key(3), (4, 6, 8))
DEPTH = 4


class Layer(nnx.Module):
    """Two branches and two norms, put together by a subclass."""

    def __init__(self, rngs):
        self.up, self.down = nnx.Linear(8, 8, rngs=rngs), nnx.Linear(8, 8, rngs=rngs)
        self.norm1, self.norm2 = nnx.LayerNorm(8, rngs=rngs), nnx.LayerNorm(8, rngs=rngs)

    def f(self, x):
        return jnp.tanh(self.up(jnp.roll(x, 1, axis=1) + x))

    def g(self, x):
        return jnp.sin(self.down(x))


def block_of(call, init=None):
    """A block class with this `__call__`; `init(self, rngs)` adds to it."""

    class Block(Layer):
        def __init__(self, rngs):
            super().__init__(rngs)
            if init is not None:
                init(self, rngs)

        def __call__(self, x, *consts):
            return call(self, x, *consts)

    return Block


def make(call, init=None, **options):
    return BDIAStack(block_of(call, init), DEPTH, rngs=nnx.Rngs(0), **options)


def gradients(model, backprop, run):
    """Of sum(sin(run(model, x))) by parameters and x; and the model after that step."""
    model = nnx.clone(model)
    for _, module in nnx.iter_modules(model):
        if isinstance(module, BDIAStack):
            module.backprop = backprop

    @nnx.jit
    def grad(model, x):
        params = nnx.DiffState(0, nnx.Param)
        return nnx.grad(lambda m, x: jnp.sum(jnp.sin(run(m, x))), argnums=(params, 1))(model, x)

    return grad(model, X), model


def assert_qualifies(stack, *consts):
    """Every bit is rebuilt, and the gradients are those of plain backpropagation."""
    audit = stack.audit(X, *consts)
    assert audit.exact and audit.mismatches.sum() == 0, audit
    return assert_same_gradients(stack, lambda s, x: first(s(x, *consts, rngs=nnx.Rngs(1))))


def assert_same_gradients(model, run):
    expected, stored = gradients(model, "store", run)
    actual, after = gradients(model, "reversible", run)
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    used = [(a, e) for a, e in pairs if np.any(a) or np.any(e)]  # some layers use half of Layer
    assert_grads_close(*zip(*used, strict=True), F32)
    return after, stored


@pytest.fixture
def optimized():
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


def first(out):
    return out[0] if isinstance(out, tuple) else out


def layer_of(stack, k):
    graphdef, state = nnx.split(stack.blocks)
    return nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[k], state))


# --- what a layer may compute: h is its output less its input ---------------------------


def pre_norm(m, x):
    x = x + m.f(m.norm1(x))
    return x + m.g(m.norm2(x))


def post_norm(m, x):
    y = m.norm1(x + m.f(x))
    return m.norm2(y + m.g(y))


def parallel(m, x):
    y = m.norm1(x)
    return x + m.f(y) + m.g(y)


def layer_scale(m, x):
    return x + 0.1 * m.norm1.scale[...] * m.f(m.norm2(x))


def checkpointed_pair(m, x):
    x = nnx.remat(lambda m, x: x + m.f(m.norm1(x)))(m, x)
    return x + jnp.cumsum(m.g(m.norm2(x)), axis=1) / 6  # a layer of another kind


LAYERS = [pre_norm, post_norm, parallel, layer_scale, checkpointed_pair]


@pytest.mark.full
@pytest.mark.parametrize(
    "layer",
    [post_norm, *(pytest.param(it, marks=pytest.mark.full) for it in LAYERS if it != post_norm)],
)
def test_a_layer_that_adds_to_x_itself(layer):
    stack = make(lambda m, x: layer(m, x) - x)
    assert_qualifies(stack)
    stack.eval()
    stack.fixed_point, stack.backprop = None, "store"
    y, plain = stack(X), X
    for k in range(DEPTH):
        plain = layer(layer_of(stack, k), plain)
    assert relative_error(y, plain) < 1e-5
    if layer is post_norm:  # with its output in place of h it is another network
        wrong = make(layer, fixed_point=None, backprop="store")
        wrong.eval()
        assert relative_error(wrong(X), plain) > 0.1


def test_parallel_branches_are_not_those_of_by_branch():
    stack = make(lambda m, x: parallel(m, x) - x, by_branch=True)
    with pytest.raises(ValueError, match=r"does not say what its branches are"):
        stack(X)


# --- stochastic depth -------------------------------------------------------------------


@pytest.mark.full
def test_stochastic_depth_by_dropout_of_whole_samples():
    def init(m, rngs):
        m.drop = nnx.Dropout(0.5, broadcast_dims=(1, 2), rngs=rngs)

    def dropped(m, x):
        h = m.drop(m.f(x))
        return h, jnp.all(h == 0, axis=(1, 2))

    stack = make(dropped, init, has_aux=True)
    assert stack.audit(X).exact
    missing = stack(X.repeat(16, axis=0))[1]
    assert missing.shape == (DEPTH, 64) and 0.3 < missing.mean() < 0.7
    assert np.any(missing[0] != missing[1])


@pytest.mark.full
def test_stochastic_depth_with_a_rate_for_each_block():
    def init(m, rngs):
        m.rate, m.stream = nnx.Variable(jnp.zeros(())), rngs.dropout.fork()

    def call(m, x):
        keep = jax.random.bernoulli(m.stream(), 1 - m.rate[...], (len(x), 1, 1))
        return jnp.where(keep, m.f(x) / (1 - m.rate[...]), 0.0), keep

    stack = make(call, init, has_aux=True)
    stack.blocks.rate[...] = jnp.linspace(0.0, 0.75, DEPTH)
    after, _ = assert_qualifies(stack)
    assert_same_bits(after.blocks.rate[...], stack.blocks.rate[...])
    stack.batch_chunks = 2
    with pytest.raises(ValueError, match="every chunk would have its own"):
        stack(X)
    stack.batch_chunks = 1
    kept = stack(X.repeat(64, axis=0))[1].mean(axis=(1, 2, 3))
    np.testing.assert_allclose(kept, [1, 0.75, 0.5, 0.25], atol=0.12)


def test_make_block_is_called_once_so_a_counter_in_python_does_not_differ():
    calls = []
    make(pre_norm, lambda m, rngs: calls.append(m))
    assert len(calls) == 1


# --- state ------------------------------------------------------------------------------


@pytest.mark.full
def test_spectral_norm_is_updated_once_a_call():
    def init(m, rngs):
        m.linear = nnx.SpectralNorm(nnx.Linear(8, 8, rngs=rngs), rngs=rngs)

    stack = make(lambda m, x: m.linear(x), init)
    after, stored = assert_same_gradients(stack, lambda s, x: s(x, rngs=nnx.Rngs(1)))
    assert_same_state(after, stored, stack)


@pytest.mark.full
def test_memory_of_the_last_call_gets_no_gradient():
    def init(m, rngs):
        m.memory = nnx.Cache(jnp.zeros(X.shape))

    def call(m, x):
        h = m.f(x) + m.g(m.memory[...])
        m.memory[...] = x
        return h

    stack = make(call, init)
    stack(X)
    after, stored = assert_qualifies(stack)
    assert_same_state(after, stored, stack)
    first_input = jnp.round(X * 2**9) / 2**9
    assert_same_bits(after.blocks.memory[...][0], first_input)


def assert_same_state(actual, expected, before):
    states = [
        nnx.state(s.blocks, nnx.Not(nnx.Any(nnx.Param, nnx.RngState)))
        for s in (actual, expected, before)
    ]
    leaves = [jax.tree.leaves(state) for state in states]
    for a, e, b in zip(*leaves, strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-6)
        assert np.any(a != b)


@pytest.mark.full
def test_a_key_value_cache_decodes_what_the_whole_gives():
    stack = BDIAStack(
        lambda rngs: Attention(8, 2, is_causal=True, rngs=rngs), DEPTH, rngs=nnx.Rngs(0)
    )
    stack.eval()
    whole = stack(X)
    stack.blocks.cache = Cache(stack.blocks, *X.shape[:2])
    one = nnx.jit(lambda stack, x: stack(x))
    tokens = [one(stack, X[:, t : t + 1]) for t in range(X.shape[1])]
    np.testing.assert_allclose(jnp.concatenate(tokens, axis=1), whole, atol=2 * 2.0**-9)
    assert np.any(np.abs(one(stack, X[:, :1]) - whole[:, :1]) > 0.1)  # as a seventh token


# --- shapes, skips, sharing -------------------------------------------------------------


@pytest.mark.full
def test_a_block_that_changes_the_shape_is_refused_and_stacks_are_chained():
    with pytest.raises(ValueError, match=r"shape \(4, 3, 8\).* for x of shape \(4, 6, 8\).*added"):
        make(lambda m, x: m.f(x)[:, ::2])(X)

    class Model(nnx.Module):
        def __init__(self):
            self.fine, self.coarse = make(lambda m, x: m.f(x)), make(lambda m, x: m.f(x))
            self.down, self.up = (nnx.Linear(8, 8, rngs=nnx.Rngs(i)) for i in range(2))

        def __call__(self, x):
            fine = self.fine(x, rngs=nnx.Rngs(1))
            coarse = self.coarse(self.down(fine[:, ::2]), rngs=nnx.Rngs(2))
            return fine + self.up(coarse).repeat(2, axis=1)  # a long skip from stack to stack

    model = Model()
    assert model.coarse.audit(X[:, ::2]).exact
    assert_same_gradients(model, lambda m, x: m(x))


@pytest.mark.full
def test_skips_from_block_to_block_are_kept_states():
    def loss(params, skip_params, backprop):
        options = {"backprop": backprop, "has_aux": True}
        h = lambda w, x: (jnp.tanh(x @ w), x)  # noqa: E731
        x, skips = bdia.bdia_scan(h, params, X, GAMMA, **options)
        h = lambda p, x: (jnp.tanh((x + p[1]) @ p[0]), None)  # noqa: E731
        return jnp.sum(bdia.bdia_scan(h, (skip_params, skips[::-1]), x, GAMMA, **options)[0])

    GAMMA = bdia.sample_gamma(jax.random.key(1), DEPTH, len(X))
    params = jax.random.normal(jax.random.key(2), (2, DEPTH, 8, 8)) / 4
    grads = [
        jax.jit(jax.grad(partial(loss, backprop=b), (0, 1)))(*params)
        for b in ("reversible", "store")
    ]
    assert_grads_close(*grads, F32)
    held = bdia.residual_bytes(partial(loss, backprop="reversible"), *params)
    assert held["float32[4, 4, 6, 8]"] == DEPTH * X.nbytes  # one skip a block: what BDIA saves


@pytest.mark.full
def test_weights_shared_by_all_blocks_are_an_argument():
    def init(m, rngs):
        m.scale = nnx.Param(jnp.ones(()))

    class Model(nnx.Module):
        def __init__(self):
            self.shared = block_of(pre_norm)(nnx.Rngs(5))
            self.stack = make(lambda m, x, shared: m.scale[...] * shared(x), init)

        def __call__(self, x):
            return self.stack(x, self.shared, rngs=nnx.Rngs(1))

    model = Model()
    assert_same_gradients(model, lambda m, x: m(x))
    # in the core, blocks may have nothing of their own but a number
    graphdef, weights = nnx.split(model.shared)
    h = lambda _, x, weights: nnx.merge(graphdef, weights)(x)  # noqa: E731
    gamma = bdia.sample_gamma(jax.random.key(1), DEPTH, len(X))
    assert bdia.audit(h, jnp.arange(DEPTH), X, gamma, weights).exact


@pytest.mark.full
def test_cross_attention_and_masks_are_arguments():
    def call(m, x, memory, mask):
        scores = m.up(x) @ memory.swapaxes(1, 2)
        return nnx.softmax(jnp.where(mask, scores, -1e9)) @ m.down(memory)

    stack = make(call)
    mask = jnp.tril(jnp.ones((1, 6, 6), bool))
    assert stack.audit(X, jnp.cos(X), mask).exact
    # with the gradient of the memory: here it is the function of x
    assert_same_gradients(stack, lambda s, x: s(X, jnp.cos(x), mask, rngs=nnx.Rngs(1)))


# --- what is not deterministic ----------------------------------------------------------


@pytest.mark.full
@pytest.mark.claim("a block that does not qualify is found")
@pytest.mark.parametrize("source", ["numpy", "callback"])
def test_randomness_of_the_host_is_found_by_audit(source):
    generator = np.random.default_rng(0)

    def draw():
        return np.float32(generator.uniform(0.5, 1.0))

    def scale():
        if source == "numpy":
            return draw()  # once a tracing: a constant, another one in the backward pass
        return jax.pure_callback(draw, jax.ShapeDtypeStruct((), jnp.float32))

    audit = make(lambda m, x: m.f(x) * scale()).audit(X)
    assert not audit.exact and audit.mismatches.all() and audit.suggested_guard_bits is None


@pytest.mark.control("a block that does not qualify is found")
def test_a_callback_that_only_looks_is_harmless():
    seen = []
    stack = make(lambda m, x: jax.debug.callback(lambda v: seen.append(v), x[0, 0, 0]) or m.f(x))
    assert stack.audit(X).exact
    jax.effects_barrier()
    assert seen


# --- parameters that are not trained, dtypes, kinds -------------------------------------


@pytest.mark.full
def test_frozen_parameters_cost_no_gradient(optimized):
    def init(m, rngs):
        m.a, m.b = (nnx.LoRAParam(rngs.params.normal(s)) for s in ((256, 2), (2, 256)))
        m.frozen = nnx.Param(rngs.params.normal((256, 256)) / 16)

    def call(m, x):
        return jnp.tanh(x @ m.frozen[...] + x @ m.a[...] @ m.b[...])

    def grad(wrt):
        diff = nnx.DiffState(0, wrt)
        return nnx.jit(nnx.grad(lambda s, x: jnp.sum(s(x, rngs=nnx.Rngs(1)) ** 2), argnums=diff))

    stack = make(call, init)
    x = jnp.ones((2, 256))
    weights = stack.blocks.frozen[...].nbytes
    report, full = (bdia.memory_report(grad(wrt), stack, x) for wrt in (nnx.LoRAParam, nnx.Param))
    assert full.outputs - report.outputs >= weights
    assert report.temporaries < weights  # nor is it made and thrown away


@pytest.mark.full
def test_a_number_of_each_block_may_choose_what_it_does():
    def init(m, rngs):
        m.window = nnx.Variable(jnp.zeros((), jnp.int32))

    def call(m, x):
        at = jnp.arange(x.shape[1])
        near = jnp.abs(at[:, None] - at) <= m.window[...]
        return (near / near.sum(1)) @ m.f(x)

    stack = make(call, init)
    one_kind = stack(X, rngs=nnx.Rngs(1))
    stack.blocks.window[...] = jnp.asarray([1, 3, 1, 3])
    assert stack.audit(X).exact
    assert relative_error(stack(X, rngs=nnx.Rngs(1)), one_kind) > 0.1
