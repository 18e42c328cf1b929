"""A Flax Linen language model over BDIAStack that learns Flax's source: python examples/linen.py"""

import inspect
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import bdia_jax as bdia

LENGTH, WIDTH = 64, 64
PLAIN = {"magnitude": 0.0, "fixed_point": None, "backprop": "store"}


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, mask, deterministic):
        f = nn.MultiHeadDotProductAttention(4)(nn.LayerNorm()(x), mask=mask)
        hidden = nn.gelu(nn.Dense(4 * WIDTH)(nn.LayerNorm()(x + f)))
        return f + nn.Dense(WIDTH)(nn.Dropout(0.1)(hidden, deterministic=deterministic))


class LanguageModel(nn.Module):
    stack: nn.Module

    @nn.compact
    def __call__(self, tokens, deterministic):
        positions = self.param("positions", nn.initializers.normal(0.1), (LENGTH, WIDTH))
        x = nn.Embed(128, WIDTH)(tokens) + positions
        # for _ in range(12): x = x + Block()(x, mask, deterministic)
        x = self.stack(x, nn.make_causal_mask(tokens[:1]), deterministic=deterministic)
        return nn.Dense(128)(nn.LayerNorm()(x))


@partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
def train_step(model, params, opt_state, tokens, key):
    def loss_fn(params):
        rngs = {"gamma": jax.random.fold_in(key, 0), "dropout": jax.random.fold_in(key, 1)}
        logits = model.apply({"params": params}, tokens, deterministic=False, rngs=rngs)[:, :-1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    loss, grads = jax.value_and_grad(loss_fn)(params)
    updates, opt_state = optax.adam(1e-3).update(grads, opt_state)
    return optax.apply_updates(params, updates), opt_state, loss


def main(num_steps=30):
    text = inspect.getsource(nn.linear).encode("ascii", "replace")[: 480 * LENGTH]
    rows, key = jnp.array(list(text)).reshape(480, LENGTH), jax.random.key(0)
    plain, model = (
        LanguageModel(bdia.linen.BDIAStack(Block(), 12, **options)) for options in (PLAIN, {})
    )
    params = model.init(key, rows[:1], deterministic=True)["params"]
    opt_state, memory = optax.adam(1e-3).init(params), []
    for network in (plain, model):
        report = bdia.memory_report(train_step, network, params, opt_state, rows[:16], key)
        memory.append(report.temporaries / 2**20)
    print(f"memory of a training step: plain {memory[0]:.0f} MiB, reversible {memory[1]:.0f} MiB")
    assert memory[1] < memory[0] / 3

    for step in range(num_steps):
        here, key_now = rows[16 * step :][:16], jax.random.fold_in(key, step)
        params, opt_state, loss = train_step(model, params, opt_state, here, key_now)
        if step % 10 == 0 or step == num_steps - 1:
            print(f"step {step:2d}  loss {loss:.3f}")

    # the audit takes the block as a function of one slice of the stacked parameters, and its key
    def block_fn(slice_k, x, mask, deterministic=False):
        weights_k, key = slice_k
        return Block().apply({"params": weights_k}, x, mask, deterministic, rngs={"dropout": key})

    x, mask = jax.random.normal(key, (16, LENGTH, WIDTH)), nn.make_causal_mask(rows[:1])
    weights = params["stack"]["blocks"], jax.random.split(key, 12)
    report = bdia.audit(block_fn, weights, x, bdia.sample_gamma(key, 12, 16), mask)
    print(report)
    assert report.exact and report.mismatches.sum() == 0

    # deterministic, it is the plain network: the loop above over slices of the same weights
    x_last = model.stack.apply({"params": params["stack"]}, x, mask, deterministic=True)
    loop = jax.lax.scan(lambda x, w: (x + block_fn(w, x, mask, True), None), x, weights)[0]
    print(f"x_K differs from the plain loop's by {jnp.abs(x_last - loop).max():.4f} at most")
    assert jnp.abs(x_last - loop).max() < 0.1  # states are rounded to 2^-9


if __name__ == "__main__":
    main()
