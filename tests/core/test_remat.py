"""audit_remat: what `jax.checkpoint` recomputes against what it was; what makes it the same."""

import dataclasses
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name
from toy import bits

from bdia_jax import audit_remat, pin_rounding

full = partial(pytest.param, marks=pytest.mark.full)

X = jnp.asarray(np.random.default_rng(0).normal(size=(4, 8)), jnp.float32)
HALF = jnp.asarray(np.random.default_rng(0).uniform(size=1024), jnp.bfloat16)


# --- jax issue 8702: a bfloat16 value is rounded in one pass and not in the other -------


def softmax(x):
    return jax.nn.softmax(x.astype(jnp.float32))


def stored(x):
    return softmax(x + 1)[0]


def rematted(x):
    return jax.checkpoint(softmax)(x + 1)[0]


@pytest.mark.control("pinned rounding makes remat exact")
@pytest.mark.claim("audit_remat sees what is recomputed otherwise")
def test_the_gradients_of_jax_issue_8702_differ_and_the_audit_says_where():
    with_it, without = (jax.jit(jax.grad(fn))(HALF) for fn in (rematted, stored))
    wrong = int(np.sum(bits(with_it) != bits(without)))
    audit = audit_remat(rematted, HALF)
    assert not audit.exact and audit.gradient_mismatches == wrong > 100
    first = audit.differing[0]
    assert first.primitive == "convert_element_type" and first.type == "float32[1024]"
    assert "test_remat.py" in first.source and "softmax" in first.source
    assert first.mismatches > 100 and 0 < first.max_error < 2**-7
    assert str(audit).startswith("NOT EXACT: ") and first.source in str(audit)
    assert "\n" not in str(audit)


@pytest.mark.claim("pinned rounding makes remat exact")
@pytest.mark.control("audit_remat sees what is recomputed otherwise")
def test_with_pinned_rounding_no_gradient_differs():
    pinned = [pin_rounding(fn) for fn in (rematted, stored)]
    with_it, without = (jax.jit(jax.grad(fn))(HALF) for fn in pinned)
    np.testing.assert_array_equal(bits(with_it), bits(without))
    audit = audit_remat(pinned[0], HALF)
    assert audit.exact and audit.recomputed and audit.gradient_elements == 1024, audit
    assert str(audit).startswith("exact: 0 of ")


def test_a_difference_of_the_gradients_alone_is_not_exact():
    audit = audit_remat(jax.checkpoint(jnp.tanh), X)
    assert audit.exact, audit
    only = dataclasses.replace(audit, gradient_mismatches=1)
    assert not only.exact and not only.differing and "where they are looked at" in str(only)


# --- every construct that values are seen in -------------------------------------------


def drifts(x):
    """x * one more at each evaluation: as random numbers of NumPy, another in the recomputation."""
    count = itertools.count(1)
    draw = partial(jax.pure_callback, lambda _: np.float32(next(count)))
    like = jax.ShapeDtypeStruct((), jnp.float32)
    return jnp.sin(x * draw(like, jax.lax.stop_gradient(x.sum())))


def sound(x):
    return jnp.sin(x * 3)


def in_scan(layer):
    body = jax.checkpoint(lambda x, scale: (layer(x) * scale, x.sum()), prevent_cse=False)
    return lambda x: jax.lax.scan(body, x, jnp.arange(1.0, 4.0))[0].sum()


def around_scan(layer):
    loop = lambda x: jax.lax.scan(lambda x, _: (layer(x), None), x, length=3)[0]  # noqa: E731
    return lambda x: jax.checkpoint(loop)(x).sum()


def in_cond(layer):
    take = lambda x: jax.lax.cond(x[0, 0] > 0, layer, lambda x: 2 * x, x)  # noqa: E731
    return lambda x: jax.checkpoint(take)(x).sum()


def nested(layer):
    inner = jax.checkpoint(layer)
    return lambda x: jax.checkpoint(lambda x: inner(inner(x)))(x).sum()


CONSTRUCTS = {
    "plain": lambda layer: lambda x: jax.checkpoint(layer)(x).sum(),
    "layer": jax.checkpoint,
    "jit": lambda layer: jax.jit(lambda x: jax.jit(jax.checkpoint(jax.jit(layer)))(x).sum()),
    "scan": in_scan,
    "around_scan": around_scan,
    "cond": in_cond,
    "nested": nested,
    "none": lambda layer: layer,  # audited as under jax.checkpoint
}
NAMES = [name if name in ("none", "scan") else full(name) for name in CONSTRUCTS]


@pytest.mark.claim("audit_remat looks into loops, branches and jit")
@pytest.mark.parametrize("name", NAMES)
def test_a_value_that_comes_out_otherwise_is_seen(name):
    audit = audit_remat(CONSTRUCTS[name](drifts), jnp.abs(X))
    assert not audit.exact
    first = audit.differing[0]
    assert first.primitive == "pure_callback" and first.mismatches == first.elements
    assert first.elements == (3 if "scan" in name else 1) and first.max_error >= 1
    assert "in drifts" in first.source or "(drifts)" in first.source


@pytest.mark.control("audit_remat looks into loops, branches and jit")
@pytest.mark.parametrize("name", NAMES)
def test_a_sound_function_is_exact_and_something_was_compared(name):
    audit = audit_remat(CONSTRUCTS[name](sound), jnp.abs(X))
    assert audit.exact and audit.gradient_elements == X.size, audit
    assert sum(each.elements for each in audit.recomputed) >= X.size
    assert {each.primitive for each in audit.recomputed} >= {"mul"}


@pytest.mark.full
def test_a_result_that_its_own_derivative_needs_is_seen():
    for fn in (jnp.exp, jnp.tanh, jax.nn.softmax):
        audit = audit_remat(fn, jnp.abs(X))
        assert audit.exact and audit.recomputed, (fn, audit)


def test_nothing_to_look_at_is_said():
    audit = audit_remat(jax.checkpoint(jnp.sin), X)  # its derivative needs x alone
    assert audit.exact and "no recomputed value can be looked at" in str(audit)


@pytest.mark.full
def test_what_is_saved_is_not_recomputed():
    layer = lambda x: jnp.sin(checkpoint_name(x @ x.T, "kept"))  # noqa: E731
    saving = jax.checkpoint_policies.save_only_these_names("kept")
    primitives = [
        {each.primitive for each in audit_remat(jax.checkpoint(layer, policy=p), X).recomputed}
        for p in (None, saving)
    ]
    assert "dot_general" in primitives[0] and "dot_general" not in primitives[1]


@pytest.mark.full
def test_dropout_integers_and_several_arguments():
    def loss(params, x, key, labels):
        @jax.checkpoint
        def layer(w, x):
            keep = jax.random.bernoulli(jax.random.fold_in(key, 1), 0.5, x.shape)
            return jnp.where(keep, jnp.tanh(x @ w), 0)[jnp.arange(4), labels]

        return layer(params["w"], x).sum(), {"aux": labels}

    w = jnp.asarray(np.random.default_rng(1).normal(size=(8, 8)), jnp.float32)
    audit = audit_remat(loss, {"w": w}, X, jax.random.key(0), jnp.arange(4))
    assert audit.exact and audit.gradient_elements == w.size + X.size, audit
    assert "bool[4, 8]" in {each.type for each in audit.recomputed}


# --- mixtures of experts: a flipped bit sends a token elsewhere --------------------------

TOKENS, EXPERTS = 512, 8


def scores(x):
    x = x.astype(jnp.float32)
    return x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True))


def by_values(experts, x):
    """The weight of an expert is what top_k returns."""
    weight, chosen = jax.lax.top_k(scores(x), 1)
    return jax.nn.sigmoid(weight) * experts[checkpoint_name(chosen, "routing")]


def by_choice(experts, x, chosen=None):
    """The weight is read where the choice says."""
    each = scores(x)
    if chosen is None:
        chosen = checkpoint_name(jax.lax.top_k(each, 1)[1], "routing")
    return jax.nn.sigmoid(jnp.take_along_axis(each, chosen, 1)) * experts[chosen]


SAVED = partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names("routing"))


def moe(layer, wrap=jax.checkpoint):
    return lambda experts, x, y: wrap(layer)(experts, x + y).sum()


def plain(layer):
    return layer


def decided_outside(experts, x, y):
    x = x + y
    return jax.checkpoint(by_choice)(experts, x, jax.lax.top_k(scores(x), 1)[1]).sum()


@pytest.fixture(scope="module")
def tokens():
    """experts, and x + y, whose two best experts often tie once rounded to bfloat16."""
    generator = np.random.default_rng(5)
    x, y = generator.uniform(size=(2, TOKENS, EXPERTS))
    x, y = jnp.asarray(1 + x / 8, jnp.bfloat16), jnp.asarray(y / 64, jnp.bfloat16)
    experts = jnp.arange(1.0, EXPERTS + 1)
    best = np.sort(np.asarray((x + y).astype(jnp.float32)))[:, -2:]
    assert np.sum(best[:, 0] == best[:, 1]) > TOKENS / 10
    return experts, x, y


def flipped(audit):
    """Tokens that the recomputation sends elsewhere."""
    return sum(e.mismatches for e in audit.differing if e.type.startswith("int"))


@pytest.mark.control("routing does not flip in the recomputation")
def test_routing_at_a_tie_flips_in_the_recomputation(tokens):
    audit = audit_remat(moe(by_values), *tokens)
    assert flipped(audit) > 5 and audit.gradient_mismatches > 0, audit
    assert any(each.primitive == "top_k" for each in audit.differing)
    # without the audit, too: experts get the gradient of tokens that went to others
    share = [jax.jit(jax.grad(moe(by_values, wrap)))(*tokens) for wrap in (jax.checkpoint, plain)]
    assert np.abs(share[0] - share[1]).max() > 1


@pytest.mark.claim("routing does not flip in the recomputation")
@pytest.mark.parametrize(
    "loss",
    [
        pytest.param(pin_rounding(moe(by_values)), id="pinned"),
        full(moe(by_choice, SAVED), id="saved"),
        full(decided_outside, id="outside"),
    ],
)
def test_what_keeps_a_token_where_it_was(loss, tokens, request):
    audit = audit_remat(loss, *tokens)
    assert flipped(audit) == 0 and audit.recomputed, audit
    assert audit.exact == ("pinned" in request.node.name), audit


@pytest.mark.full
def test_a_choice_saved_beside_values_that_are_not_contradicts_them(tokens):
    """The expert is the forward's, its weight that of the one that would now be chosen."""
    audit = audit_remat(moe(by_values, SAVED), *tokens)
    assert "top_k" in {each.primitive for each in audit.differing}


@pytest.mark.full
def test_ties_of_the_same_bits_are_broken_alike():
    x = jnp.asarray(np.random.default_rng(6).integers(0, 3, (TOKENS, EXPERTS)), jnp.float32)
    audit = audit_remat(moe(by_values), jnp.arange(1.0, EXPERTS + 1), x, x)
    assert flipped(audit) == 0 and "top_k" in {each.primitive for each in audit.recomputed}


# --- what is refused --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: audit_remat(lambda x, how: x, X, "causal"), r"args\[1\] is 'causal'.*partial"),
        (lambda: audit_remat(lambda x: x, {"rate": 0.5}), r"args\[0\]\['rate'\] is 0.5.*asarray"),
        (lambda: audit_remat(lambda n: n, jnp.arange(3)), "args are int32.*pass float arrays"),
        (lambda: audit_remat(lambda x: x > 0, X), "no float array.*loss"),
        (lambda: jax.jit(lambda x: audit_remat(jnp.sin, x).exact)(X), "traced.*outside jit"),
        (lambda: jax.grad(lambda w: audit_remat(lambda x: x * w, X).exact)(1.0), "closes over"),
        (lambda: pin_rounding(jnp.sum)(X, "axis"), r"args\[1\] is 'axis'.*partial"),
        (lambda: pin_rounding(jnp.sum)(X, where="x"), r"kwargs\['where'\] is 'x'.*partial"),
    ],
)
def test_what_cannot_be_audited_is_told(call, told):
    with pytest.raises(ValueError, match=told):
        call()


# --- a residual network -----------------------------------------------------------------


@pytest.mark.full
@pytest.mark.parametrize("pinned", [False, True])
def test_a_bfloat16_network_recomputes_the_same_bits_if_pinned(pinned):
    """Its gradients may still differ: the backward pass itself is fused otherwise."""

    @jax.checkpoint
    def layer(params, x):
        y = jnp.asarray(scores(x), x.dtype) @ params["up"]
        return jax.nn.gelu(y) @ params["down"]

    def loss(params, x):
        for _ in range(2):
            x = x + layer(params, x)
        return jnp.mean(x.astype(jnp.float32) ** 2)

    up, down = np.random.default_rng(1).normal(size=(2, 64, 64)) / 8
    params = {"up": jnp.asarray(up, jnp.bfloat16), "down": jnp.asarray(down, jnp.bfloat16)}
    x = jnp.asarray(np.random.default_rng(2).normal(size=(4, 33, 64)), jnp.bfloat16)
    audit = audit_remat(pin_rounding(loss) if pinned else loss, params, x)
    assert bool(audit.differing) != pinned and audit.recomputed, audit
    assert pinned or not audit.exact
