"""A diffusion model of digits: conditioning, a mixture of experts with its loss, and dropout.

All three pass through BDIAStack unchanged. python examples/conditioned_moe.py
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from sklearn.datasets import load_digits

import bdia_jax as bdia


class Block(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(64, use_scale=False, use_bias=False, rngs=rngs)
        self.scales = nnx.Linear(64, 128, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, 64, decode=False, rngs=rngs)
        self.router = nnx.Linear(64, 4, use_bias=False, rngs=rngs)
        self.up = nnx.Param(rngs.params.normal((4, 64, 128)) / 8)
        self.down = nnx.Param(rngs.params.normal((4, 128, 64)) / 32)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x, condition):  # returns what it adds to x, and its load-balancing loss
        scale_f, scale_g = jnp.split(1 + self.scales(nnx.silu(condition))[:, None], 2, axis=-1)
        f = self.attention(self.norm(x) * scale_f)
        y = self.norm(x + f) * scale_g
        probs = nnx.softmax(self.router(y))  # [B, T, 4 experts], one a token
        chosen = jax.nn.one_hot(probs.argmax(-1), 4)
        hidden = (
            nnx.gelu(jnp.einsum("btd,edh->bteh", y, self.up[...])) * (probs * chosen)[..., None]
        )
        balance = 4 * jnp.sum(chosen.mean((0, 1)) * probs.mean((0, 1)))
        return f + self.dropout(jnp.einsum("bteh,ehd->btd", hidden, self.down[...])), balance


class Denoiser(nnx.Module):
    def __init__(self, rngs):
        self.rows, self.pixels = nnx.Linear(8, 64, rngs=rngs), nnx.Linear(64, 8, rngs=rngs)
        self.label, self.time = nnx.Embed(10, 64, rngs=rngs), nnx.Linear(1, 64, rngs=rngs)
        self.stack = bdia.nnx.BDIAStack(Block, 12, rngs=rngs, has_aux=True)
        self.norm = nnx.LayerNorm(64, rngs=rngs)

    def __call__(self, mixed, labels, time):
        condition = self.label(labels) + self.time(time[:, None])
        x, balance = self.stack(self.rows(mixed), condition)  # balance: [12], one a block
        return self.pixels(self.norm(x)), balance.mean()


@nnx.jit
def train_step(model, optimizer, mixed, labels, time, noise):
    def loss_fn(model):
        predicted, balance = model(mixed, labels, time)
        return jnp.mean((predicted - noise) ** 2) + 0.01 * balance

    loss, grads = nnx.value_and_grad(loss_fn)(model)
    optimizer.update(model, grads)
    return loss


def main(num_steps=30):
    images, labels = (jnp.asarray(a[:1536]) for a in load_digits(return_X_y=True))
    images, labels = images.reshape(6, 256, 8, 8) / 8.0 - 1, labels.reshape(6, 256)
    noise = jax.random.normal(jax.random.key(0), images.shape)
    time = jax.random.uniform(jax.random.key(1), (6, 256, 1, 1))
    batches = (1 - time) * images + time * noise, labels, time[..., 0, 0], noise
    model = Denoiser(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
    stack, memory = model.stack, []
    plain, reversible = (0, None, "store"), (0.5, bdia.FixedPoint(), "reversible")
    for stack.magnitude, stack.fixed_point, stack.backprop in (plain, reversible):
        report = bdia.memory_report(train_step, model, optimizer, *(a[0] for a in batches))
        memory.append(report.temporaries / 2**20)
    print(f"memory of a training step: plain {memory[0]:.0f} MiB, reversible {memory[1]:.0f} MiB")
    assert memory[1] < memory[0] / 3

    for step in range(num_steps):
        loss = train_step(model, optimizer, *(a[step % 6] for a in batches))
        if step % 10 == 0 or step == num_steps - 1:
            print(f"step {step:2d}  loss {loss:.3f}")

    x, condition = model.rows(batches[0][0]), model.label(labels[0])
    report = stack.audit(x, condition)
    print(report)
    assert report.exact and report.mismatches.sum() == 0

    model.eval()  # the plain network; unrounded, as rounding may send a token to another expert
    _, stack.fixed_point, stack.backprop = plain
    graphdef, weights = nnx.split(stack.blocks)

    def loop(x, weights_k):
        return x + nnx.merge(graphdef, weights_k)(x, condition)[0], None

    difference = jnp.abs(stack(x, condition)[0] - jax.lax.scan(loop, x, weights)[0]).max()
    print(f"x_K differs from the plain loop's by {difference:.1e} at most")
    assert difference < 1e-2


if __name__ == "__main__":
    main()
