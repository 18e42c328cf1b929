"""Stacks as Flax's and JAX's scans: what blocks sow or keep, metadata, tables, eager calls."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from toy import assert_grads_close

from bdia_jax import bdia_scan, linen, losses, sample_gamma
from bdia_jax.baselines.stacks import MidpointStack
from bdia_jax.nnx import BDIAStack, BranchedBlock

pytestmark = pytest.mark.usefixtures("quick_compile")
full = partial(pytest.param, marks=pytest.mark.full)

K, B, D = 3, 2, 8
X = jnp.asarray(np.random.default_rng(0).normal(size=(B, D)), jnp.float32)
RNGS = {"gamma": jax.random.key(2)}
EVERY = pytest.mark.parametrize("backprop", ["reversible", full("store"), full("remat")])


# --- Linen ---------------------------------------------------------------------------------


class Sows(nn.Module):
    by: str = "sow"  # or a variable, or as aux

    @nn.compact
    def __call__(self, x):
        h = nn.tanh(nn.Dense(D)(x))
        balance = jnp.mean(h**2)
        if self.by == "sow":
            self.sow("losses", "balance", balance)
        elif self.by == "variable":
            self.variable("losses", "balance", jnp.zeros, ()).value = balance
        return (h, balance) if self.by == "aux" else h


def linen_gradient(by: str, *, has_losses: bool, **options):
    """The gradient of what the blocks keep, by the way they do it."""
    stack = linen.BDIAStack(Sows(by), K, has_aux=by == "aux", **options)
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(K, D, D)), jnp.float32)
    params = {"blocks": {"Dense_0": {"kernel": weights, "bias": weights[:, 0]}}}
    variables = stack.init(jax.random.key(1), X, deterministic=True)
    others = {"losses": variables["losses"]} if has_losses else {}

    def loss(params):
        run = partial(stack.apply, {"params": params, **others}, X, rngs=RNGS)
        out, changed = run(deterministic=False, mutable=["losses"])
        kept = out[1] if by == "aux" else jax.tree.leaves(changed)[-1]
        assert kept.shape == (K,)
        return jnp.sum(kept)

    return jax.grad(loss)(params)


@EVERY
@pytest.mark.parametrize(
    ("by", "has_losses"), [("sow", False), full("sow", True), full("variable", True)]
)
def test_what_a_linen_block_keeps_is_stacked_and_has_the_gradient_of_aux(by, has_losses, backprop):
    expected = linen_gradient("aux", has_losses=False, backprop=backprop)
    actual = linen_gradient(by, has_losses=has_losses, backprop=backprop)
    assert_grads_close(actual, expected, 1e-6)


def test_outputs_of_linen_blocks_are_captured_stacked():
    stack = linen.BDIAStack(Sows(), K)
    variables = stack.init(jax.random.key(1), X, deterministic=True)
    params = {"params": variables["params"]}
    options = {"capture_intermediates": True, "mutable": ["intermediates"]}
    _, found = stack.apply(params, X, deterministic=True, **options)
    shapes = jax.tree.map(jnp.shape, found["intermediates"]["blocks"])
    assert shapes == {"Dense_0": {"__call__": ((K, B, D),)}, "__call__": ((K, B, D),)}


def test_what_is_not_asked_for_is_not_kept():
    stack = linen.BDIAStack(Sows(), K)
    variables = stack.init(jax.random.key(1), X, deterministic=True)
    params = {"params": variables["params"]}
    out = stack.apply(params, X, deterministic=False, rngs=RNGS)
    assert jax.tree.map(jnp.shape, out) == X.shape


# --- NNX -----------------------------------------------------------------------------------


class Loss(nnx.Variable):
    pass


class Keeps(nnx.Module):
    per_sample = True

    def __init__(self, rngs, by="variable", window=3.0):
        self.by, self.dense = by, nnx.Linear(D, D, rngs=rngs)
        self.balance = Loss(jnp.zeros(()))
        self.window = nnx.Variable(jnp.full(D, window))  # a constant

    def __call__(self, x):
        h = nnx.tanh(self.dense(x)) / self.window[...]
        balance = jnp.mean(h**2)
        if self.by == "sow":
            self.sow(nnx.Intermediate, "balance", balance)
        elif self.by == "variable":
            self.balance[...] = balance
        return (h, balance) if self.by == "aux" else h


def nnx_gradient(by: str, backprop: str):
    make = partial(Keeps, by=by)
    stack = BDIAStack(make, K, rngs=nnx.Rngs(0), has_aux=by == "aux", backprop=backprop)

    def loss(stack):
        if by == "sow":
            _, sown = nnx.capture(stack, nnx.Intermediate)(X)
            (kept,) = sown["blocks"]["balance"].get_value()
        elif by == "aux":
            _, kept = stack(X)
        else:
            stack(X)
            kept = stack.blocks.balance[...]
        assert kept.shape == (K,)
        return jnp.sum(kept)

    return nnx.grad(loss)(stack)


@EVERY
@pytest.mark.parametrize("by", ["sow", "variable"])
def test_what_an_nnx_block_keeps_is_stacked_and_has_the_gradient_of_aux(by, backprop):
    assert_grads_close(nnx_gradient(by, backprop), nnx_gradient("aux", backprop), 1e-6)


@pytest.mark.parametrize(
    "options",
    [{}, full({"batch_chunks": 2}), full({"backprop": "store"}), full({"backprop": "remat"})],
)
def test_a_constant_is_left_alone_where_parameters_are_differentiated_apart(options):
    stack = BDIAStack(partial(Keeps, by="nothing"), K, rngs=nnx.Rngs(0), **options)
    graphdef, params, others = nnx.split(stack, nnx.Param, ...)

    def loss(model):
        return jnp.sum(model(X, rngs=nnx.Rngs(1)) ** 2)

    gradient = jax.grad(lambda params: loss(nnx.merge(graphdef, params, others)))(params)
    assert_grads_close(gradient, nnx.grad(loss)(stack), 1e-6)


class Branches(BranchedBlock):
    branches = ("f", "g")

    def __init__(self, rngs, by):
        self.kept = Keeps(rngs, by)

    def f(self, x):
        return self.kept(x)

    def g(self, x):
        return jnp.tanh(x)


@pytest.mark.parametrize("options", [{"batch_chunks": 2}, {"by_branch": True}])
def test_a_block_in_parts_that_changes_its_state_is_refused(options):
    make = Keeps if "batch_chunks" in options else partial(Branches, by="variable")
    stack = BDIAStack(make, K, rngs=nnx.Rngs(0), **options)
    with pytest.raises(ValueError, match=r"changes its state \((kept\.)?balance\)"):
        stack(X)
    stack.eval()  # whole
    assert stack(X).shape == X.shape


# --- for other tools -------------------------------------------------------------------------


def test_a_stack_is_tabulated():
    stack = BDIAStack(Keeps, K, rngs=nnx.Rngs(0))
    assert "blocks/dense" in nnx.tabulate(stack, X, console_kwargs={"width": 200})


def test_partitions_of_stacked_parameters_begin_with_the_blocks_axis():
    split = nnx.initializers.lecun_normal()
    mesh = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    expected = jax.sharding.PartitionSpec(None, "model", None)

    class Split(nnx.Module):
        def __init__(self, rngs):
            init = nnx.with_partitioning(split, ("model", None))
            self.dense = nnx.Linear(D, D, kernel_init=init, rngs=rngs)

        def __call__(self, x):
            return self.dense(x)

    class LinenSplit(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(D, kernel_init=nn.with_partitioning(split, ("model", None)))(x)

    with jax.set_mesh(mesh):
        stack = BDIAStack(Split, K, rngs=nnx.Rngs(0))
        spec: Any = nnx.get_partition_spec(nnx.state(stack, nnx.Param))
        assert spec["blocks"]["dense"]["kernel"].get_value() == expected
        assert np.isfinite(np.asarray(stack(X))).all()
    stack = linen.BDIAStack(LinenSplit(), K, deterministic=True)
    variables = stack.init(jax.random.key(0), X)
    spec = nn.get_partition_spec(variables)
    assert spec["params"]["blocks"]["Dense_0"]["kernel"] == expected
    assert np.isfinite(np.asarray(stack.apply(variables, X))).all()


# --- calls outside jit -------------------------------------------------------------------------


def f(w, x):
    return jnp.tanh(x @ w)


def times_const(w, x, const):
    return f(w, x) * const["c"]


W = jnp.asarray(np.random.default_rng(1).normal(size=(K, D, D)), jnp.float32)


def eager_calls():
    gamma = sample_gamma(jax.random.key(0), K, B)
    nnx_stack = BDIAStack(partial(Keeps, by="nothing"), K, rngs=nnx.Rngs(0))
    midpoint = MidpointStack(partial(Keeps, by="nothing"), K, rngs=nnx.Rngs(0))
    linen_stack = linen.BDIAStack(Sows("nothing"), K)
    variables = linen_stack.init(jax.random.key(1), X, deterministic=True)
    return {
        "scan": lambda: bdia_scan(f, W, X, gamma),
        "per_sample": lambda: bdia_scan(
            times_const, W, X, gamma, {"c": X}, per_sample=({"c": True},), batch_chunks=2
        ),
        "nnx": lambda: nnx_stack(X),
        "midpoint": lambda: midpoint(X),
        "linen": lambda: linen_stack.apply(variables, X, deterministic=False, rngs=RNGS),
        "loss": lambda: losses.softmax_cross_entropy(X, W[0], jnp.zeros(B, jnp.int32)),
    }


@pytest.mark.claim("a call outside jit compiles once")
@pytest.mark.parametrize(
    "name", ["scan", "nnx", *map(full, ("per_sample", "midpoint", "linen", "loss"))]
)
def test_a_call_outside_jit_compiles_once(name, compilations):
    call = eager_calls()[name]
    call()
    before = len(compilations)
    for _ in range(3):
        call()
    assert len(compilations) == before


@pytest.mark.control("a call outside jit compiles once")
def test_a_new_function_is_compiled_anew(compilations):
    gamma = sample_gamma(jax.random.key(0), K, B)
    bdia_scan(lambda w, x: f(w, x), W, X, gamma)
    before = len(compilations)
    bdia_scan(lambda w, x: f(w, x), W, X, gamma)
    assert len(compilations) > before


@pytest.fixture
def compilations():
    """Grows with every program that is compiled."""
    found = []

    def note(event, *_, **__):
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(event)

    jax.monitoring.register_event_duration_secs_listener(note)
    yield found
    jax.monitoring.unregister_event_duration_listener(note)


# --- what makes a block -----------------------------------------------------------------


class KeywordOnly(nnx.Module):
    def __init__(self, *, rngs):
        self.dense = nnx.Linear(5, 5, rngs=rngs)

    def __call__(self, x, mask=None):
        return self.dense(x)


class Wide(KeywordOnly):
    def __init__(self, width, *, rngs):
        super().__init__(rngs=rngs)


@pytest.mark.parametrize(
    "make_block",
    [
        KeywordOnly,
        lambda some: KeywordOnly(rngs=some),
        lambda *args: KeywordOnly(rngs=args[0]),
        lambda **kwargs: KeywordOnly(**kwargs),
        partial(Wide, 5),
        partial(Wide, width=5),
        partial(nnx.Linear, 5, 5),
    ],
)
def test_a_block_is_made_as_its_class_takes_rngs(make_block):
    stack = BDIAStack(make_block, 2, rngs=nnx.Rngs(0))
    assert stack(jnp.ones((2, 5))).shape == (2, 5)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"make_block": Wide},
            r"Wide\(self, width, rngs\), which cannot be",
        ),
        ({"make_block": lambda: None}, r"<lambda>\(\), which cannot .* lambda rngs: Block\("),
        ({"make_block": lambda rngs: None}, "make_block returned None, expected an nnx.Module"),
        ({"make_block": [KeywordOnly]}, "KeywordOnly'>], expected what makes each of the blocks"),
        ({"make_block": KeywordOnly(rngs=nnx.Rngs(0))}, "make_block is a KeywordOnly, expected"),
        ({"make_block": nn.Dense}, "Dense'>, expected what makes .* a class of NNX"),
        ({"make_block": nn.Dense(5)}, "make_block is a Dense, expected"),
        ({"make_block": lambda rngs: nn.Dense(5)}, "returned a Dense.* bdia_jax.linen.BDIAStack"),
        ({"rngs": 0}, r"rngs is 0, expected streams of random keys: nnx.Rngs\(0\)"),
        ({"rngs": None}, "rngs is None"),
        ({"rngs": jax.random.key(0)}, r"rngs is Array\("),
        ({"depth": 2.0}, "depth is 2.0, expected a positive int"),
        ({"depth": "2"}, "depth is '2'"),
        ({"depth": True}, "depth is True"),
    ],
)
def test_what_makes_no_stack_is_told(change, message):
    options = {"make_block": KeywordOnly, "depth": 2, "rngs": nnx.Rngs(0)} | change
    with pytest.raises(ValueError, match=message):
        BDIAStack(options.pop("make_block"), options.pop("depth"), **options)


@pytest.mark.parametrize(
    "block, depth, message",
    [
        (nn.Dense, 2, r"Dense'>, expected a module of Linen; give one module, the template"),
        ([nn.Dense(5)], 2, r"block is \[Dense\("),
        (lambda x: x, 2, "block is <function"),
        (KeywordOnly(rngs=nnx.Rngs(0)), 2, "for modules of NNX there is bdia_jax.nnx.BDIAStack"),
        (nn.Dense(5), 0, "depth is 0, expected a positive int"),
        (nn.Dense(5), 2.0, "depth is 2.0"),
    ],
)
def test_what_makes_no_linen_stack_is_told(block, depth, message):
    with pytest.raises(ValueError, match=message):
        linen.BDIAStack(block, depth)


@pytest.mark.parametrize("call", ["__call__", "audit", "choose_guard_bits"])
def test_consts_by_name_and_keys_in_place_of_rngs_are_told(call):
    call = getattr(BDIAStack(KeywordOnly, 2, rngs=nnx.Rngs(0)), call)
    x = jnp.ones((2, 5))
    with pytest.raises(TypeError, match=r"mask= is given by name.* stack.*\(x, mask\)"):
        call(x, mask=x)
    with pytest.raises(ValueError, match=r"rngs is 1, expected .* nnx.Rngs\(0\)"):
        call(x, rngs=1)
