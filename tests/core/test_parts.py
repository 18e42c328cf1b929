"""Blocks by branch and in chunks: the same values, exact rebuilds, the gradients, less memory."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from toy import (
    GRAD_TOLERANCE,
    assert_grads_close,
    assert_same_bits,
    keep_mask,
    relative_error,
)

import bdia_jax as bdia
from bdia_jax import FixedPoint, bdia_scan

F32 = GRAD_TOLERANCE[jnp.dtype(jnp.float32)]
B, T, D, DEPTH = 4, 6, 8, 5


def mix(params, x, shared, own):
    """Tokens see each other; `shared` [D] is one for all samples, `own` [B, T, 1] is not."""
    tokens = jnp.einsum("st,btd->bsd", params["mix"], x * own)
    return jnp.tanh(tokens * shared + params["bias"])


def per_token(params, x, shared, own):
    del own
    hidden = jnp.tanh(x @ params["in"]) * shared[0]
    keep = keep_mask(params["key"], 0.8, hidden.shape)
    return jnp.where(keep, hidden, 0.0) @ params["out"]


def whole(params, x, shared, own):
    f = mix(params, x, shared, own)
    return f + per_token(params, x + f, shared, own)


def case(depth=DEPTH):
    """(params, x0, gamma, shared, own)."""
    keys = jax.random.split(jax.random.key(0), 8)
    shapes = {"mix": (T, T), "bias": (D,), "in": (D, 2 * D), "out": (2 * D, D)}
    params = {
        name: 0.4 * jax.random.normal(key, (depth, *shape))
        for key, (name, shape) in zip(keys, shapes.items(), strict=False)
    }
    params["key"] = jax.random.split(keys[4], depth)
    x0 = jax.random.normal(keys[5], (B, T, D))
    gamma = bdia.sample_gamma(keys[6], depth, B)
    return params, x0, gamma, jnp.linspace(0.5, 1.5, D), jax.random.uniform(keys[7], (B, T, 1))


WAYS = {
    "whole": (whole, {}),
    "branches": ((mix, per_token), {}),
    "batch": (whole, {"batch_chunks": 2, "per_sample": (False, True)}),
    "tokens": ((mix, per_token), {"token_chunks": (1, 3)}),
    "all": (
        (mix, per_token),
        {"batch_chunks": 4, "token_chunks": (1, 2), "per_sample": (False, True)},
    ),
}


@functools.cache
def value_and_grads(way, backprop):
    block_fn, options = WAYS[way]
    params, x0, gamma, *consts = case()
    key = params.pop("key")

    def loss(params, x0, consts):
        params = params | {"key": key}
        x = bdia_scan(block_fn, params, x0, gamma, *consts, backprop=backprop, **options)
        return jnp.sum(jnp.cos(jnp.arange(x.size).reshape(x.shape)) * x), x

    return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(params, x0, consts)


@pytest.mark.claim("chunks and branches change no value")
@pytest.mark.parametrize(
    "way",
    ["batch", *(pytest.param(w, marks=pytest.mark.full) for w in ("branches", "tokens", "all"))],
)
def test_values_and_gradients_are_those_of_store(way):
    expected, x = value_and_grads(way, "store")
    actual, rebuilt_x = value_and_grads(way, "reversible")
    assert_same_bits(rebuilt_x, x)
    assert_grads_close(actual, expected, F32)


@pytest.mark.full
def test_remat_computes_the_same():
    expected, x = value_and_grads("all", "store")
    actual, rematerialized_x = value_and_grads("all", "remat")
    assert_same_bits(rematerialized_x, x)
    assert_grads_close(actual, expected, F32)


@pytest.mark.full
@pytest.mark.claim("rebuild is exact")
@pytest.mark.parametrize("way", [pytest.param("branches", marks=pytest.mark.full), "all"])
def test_the_rebuild_is_exact(way):
    block_fn, options = WAYS[way]
    found = bdia.audit(block_fn, *case(), **options)
    assert found.exact and found.elements == B * T * D, found


@pytest.mark.control("rebuild is exact")
def test_an_audit_in_parts_sees_an_inexact_rebuild():
    # 12 fractional bits and no guard: a block off by 1e-3 cannot come back
    def off(params, x):
        return _perturbed(params["w"], x)

    params, x0, gamma, *_ = case()
    found = bdia.audit(
        off, {"w": params["in"]}, x0, gamma, batch_chunks=2, fixed_point=FixedPoint(12, 0)
    )
    assert not found.exact and found.mismatches[0] > 0 and found.max_drift > 0.5


@jax.custom_vjp
def _perturbed(w, x):
    return jnp.tanh(x @ w) @ w.T


def _perturbed_fwd(w, x):
    return _perturbed(w, x) + 1e-3, (w, x)


_perturbed.defvjp(_perturbed_fwd, lambda res, ct: (jnp.zeros_like(res[0]), jnp.zeros_like(res[1])))


@pytest.mark.full
def test_without_dropout_a_way_changes_nothing_but_rounding(unoptimized):
    params, x0, gamma, *consts = case()
    params.pop("key")

    def g(params, x, shared, own):
        return jnp.tanh(x @ params["in"]) @ params["out"]

    def h(params, x, shared, own):
        f = mix(params, x, shared, own)
        return f + g(params, x + f, shared, own)

    def run(block_fn, **options):
        loss = lambda p: jnp.sum(bdia_scan(block_fn, p, x0, gamma, *consts, **options) ** 2)  # noqa: E731
        return jax.jit(jax.grad(loss))(params)

    expected = run(h)
    for block_fn, options in [
        ((mix, g), {}),
        (h, {"batch_chunks": 4, "per_sample": (False, True)}),
        ((mix, g), {"token_chunks": (1, 6), "batch_chunks": 2, "per_sample": (False, True)}),
    ]:
        # a quantum more or less, where a rounding fell otherwise
        assert_grads_close(run(block_fn, **options), expected, 1e-3)


def test_parts_draw_masks_of_their_own_from_typed_keys(unoptimized):
    def noise(params, x):
        key = params["key"]
        return jax.random.uniform(key, x.shape)

    keys = jax.random.split(jax.random.key(1), 3)
    x0 = jnp.zeros((B, T, D))

    def run(keys, **options):
        return bdia_scan(noise, {"key": keys}, x0, None, **options)

    x = run(keys, batch_chunks=2)
    assert relative_error(x[::2], x[1::2]) > 0.1
    x = run(keys, token_chunks=2)
    assert relative_error(x[:, ::2], x[:, 1::2]) > 0.1
    # control: a key that does not say it is one is the same for every part
    x = run(jax.random.key_data(keys), batch_chunks=2)
    assert_same_bits(x[::2], x[1::2])


def test_keys_in_consts_are_folded_too_and_those_of_samples_cut(unoptimized):
    def noise(params, x, key, keys):
        own = jax.vmap(lambda key: jax.random.uniform(key, x.shape[1:]))(keys)
        return jax.random.uniform(key, x.shape) + 10 * own

    keys = jax.random.split(jax.random.key(2), B)
    args = (noise, jnp.ones(2), jnp.zeros((B, T, D)), None, jax.random.key(1), keys)
    x, whole = bdia_scan(*args, batch_chunks=2, per_sample=(False, True)), bdia_scan(*args)
    assert relative_error(x[::2] % 0.1, x[1::2] % 0.1) > 0.1
    assert np.all(jnp.abs(x - whole) < 2.01)  # the samples' own draws are the same


@pytest.mark.full
def test_aux_of_branches_is_a_tuple(unoptimized):
    def branch(power):
        def f(params, x):
            h = jnp.tanh(x * params["w"]) ** power
            return h, {"sum": power * jnp.sum(h**2), "count": jnp.int32(power)}

        return f

    w = jnp.linspace(0.1, 0.5, DEPTH)
    _, x0, gamma, *_ = case()

    def loss(w, backprop):
        fns = [branch(power) for power in (1, 2, 3)]
        x, aux = bdia_scan(fns, {"w": w}, x0, gamma, has_aux=True, backprop=backprop)
        assert [a["count"].shape for a in aux] == [(DEPTH,)] * 3
        return jnp.sum(x) + sum(weight * jnp.sum(a["sum"]) for weight, a in enumerate(aux, 1))

    grad = jax.jit(jax.grad(loss), static_argnums=1)
    assert_grads_close(grad(w, "reversible"), grad(w, "store"), F32)


@pytest.mark.full
def test_parts_with_one_gamma_for_all_bfloat16_input_and_a_nan():
    params, x0, gamma, *consts = case()
    gamma = gamma[:, :1]
    x0 = x0.astype(jnp.bfloat16).at[0, 0, 0].set(jnp.nan)

    def run(backprop):
        def loss(x0):
            options = WAYS["batch"][1] | {"backprop": backprop}
            x = bdia_scan(whole, params, x0, gamma, *consts, **options)
            return jnp.sum(jnp.sin(x)), x

        return jax.jit(jax.grad(loss, has_aux=True))(x0)

    (grad, x), (expected, stored) = run("reversible"), run("store")
    assert_same_bits(x, stored)
    assert grad.dtype == jnp.bfloat16
    assert_grads_close(grad[1:], expected[1:], GRAD_TOLERANCE[jnp.dtype(jnp.bfloat16)])
    assert np.all(np.isnan(x[0]).any()) and np.all(np.isfinite(x[1:]))


def test_a_nan_stays_in_its_sample_by_branch(unoptimized):
    _, x0, gamma, *_ = case()
    bad = x0.at[0].set(jnp.nan)
    f = lambda w, x: jnp.tanh(x * w)  # noqa: E731
    loss = lambda x0: jnp.sum(bdia_scan((f, f), jnp.ones(DEPTH), x0, gamma))  # noqa: E731
    grad = jax.jit(jax.grad(loss))(bad)
    assert np.all(np.isfinite(grad[1:]))


@pytest.mark.full
def test_seeds_side_by_side_in_parts(unoptimized):
    params, x0, gamma, *consts = case()

    def loss(x0):
        return jnp.sum(bdia_scan(whole, params, x0, gamma, *consts, **WAYS["batch"][1]) ** 2)

    both = jnp.stack([x0, 2 * x0])
    alone = jax.jit(jax.grad(loss))
    expected = jnp.stack([alone(x) for x in both])
    assert_grads_close(jax.jit(jax.vmap(jax.grad(loss)))(both), expected, 1e-4)


# --- what it costs, and what it saves ------------------------------------------------


def _flops(jaxpr) -> int:
    """Multiplications of all matrix products, loops counted as often as they run."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contract, _), _ = eqn.params["dimension_numbers"]
            depth = np.prod([eqn.invars[0].aval.shape[axis] for axis in contract])
            total += int(depth) * eqn.outvars[0].aval.size
        times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(value):
                total += times * _flops(getattr(value, "jaxpr", value))
    return total


def _is_jaxpr(value):
    return isinstance(value, (Jaxpr, ClosedJaxpr))


def test_chunks_evaluate_nothing_more_and_branches_all_but_the_last_once_more():
    params, x0, gamma, *consts = case()

    def flops(way):
        block_fn, options = WAYS[way]

        def loss(floats, x0, consts):
            p = floats | {"key": params["key"]}
            return jnp.sum(bdia_scan(block_fn, p, x0, gamma, *consts, **options))

        floats = {name: leaf for name, leaf in params.items() if name != "key"}
        return _flops(jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(floats, x0, consts).jaxpr)

    once = B * T * T * D * DEPTH  # of mix
    assert flops("batch") == flops("whole") > 0
    assert flops("branches") == flops("whole") + once
    assert flops("all") == flops("tokens") == flops("branches")


WIDE = 64


def attention_like(params, x):
    scores = jax.nn.softmax(jnp.einsum("bsd,btd->bst", x @ params["q"], x), -1)
    return jnp.einsum("bst,btd->bsd", scores, x)


def wide_mlp(params, x):
    return jnp.sin(jnp.tanh(x @ params["in"])) @ params["out"]


def temp_bytes(block_fn, depth=8, **options):
    shapes = {"q": (WIDE, WIDE), "in": (WIDE, 8 * WIDE), "out": (8 * WIDE, WIDE)}
    params = {k: jax.ShapeDtypeStruct((depth, *s), jnp.float32) for k, s in shapes.items()}
    x0 = jax.ShapeDtypeStruct((8, 256, WIDE), jnp.float32)
    gamma = jax.ShapeDtypeStruct((depth, 8), jnp.float32)
    loss = lambda p, x0, g: jnp.sum(bdia_scan(block_fn, p, x0, g, **options) ** 2)  # noqa: E731
    compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(params, x0, gamma).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def both(params, x):
    f = attention_like(params, x)
    return f + wide_mlp(params, x + f)


@pytest.mark.full
@pytest.mark.claim("chunks and branches hold less")
@pytest.mark.control("chunks and branches hold less")
def test_each_way_holds_less():
    branches = (attention_like, wide_mlp)
    sizes = {
        "whole": temp_bytes(both),
        "branches": temp_bytes(branches),
        "tokens": temp_bytes(branches, token_chunks=(1, 4)),
        "batch": temp_bytes(both, batch_chunks=8),
        "all": temp_bytes(branches, batch_chunks=8, token_chunks=(1, 4)),
    }
    state = 8 * 256 * WIDE * 4
    assert sizes["branches"] < sizes["whole"] - 4 * state  # one hidden activation of the MLP
    assert sizes["tokens"] < sizes["branches"]
    assert sizes["batch"] < sizes["tokens"] < 0.6 * sizes["whole"]
    assert sizes["all"] < sizes["batch"] < 0.4 * sizes["whole"]
    # control: it is the rebuild that makes use of it
    assert temp_bytes(branches, backprop="remat") > sizes["whole"]


@pytest.mark.full
def test_a_branch_may_bring_its_own_checkpoint_policy(unoptimized):
    # that it also saves memory shows on a GPU: on a CPU XLA merges the two evaluations again
    policy = jax.checkpoint_policies.nothing_saveable
    own = jax.checkpoint(wide_mlp, policy=policy)
    params = {"q": jnp.ones((2, D, D)) / D, "in": jnp.ones((2, D, D)) / D}
    params["out"] = jax.random.normal(jax.random.key(0), (2, D, D))
    _, x0, gamma, *_ = case(2)

    def grad(mlp):
        def loss(p):
            return jnp.sum(bdia_scan((attention_like, mlp), p, x0, gamma, batch_chunks=2) ** 2)

        return jax.grad(loss)

    flops = [_flops(jax.make_jaxpr(grad(mlp))(params).jaxpr) for mlp in (own, wide_mlp)]
    assert flops[0] == flops[1] + 2 * B * T * D * D  # the first product of every block once more
    assert_grads_close(jax.jit(grad(own))(params), jax.jit(grad(wide_mlp))(params), F32)


@pytest.mark.full
def test_an_added_block_still_costs_its_side_bits():
    size = functools.partial(temp_bytes, (attention_like, wide_mlp))
    options = {"batch_chunks": 4, "token_chunks": (1, 2)}
    slope = (size(24, **options) - size(8, **options)) / 16
    assert abs(slope / (8 * 256 * WIDE * 2 / 8) - 1) < 0.02


@pytest.mark.full
@pytest.mark.parametrize("way", ["batch", "tokens"])
def test_parts_of_a_sharded_batch_stay_on_their_devices(way):
    block_fn, options = WAYS[way]
    params, x0, gamma, *consts = case()
    x0, own = (jnp.concatenate([a] * 4) for a in (x0, consts[1]))
    gamma = jnp.concatenate([gamma] * 4, 1)
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    place = lambda a, *spec: jax.device_put(a, NamedSharding(mesh, PartitionSpec(*spec)))  # noqa: E731
    floats = {name: place(leaf) for name, leaf in params.items() if name != "key"}
    key = place(params["key"])

    def loss(floats, x0, gamma, shared, own):
        p = floats | {"key": key}
        return jnp.sum(jnp.sin(bdia_scan(block_fn, p, x0, gamma, shared, own, **options)))

    sharded = (place(x0, "data"), place(gamma, None, "data"), place(consts[0]), place(own, "data"))
    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(floats, *sharded).compile()
    text = compiled.as_text()
    assert "all-reduce" in text  # of the parameters' gradients
    assert not re.search(r"all-gather|all-to-all|collective-permute", text)
    expected = jax.jit(jax.grad(loss, (0, 1)))(
        floats, *map(jnp.asarray, (x0, gamma, consts[0], own))
    )
    assert_grads_close(compiled(floats, *sharded), expected, F32)


# --- what is refused -----------------------------------------------------------------


def aux_block(params, x):
    return x, jnp.sum(x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_chunks": 3}, "batch_chunks=3 does not divide .*divisor of 4"),
        ({"batch_chunks": 0}, "batch_chunks is 0, expected a positive int"),
        ({"batch_chunks": True}, "batch_chunks is True"),
        ({"token_chunks": 4}, r"token_chunks=4 .*\(4, 6, 8\)"),
        ({"token_chunks": (1, 2)}, "one for each of 1 function"),
        ({"token_chunks": 2.0}, "token_chunks is 2.0"),
        ({"block_fn": ()}, "block_fn is empty"),
        ({"batch_chunks": 2, "has_aux": True, "block_fn": aux_block}, "aux .*set both to 1"),
    ],
)
def test_refused(options, message, unoptimized):
    options = {"block_fn": lambda params, x: x} | options
    _, x0, gamma, *_ = case()
    with pytest.raises(ValueError, match=message):
        bdia_scan(options.pop("block_fn"), jnp.ones(DEPTH), x0, gamma, **options)


# --- which consts are cut with the batch ---------------------------------------------


def with_positions(params, x, positions, own):
    """positions [T, D], shared; own [B, T, 1]."""
    return jnp.tanh(params * x * own + positions)


def square_case():
    """As many tokens as samples, so that no shape tells positions from a const of samples."""
    _, x0, gamma, _, own = case()
    positions = jnp.arange(B * D, dtype=jnp.float32).reshape(B, D)
    return (with_positions, jnp.ones(DEPTH), x0[:, :B]), gamma, positions, own[:, :B]


@pytest.mark.control("chunks and branches change no value")
@pytest.mark.parametrize("backprop", ["reversible", "store"])
def test_what_could_be_cut_or_not_has_to_be_said(backprop, unoptimized):
    args, gamma, positions, own = square_case()
    options = {"batch_chunks": 2, "backprop": backprop}
    with pytest.raises(ValueError, match=r"consts\[0\] has a leading axis of 4.*per_sample"):
        bdia_scan(*args, gamma, positions, own, **options)
    whole = bdia_scan(*args, gamma, positions, own)
    said = bdia_scan(*args, gamma, positions, own, **options, per_sample=(False, True))
    assert_same_bits(said, whole)
    # control: the other word is another function without an error, which a guess would risk
    options["batch_chunks"] = 4
    wrong = bdia_scan(*args, gamma, positions, own, **options, per_sample=True)
    assert relative_error(wrong, whole) > 0.01


def test_at_inference_what_is_not_said_leaves_the_batch_whole(unoptimized):
    args, _, positions, own = square_case()
    whole = bdia_scan(*args, None, positions, own)
    assert_same_bits(bdia_scan(*args, None, positions, own, batch_chunks=2), whole)


def test_a_leading_axis_of_one_serves_every_sample(unoptimized):
    args, gamma, positions, own = square_case()
    whole = bdia_scan(*args, gamma, positions[None], own[:1])
    for per_sample in (True, False, None, (True, False)):
        options = {"batch_chunks": 2, "per_sample": per_sample}
        assert_same_bits(bdia_scan(*args, gamma, positions[None], own[:1], **options), whole)


@pytest.mark.parametrize(
    ("per_sample", "message"),
    [
        ("yes", "per_sample is 'yes', expected a bool"),
        ((True,), r"per_sample is \(True,\), expected a bool for all of consts, or a tuple"),
        ((1, 0), r"per_sample is \(1, 0\)"),
        (True, r"consts\[0\] has shape \(8,\), but per_sample says that each of 4 samples"),
    ],
)
def test_per_sample_has_to_fit(per_sample, message, unoptimized):
    params, x0, gamma, *consts = case()
    with pytest.raises(ValueError, match=message):
        bdia_scan(whole, params, x0, gamma, *consts, per_sample=per_sample)


def test_an_error_of_the_block_says_what_it_was_given():
    _, x0, gamma, _, own = case()
    with pytest.raises((TypeError, ValueError)) as caught:
        bdia_scan(lambda p, x, y: x * y, jnp.ones(DEPTH), x0, gamma, own, token_chunks=2)
    notes = "".join(caught.value.__notes__)
    assert "x of shape (4, 3, 8)" in notes and "nothing in them is cut like the tokens" in notes


def test_token_chunks_need_a_token_axis():
    with pytest.raises(ValueError, match=r"needs x of shape \[B, T, ..., D\]"):
        bdia_scan(lambda p, x: x, jnp.ones(2), jnp.ones((4, 8)), None, token_chunks=2)


def test_each_branch_is_checked():
    _, x0, gamma, *_ = case()
    with pytest.raises(ValueError, match="returned h of shape"):
        bdia_scan((lambda p, x: x, lambda p, x: x[:, :1]), jnp.ones(DEPTH), x0, gamma)
