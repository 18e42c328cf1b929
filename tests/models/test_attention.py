"""Which attention is chosen, and what is lowered for a GPU. None is needed: nothing is compiled."""

import re
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from bdia_jax.models import attention
from bdia_jax.models.attention import (
    Attention,
    CrossAttention,
    attend,
    choose_implementation,
)
from bdia_jax.models.blocks import PreNormBlock
from bdia_jax.models.cache import Cache
from bdia_jax.models.linformer import LinformerAttention
from bdia_jax.models.rope import RotaryAttention
from bdia_jax.nnx import BDIAStack

TOKENS, WIDTH, HEADS = 24, 64, 2
X = jax.ShapeDtypeStruct((2, TOKENS, WIDTH), jnp.float32)
FORWARD, BACKWARD = "__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"


def gpu(version):
    return SimpleNamespace(platform="gpu", compute_capability=version)


AMPERE, HOPPER = gpu("8.0"), gpu("9.0")


@pytest.fixture
def on_cuda(monkeypatch):
    """As if cuDNN and an Ampere GPU were here, as far as tracing and lowering can tell."""
    monkeypatch.setattr(attention, "default_device", lambda: AMPERE)
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91800)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda needed: needed <= "8.0")
    monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda _: False)
    jax.clear_caches()  # what was traced for other devices
    yield
    jax.clear_caches()


def lowered(fn, *args):
    """StableHLO for CUDA."""
    return jax.jit(fn).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def cudnn_calls(text):
    return re.findall(r"__cudnn\$\w+", text)


# --- the choice ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "device, dtype, head_dim, expected",
    [
        (AMPERE, "bfloat16", 64, "cudnn"),
        (AMPERE, "float16", 8, "cudnn"),
        (AMPERE, "bfloat16", 128, "cudnn"),
        (AMPERE, "bfloat16", 136, "xla"),
        (HOPPER, "bfloat16", 256, "cudnn"),
        (HOPPER, "bfloat16", 264, "xla"),
        (gpu("10.0"), "bfloat16", 256, "cudnn"),
        (AMPERE, "bfloat16", 12, "xla"),
        (AMPERE, "float32", 64, "xla"),
        (gpu("7.5"), "float16", 64, "xla"),
        (gpu("gfx90a"), "bfloat16", 64, "xla"),
        (SimpleNamespace(platform="cpu"), "bfloat16", 64, "xla"),
        (SimpleNamespace(platform="tpu"), "bfloat16", 64, "xla"),
    ],
)
def test_cudnn_is_chosen_where_it_can_run(device, dtype, head_dim, expected):
    q = jax.ShapeDtypeStruct((2, 7, 3, head_dim), dtype)
    assert choose_implementation(q, None, device) == expected
    assert choose_implementation(q, jnp.ones((1, 1, 7, 7), bool), device) == "xla"


LINFORMER = partial(LinformerAttention, num_tokens=TOKENS, projected=8)


@pytest.mark.parametrize("make", [Attention, CrossAttention, LINFORMER, RotaryAttention, attend])
def test_an_unknown_implementation_is_refused(make):
    q = jnp.zeros((1, 2, 1, 8))
    arguments = (q, q, q) if make is attend else (WIDTH, HEADS)
    options = {} if make is attend else {"rngs": nnx.Rngs(0)}
    with pytest.raises(ValueError, match=r"implementation is 'flash', expected 'xla', 'cudnn'"):
        make(*arguments, implementation="flash", **options)


# --- what is lowered -------------------------------------------------------------------


def lowered_gradient(backprop, **options):
    make_attention = partial(options.pop("make", partial(Attention, is_causal=True)), **options)

    def make_block(rngs):
        options = {"dropout_rate": 0.1, "dtype": jnp.bfloat16, "attention": make_attention}
        return PreNormBlock(WIDTH, HEADS, 32, **options, rngs=rngs)

    def make():
        return BDIAStack(make_block, 3, rngs=nnx.Rngs(0), backprop=backprop)

    graphdef, params, rest = nnx.split(nnx.eval_shape(make), nnx.Param, ...)

    def loss(params, rest, x):
        return jnp.mean(nnx.merge(graphdef, params, rest)(x, rngs=nnx.Rngs(1)) ** 2)

    return lowered(jax.grad(loss), params, rest, X)


SHARED_HEADS = {"make": RotaryAttention, "num_kv_heads": 1}
TWICE = [FORWARD, FORWARD, BACKWARD]


@pytest.mark.parametrize(
    "backprop, options, calls",
    [
        ("reversible", {}, TWICE),
        ("store", {}, [FORWARD, BACKWARD]),
        ("reversible", {"implementation": "xla"}, []),
        ("reversible", SHARED_HEADS, TWICE),
        ("reversible", SHARED_HEADS | {"sliding_window": TOKENS}, TWICE),
        ("reversible", SHARED_HEADS | {"sliding_window": TOKENS - 1}, []),
    ],
)
def test_cudnn_writes_no_weights_and_xla_does(on_cuda, backprop, options, calls):
    text = lowered_gradient(backprop, **options)
    assert cudnn_calls(text) == calls
    assert (f"x{TOKENS}x{TOKENS}x" in text) == (not calls)


def test_without_a_gpu_nothing_is_cudnn():
    assert not cudnn_calls(lowered_gradient("reversible"))


@pytest.mark.claim("flash attention is one kernel in both passes")
def test_a_reversible_stack_runs_one_cudnn_kernel_in_both_passes(on_cuda):
    forward, rebuild = (
        # from the name to the result types, without the names of values
        re.sub(r"%\S+", "%", line[line.index(FORWARD) :])
        for line in lowered_gradient("reversible").splitlines()
        if FORWARD in line and BACKWARD not in line
    )
    assert forward == rebuild
    assert f"tensor<2x{HEADS}x{TOKENS}xf32>" in forward  # the kernel of training


@pytest.mark.control("flash attention is one kernel in both passes")
def test_control_alone_jax_runs_another_kernel_in_the_forward_pass(on_cuda):
    q = jax.ShapeDtypeStruct((2, TOKENS, HEADS, 32), jnp.bfloat16)
    plain = partial(jax.nn.dot_product_attention, implementation="cudnn")
    statistics = f"tensor<2x{HEADS}x{TOKENS}xf32>"
    assert statistics not in lowered(plain, q, q, q)
    assert statistics in lowered(attend, q, q, q)


def lowered_module(make, *inputs):
    graphdef, state = nnx.split(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))
    return lowered(lambda state, *inputs: nnx.merge(graphdef, state)(*inputs), state, *inputs)


BF16 = {"width": WIDTH, "num_heads": HEADS, "dtype": jnp.bfloat16}


def test_other_attentions_choose_too(on_cuda):
    memory = jax.ShapeDtypeStruct((2, 5, WIDTH), jnp.float32)
    assert cudnn_calls(lowered_module(partial(CrossAttention, **BF16), X, memory)) == [FORWARD]
    linear = partial(LINFORMER, **BF16)
    assert cudnn_calls(lowered_module(linear, X)) == [FORWARD]
    assert not cudnn_calls(lowered_module(partial(linear, dtype=jnp.float32), X))


def test_a_mask_is_for_xla_unless_cudnn_is_forced(on_cuda):
    mask = jax.ShapeDtypeStruct((2, 1, 1, TOKENS), bool)
    assert not cudnn_calls(lowered_module(partial(Attention, **BF16), X, mask))
    forced = lowered_module(partial(Attention, implementation="cudnn", **BF16), X, mask)
    assert cudnn_calls(forced) == ["__cudnn$fmhaScaleBiasSoftmax"]


@pytest.mark.parametrize(
    "shape, expected",
    [
        ((TOKENS, 5), (1, 1)),
        ((1, 5), (1, 1)),
        ((5,), (1, 1)),
        ((HEADS, 1, 5), (1, HEADS)),
        ((3, 1, 1, 5), (3, 1)),
        ((3, HEADS, TOKENS, 5), (3, HEADS)),
    ],
)
def test_a_mask_of_any_rank_is_broadcast(on_cuda, shape, expected):
    q, k = (jax.ShapeDtypeStruct((3, t, HEADS, 32), jnp.bfloat16) for t in (TOKENS, 5))
    mask = jnp.asarray(np.random.default_rng(0).random(shape) < 0.7)
    text = lowered(partial(attend, implementation="cudnn"), q, k, k, mask)
    (call,) = (line for line in text.splitlines() if "__cudnn$fmha" in line)
    biases = re.findall(rf"tensor<(\d+)x(\d+)x{TOKENS}x6xbf16>", call)
    assert biases == [tuple(map(str, expected))]


ODD: Any = [((5, 5), {"is_causal": True}), ((7, 4), {"mask": True})]


@pytest.mark.full
@pytest.mark.claim("cuDNN takes odd lengths")
@pytest.mark.parametrize("lengths, options", ODD)
def test_an_odd_length_gets_a_token_that_nothing_sees(on_cuda, monkeypatch, lengths, options):
    generator = np.random.default_rng(0)
    q, k = (jnp.asarray(generator.normal(size=(2, t, 3, 8)), jnp.bfloat16) for t in lengths)
    if "mask" in options:
        options = {"mask": jnp.asarray(generator.random(lengths) < 0.7).at[:, 0].set(True)}

    def gradients(implementation):
        def loss(q, k):
            attended = attend(q, k, jnp.cos(k), implementation=implementation, **options)
            return jnp.sum(jnp.sin(attended.astype(jnp.float32)))

        return jax.grad(loss, argnums=(0, 1))

    assert "__cudnn$fmha" in lowered(gradients("cudnn"), q, k)  # jax alone refuses the gradient
    run = jax.nn.dot_product_attention
    monkeypatch.setattr(
        attention.jax.nn,
        "dot_product_attention",
        lambda *args, **kwargs: run(*args, **kwargs | {"implementation": "xla"}),
    )
    for padded, whole in zip(gradients("cudnn")(q, k), gradients("xla")(q, k), strict=True):
        np.testing.assert_allclose(*(x.astype(jnp.float32) for x in (padded, whole)), atol=0.02)


@pytest.mark.full
@pytest.mark.control("cuDNN takes odd lengths")
def test_control_jax_has_no_gradient_for_odd_lengths(on_cuda):
    q = jax.ShapeDtypeStruct((2, 5, 3, 8), jnp.bfloat16)
    run = partial(jax.nn.dot_product_attention, implementation="cudnn")
    with pytest.raises(NotImplementedError, match="sequence length"):
        lowered(jax.grad(lambda q: jnp.sum(run(q, q, q).astype(jnp.float32))), q)


def test_a_mask_of_too_many_axes_is_refused(on_cuda):
    q = jax.ShapeDtypeStruct((3, TOKENS, HEADS, 32), jnp.bfloat16)
    mask = jnp.ones((1, 3, 1, 1, TOKENS), bool)
    for implementation in ("xla", "cudnn"):
        with pytest.raises(ValueError):
            lowered(partial(attend, implementation=implementation), q, q, q, mask)


@pytest.mark.parametrize("implementation", [None, "cudnn"])
def test_decoding_with_a_cache_is_for_xla(on_cuda, implementation):
    def decode(x):
        make = partial(Attention, is_causal=True, implementation=implementation, **BF16)
        stacked = nnx.vmap(lambda rngs: make(rngs=rngs))(nnx.Rngs(0).split(1))
        cache = Cache(stacked, 2, TOKENS)
        one = make(rngs=nnx.Rngs(0))
        one.cache = nnx.merge(nnx.graphdef(cache), jax.tree.map(lambda a: a[0], nnx.state(cache)))
        return one(x)

    text = lowered(decode, jax.ShapeDtypeStruct((2, 1, WIDTH), jnp.float32))
    assert not cudnn_calls(text)
