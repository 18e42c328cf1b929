"""Networks under `jax.checkpoint`: which expert a token goes to, and what a layer recomputes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

from bdia_jax import audit_remat, pin_rounding

full = partial(pytest.param, marks=pytest.mark.full)

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
