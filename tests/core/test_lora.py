"""LoRA: the function before, with and after adapters; reversible stacks; what gets gradients."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from toy import assert_grads_close, assert_same_bits, keep_mask, relative_error
from toy_models import F32, PLAIN, TOKENS, at_inference, filled, small

from bdia_jax import lora
from bdia_jax.lora import LoRALinear
from bdia_jax.nnx import BDIAStack, BranchedBlock

pytestmark = [pytest.mark.full, pytest.mark.usefixtures("quick_compile")]


def add(model, trained=True, **options):
    """Adapters of rank 2; trained: with a B as large as A."""
    options = {"rank": 2, "alpha": 3.0, "rngs": nnx.Rngs(5)} | options
    lora.add(model, lora.query_and_value(model), **options)
    if trained:
        train(model)
    return model


def train(module):
    generator = np.random.default_rng(1)
    for _, linear in nnx.iter_modules(module):
        if isinstance(linear, LoRALinear):
            b = generator.normal(0, 0.3, linear.lora_b.shape)
            linear.lora_b[...] = jnp.asarray(b, jnp.float32)


# --- the function --------------------------------------------------------------------


@pytest.mark.claim("adapters leave the function and merge into it")
@pytest.mark.control("adapters leave the function and merge into it")
def test_adding_leaves_the_function_and_merging_gives_the_plain_model_back():
    model = small("llama", PLAIN, head_dim=6)
    before = at_inference(model, TOKENS)
    graphdef, params = nnx.graphdef(model), jax.tree.map(jnp.copy, nnx.state(model, nnx.Param))
    add(model, trained=False)
    assert_same_bits(at_inference(model, TOKENS), before)
    train(model)
    adapted = at_inference(model, TOKENS)
    assert relative_error(adapted, before) > 1e-2
    lora.merge(model)
    assert nnx.graphdef(model) == graphdef  # parameters, their paths, and modules' types
    assert relative_error(at_inference(model, TOKENS), adapted) < F32
    states = map(nnx.to_flat_state, (params, nnx.state(model, nnx.Param)))
    for (path, old), (_, new) in zip(*states, strict=True):
        changed = bool(jnp.any(old[...] != new[...]))
        assert changed == (path[-2:] in {("query", "kernel"), ("value", "kernel")}), path


@pytest.mark.parametrize("lead", [(), (3,)])
def test_an_adapted_layer_is_that_of_w_plus_scaled_a_b(lead):
    make = lambda rngs: nnx.Linear(7, 15, rngs=rngs)  # noqa: E731
    linear = filled(lambda: nnx.vmap(make)(nnx.Rngs(0).split(3)) if lead else make(nnx.Rngs(0)))
    plain = np.asarray(linear.kernel[...], np.float64)
    lora.add(linear, ("",), rank=2, alpha=3.0, rngs=nnx.Rngs(1))
    train(linear)
    a, b = (np.asarray(each[...], np.float64) for each in (linear.lora_a, linear.lora_b))
    expected = plain + 3.0 / 2 * (a @ b)
    x = np.random.default_rng(2).normal(size=(*lead, 5, 7)).astype(np.float32)
    call = jax.vmap(lambda linear, x: linear(x)) if lead else lambda linear, x: linear(x)
    bias = np.asarray(linear.bias[...])[..., None, :]
    assert relative_error(call(linear, x), x @ expected + bias) < F32
    assert relative_error(call(linear, x), x @ plain + bias) > 0.1
    lora.merge(linear)
    assert type(linear) is nnx.Linear
    np.testing.assert_allclose(linear.kernel[...], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": jnp.bfloat16},
        {"dtype": jnp.bfloat16, "preferred_element_type": jnp.float32},
        {},
        {"param_dtype": jnp.bfloat16},
    ],
)
def test_types_of_results_are_those_without_adapter(options):
    x = jnp.ones((2, 4), jnp.bfloat16)
    linear = nnx.Linear(4, 6, rngs=nnx.Rngs(0), **options)
    before, kernel = linear(x), linear.kernel[...]
    lora.add(linear, ("",), rank=2, alpha=3.0, rngs=nnx.Rngs(1))
    assert_same_bits(linear(x), before)
    train(linear)
    assert linear(x).dtype == before.dtype and np.any(linear(x) != before)
    lora.merge(linear)
    assert linear.kernel.dtype == kernel.dtype and np.any(linear.kernel[...] != kernel)


@pytest.mark.parametrize(
    ("name", "stacks"),
    [("llama", ("stack",)), ("vit", ("stack",)), ("transformer", ("encoder", "decoder"))],
)
def test_queries_and_values_of_self_attention_are_the_targets(name, stacks):
    model = nnx.eval_shape(lambda: small(name))
    assert set(lora.query_and_value(model)) == {
        rf"^{stack}\.blocks\.attention\.{name}$" for stack in stacks for name in ("query", "value")
    }
    model = nnx.eval_shape(lambda: add(nnx.merge(*nnx.split(model)), trained=False))
    attention = getattr(model, stacks[-1]).blocks.attention
    for name, cls in (("query", LoRALinear), ("key", nnx.Linear), ("value", LoRALinear)):
        assert type(getattr(attention, name)) is cls


# --- under BDIA ----------------------------------------------------------------------


class Block(BranchedBlock):
    """Two branches with all an adapter has to do with, and little to compile."""

    branches, per_token = ("f", "g"), ("g",)

    def __init__(self, rngs, dtype, width):
        self.query = nnx.Linear(width, width, dtype=dtype, rngs=rngs)
        self.key = nnx.Linear(width, width, dtype=dtype, rngs=rngs)
        self.value = nnx.Linear(width, width, dtype=dtype, rngs=rngs)
        self.out = nnx.Linear(
            width, width, dtype=dtype, preferred_element_type=jnp.float32, rngs=rngs
        )

    def f(self, x):
        q, k, v = self.query(x), self.key(x), self.value(x)
        return (jnp.tanh(q) * jnp.mean(k, axis=1, keepdims=True) + v).astype(jnp.float32)

    def g(self, x):
        return jnp.tanh(self.out(x))


def make_stack(dtype, width=8, depth=5, **options):
    make_block = partial(Block, dtype=dtype, width=width)
    return BDIAStack(make_block, depth, rngs=nnx.Rngs(0), **options)


X = jnp.asarray(2 * np.random.default_rng(3).normal(size=(4, 6, 8)), jnp.float32)


def adapted_stack(dtype, **options):
    """With dropout in the adapters: other masks in the backward pass rebuild other states."""
    return add(filled(lambda: make_stack(dtype, **options)), dropout_rate=0.5)


@pytest.fixture
def quick_masks(monkeypatch):
    def bernoulli(key, *, p, shape, out_sharding):
        del out_sharding
        return keep_mask(key, p, shape)

    monkeypatch.setattr("jax.random.bernoulli", bernoulli)


IN_PARTS = {"by_branch": True, "token_chunks": 2, "batch_chunks": 2}


@pytest.mark.claim("rebuild is exact")
def test_the_rebuild_with_adapters_is_exact(quick_masks, optimized):
    report = adapted_stack(jnp.bfloat16, **IN_PARTS).audit(X, rngs=nnx.Rngs(7))
    assert report.exact and len(report.mismatches) == 4, report


def gradient(seed=7, **options):
    stack = adapted_stack(jnp.float32, **IN_PARTS, **options)
    graphdef, adapters, rest = nnx.split(stack, nnx.LoRAParam, ...)

    @jax.jit
    @jax.grad
    def of_adapters(adapters, key):
        stack = nnx.merge(graphdef, adapters, rest)
        return jnp.mean(jnp.sin(stack(X, rngs=nnx.Rngs(key))))

    return jax.tree.leaves(of_adapters(adapters, jax.random.key(seed)))


@pytest.mark.claim("gradients equal store's")
@pytest.mark.control("gradients equal store's")
def test_reversible_gradients_of_adapters_equal_stored_ones(quick_masks):
    expected = gradient(backprop="store")
    assert len(expected) == 4
    assert_grads_close(gradient(), expected, F32)
    with pytest.raises(AssertionError, match="relative error"):  # masks matter
        assert_grads_close(gradient(seed=8), expected, 0.05)


@pytest.mark.claim("frozen blocks cost no gradient")
@pytest.mark.control("frozen blocks cost no gradient")
def test_frozen_blocks_cost_no_gradient(optimized):
    """Bytes of what the compiled gradient holds, beside those of full fine-tuning."""
    make = lambda: add(make_stack(jnp.float32, width=64, depth=16), trained=False)  # noqa: E731
    model = nnx.eval_shape(make)

    def plan(trained):
        graphdef, params, rest = nnx.split(model, trained, ...)

        def loss(params, rest, x):
            return jnp.sum(nnx.merge(graphdef, params, rest)(x, rngs=nnx.Rngs(0)))

        compiled = jax.jit(jax.grad(loss)).lower(params, rest, jnp.ones((2, 3, 64))).compile()
        memory = compiled.memory_analysis()
        return memory.output_size_in_bytes + memory.temp_size_in_bytes

    block_bytes = 16 * 4 * (64 * 64 * 4 + 4 * 64)
    assert plan(nnx.Param) > block_bytes
    assert plan(nnx.LoRAParam) < 0.3 * block_bytes


# --- what is refused -----------------------------------------------------------------


class OwnLinear(nnx.Linear):
    pass


def test_targets_that_do_not_fit_are_refused():
    model = small("gpt2")
    options = {"alpha": 1.0, "rngs": nnx.Rngs(0)}
    graphdef = nnx.graphdef(model)
    for targets, rank, message in (
        (("query",), 0, "rank is 0, expected at least 1"),
        (("query", "qkv"), 2, r"fits the target 'qkv'; there are stack\.blocks\."),
    ):
        with pytest.raises(ValueError, match=message):
            lora.add(model, targets, rank=rank, **options)
    assert nnx.graphdef(model) == graphdef  # nothing was added on the way
    add(model, trained=False)
    with pytest.raises(ValueError, match=r"attention\.query has adapters already; merge the model"):
        add(model)
    with pytest.raises(ValueError, match="OwnLinear has no linear layers query and value"):
        lora.query_and_value(OwnLinear(2, 2, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="no linear layer fits"):  # it has its own __call__
        lora.add(OwnLinear(2, 2, rngs=nnx.Rngs(0)), ("",), rank=1, **options)
