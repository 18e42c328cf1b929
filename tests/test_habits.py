"""The whole library under the settings that users of JAX turn on, and on their meshes."""

import contextlib
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from toy import assert_grads_close
from toy_models import SMALL, small

import bdia_jax as bdia
from bdia_jax import linen, lora, losses
from bdia_jax.models.resnet import ResNet
from bdia_jax.nnx import BDIAStack

pytestmark = pytest.mark.usefixtures("quick_compile")
full = partial(pytest.param, marks=pytest.mark.full)

K, B, T, D = 3, 8, 6, 8
GENERATOR = np.random.default_rng(0)
W, X = (jnp.asarray(GENERATOR.normal(size=shape), jnp.float32) for shape in ((K, D, D), (B, T, D)))
W = 0.3 * W
GAMMA = jnp.asarray(GENERATOR.choice([-0.5, 0.5], (K, B)), jnp.float32).at[0].set(0)
LABELS = jnp.asarray(GENERATOR.integers(D, size=(B, T)), jnp.int32)


def f(w, x, *consts):
    return jnp.tanh(x @ w) if not consts else jnp.tanh(x @ w) * consts[0]


# --- what is tried: each is a loss of (w, x, gamma, labels), or of a model alone ------------


def scan(block_fn=f, **options):
    def loss(w, x, gamma, labels):
        del labels
        return jnp.mean(bdia.bdia_scan(block_fn, w, x, gamma, **options) ** 2)

    return loss


def with_const(w, x, gamma, labels):
    del labels
    c = jnp.cos(x)
    return jnp.mean(bdia.bdia_scan(f, w, x, gamma, c, batch_chunks=2, per_sample=True) ** 2)


def in_the_loss(w, x, gamma, labels, **options):
    features = bdia.bdia_scan(f, w, x, gamma)
    found = losses.softmax_cross_entropy(features, w[0], labels, chunk_size=3, **options)
    return jnp.mean(found)


SCANS = {
    "whole": scan(),
    "store": scan(backprop="store"),
    "remat": scan(backprop="remat"),
    "floats": scan(backprop="store", fixed_point=None),
    "unverified, no guard": scan(verify=False, fixed_point=bdia.FixedPoint(guard_bits=0)),
    "failures": scan(failures=jnp.zeros(K)),
    "branches": scan((f, f)),
    "batch chunks": scan(batch_chunks=2),
    "store, batch chunks": scan(batch_chunks=2, backprop="store"),
    "token chunks": scan((f, f), token_chunks=(1, 3)),
    "all chunks": scan((f, f), batch_chunks=2, token_chunks=(1, 3)),
    "const": with_const,
    "loss": in_the_loss,
    "smoothed loss": partial(in_the_loss, label_smoothing=0.1),
}


# --- models and stacks: made, trained and at inference ------------------------------------


class Dense(nnx.Module):
    def __init__(self, rngs):
        self.norm, self.dense = nnx.LayerNorm(D, rngs=rngs), nnx.Linear(D, D, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x):
        return self.dropout(nnx.tanh(self.dense(self.norm(x))))


class LinenDense(nn.Module):
    @nn.compact
    def __call__(self, x, deterministic=False):
        h = nn.tanh(nn.Dense(D)(nn.LayerNorm()(x)))
        return nn.Dropout(0.1)(h, deterministic=deterministic)


def of_model(make, *inputs):
    def run():
        model = make()
        assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))} == {
            jnp.dtype(jnp.float32)
        }
        gradients = nnx.grad(lambda model: jnp.mean(model(*inputs) ** 2))(model)
        model.eval()
        return gradients, model(*inputs)

    return run


def with_lora():
    model = small("gpt2")
    lora.add(model, lora.query_and_value(model), rank=2, alpha=2.0, rngs=nnx.Rngs(1))
    wrt = nnx.DiffState(0, nnx.LoRAParam)
    tokens = SMALL["gpt2"].inputs[0]

    def loss(model):
        return jnp.mean(model.loss(model.features(tokens), tokens))

    return nnx.grad(loss, argnums=wrt)(model)


def with_linen():
    stack = linen.BDIAStack(LinenDense(), K)
    variables = stack.init(jax.random.key(0), X, deterministic=True)
    rngs = {"gamma": jax.random.key(1), "dropout": jax.random.key(2)}
    run: Any = partial(stack.apply, rngs=rngs, deterministic=False)
    gradients = jax.grad(lambda variables: jnp.mean(run(variables, X) ** 2))(variables)
    return gradients, stack.apply(variables, X, deterministic=True)


def made(name: str):
    model: Any
    model, arguments, inputs = SMALL[name]
    return of_model(lambda: model(**arguments, rngs=nnx.Rngs(0)), *inputs)


RESNET = partial(ResNet, (8, 8, 3), 3, widths=(4, 8), depths=(2, 2))
MODELS = {name: made(name) for name in SMALL} | {
    "resnet": of_model(lambda: RESNET(rngs=nnx.Rngs(0)), SMALL["vit"].inputs[0]),
    "nnx": of_model(lambda: BDIAStack(Dense, K, rngs=nnx.Rngs(0)), X),
    "linen": with_linen,
    "lora": with_lora,
}

# --- settings ------------------------------------------------------------------------------


@contextlib.contextmanager
def strict():
    """All that raise at once: each is of another kind of mistake, and says which."""
    with (
        jax.numpy_rank_promotion("raise"),
        jax.numpy_dtype_promotion("strict"),
        jax.debug_nans(True),
        jax.enable_x64(True),
    ):
        yield


@pytest.mark.claim("works under the settings that raise")
@pytest.mark.parametrize("name", ["all chunks", *map(full, sorted(SCANS.keys() - {"all chunks"}))])
def test_scans_under_settings_that_raise(name):
    with strict():
        jax.grad(SCANS[name])(W, X, GAMMA, LABELS)


@pytest.mark.claim("works under the settings that raise")
@pytest.mark.full
@pytest.mark.parametrize("name", MODELS)
def test_models_under_settings_that_raise(name):
    with strict():
        MODELS[name]()


@pytest.mark.control("works under the settings that raise")
@pytest.mark.parametrize(
    ("block_fn", "error"),
    [
        (lambda w, x: x + w[0], ValueError),  # a rank is promoted
        (lambda w, x: x * jnp.int32(1), ValueError),
        (lambda w, x: (x @ w) / jnp.zeros_like(x) * 0, FloatingPointError),
        (lambda w, x: (x @ w) * jnp.ones(x.shape), ValueError),  # in float64
    ],
)
def test_a_block_that_they_are_for_raises(block_fn, error):
    with strict(), pytest.raises(error):
        jax.grad(scan(block_fn))(W, X, GAMMA, LABELS)


@pytest.mark.full
@pytest.mark.parametrize("name", ["whole", "loss"])
def test_scans_without_jit(name):
    expected = jax.grad(SCANS[name])(W, X, GAMMA, LABELS)
    with jax.disable_jit():
        assert_grads_close(jax.grad(SCANS[name])(W, X, GAMMA, LABELS), expected, 1e-5)


@pytest.mark.full
def test_keys_as_plain_integers():
    key = jax.random.PRNGKey(0)
    gamma = bdia.sample_gamma(key, K, B)
    assert gamma.shape == (K, B)
    assert np.isfinite(jax.grad(scan())(W, X, gamma, LABELS)).all()
    assert np.isfinite(BDIAStack(Dense, K, rngs=nnx.Rngs(key))(X)).all()


# --- meshes -------------------------------------------------------------------------------

SPLIT = (P(), P("d"), P(None, "d"), P("d"))


def in_shard_map(loss, specs, *inputs):
    """The gradient of the mean over 4 devices, by `jax.shard_map` as it is by default."""
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))

    def local(*inputs):
        return jax.lax.pmean(loss(*inputs), "d")

    of_all = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P())
    return jax.jit(jax.grad(of_all))(*inputs)


def on_explicit_mesh(loss, specs, *inputs, are_constants=False):
    """On the mesh that `jax.make_mesh` makes by default, whose arrays say how they are split.

    Of constants the program knows all but the first.
    """
    mesh = jax.make_mesh((4,), ("d",))
    with jax.set_mesh(mesh):
        shardings = (jax.NamedSharding(mesh, spec) for spec in specs)
        first, *others = map(jax.device_put, inputs, shardings)
        if are_constants:
            return jax.jit(jax.grad(lambda first: loss(first, *others)))(first)
        return jax.jit(jax.grad(loss))(first, *others)


RUNS = {
    "shard_map": in_shard_map,
    "explicit": on_explicit_mesh,
    "constants": partial(on_explicit_mesh, are_constants=True),
}


@pytest.mark.full
@pytest.mark.parametrize("run", ["shard_map", "constants"])
@pytest.mark.parametrize("name", ["whole", "all chunks", "const", "store, batch chunks", "loss"])
def test_scans_on_meshes(name, run):
    expected = jax.grad(SCANS[name])(W, X, GAMMA, LABELS)
    assert_grads_close(RUNS[run](SCANS[name], SPLIT, W, X, GAMMA, LABELS), expected, 1e-5)


@pytest.mark.full
@pytest.mark.parametrize("run", ["shard_map", "explicit"])
@pytest.mark.parametrize("name", ["vit", "gpt2"])
def test_models_on_meshes(name, run):
    graphdef, params, others = nnx.split(small(name), nnx.Param, ...)
    inputs = tuple(jnp.concatenate([x] * 8)[:8] for x in SMALL[name].inputs)

    def loss(params, others, *inputs):
        return jnp.mean(nnx.merge(graphdef, params, others)(*inputs, rngs=nnx.Rngs(1)) ** 2)

    def of_parts(params, others, *inputs):  # each device draws alike
        parts = zip(*(jnp.split(x, 4) for x in inputs), strict=True)
        return jnp.mean(jnp.stack([loss(params, others, *part) for part in parts]))

    specs = (P(), P(), *(P("d") for _ in inputs))
    gradients = RUNS[run](loss, specs, params, others, *inputs)
    alone = of_parts if run == "shard_map" else loss
    expected = jax.jit(jax.grad(alone))(params, others, *inputs)
    # as one array: the gradient of a key's bias is zero but for rounding
    actual, expected = (ravel_pytree(jax.device_get(each))[0] for each in (gradients, expected))
    assert_grads_close(jnp.asarray(actual), jnp.asarray(expected), 1e-5)
