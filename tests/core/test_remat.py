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
