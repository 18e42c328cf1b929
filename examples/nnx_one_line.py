"""A plain Flax NNX transformer, made reversible by changing one line.

Where the model says Encoder(Block, 12), it now says BDIAStack. python examples/nnx_one_line.py
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from sklearn.datasets import load_digits

import bdia_jax as bdia


class Block(nnx.Module):
    def __init__(self, rngs):
        self.norm1, self.norm2 = nnx.LayerNorm(64, rngs=rngs), nnx.LayerNorm(64, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, 64, decode=False, rngs=rngs)
        self.up, self.down = nnx.Linear(64, 256, rngs=rngs), nnx.Linear(256, 64, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x):
        f = self.attention(self.norm1(x))
        return f + self.down(self.dropout(nnx.gelu(self.up(self.norm2(x + f)))))


class Encoder(nnx.Module):
    def __init__(self, make_block, depth, *, rngs):
        self.blocks = nnx.List([make_block(rngs) for _ in range(depth)])

    def __call__(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x


class Classifier(nnx.Module):
    def __init__(self, encoder, rngs):
        self.rows, self.head = nnx.Linear(8, 64, rngs=rngs), nnx.Linear(512, 10, rngs=rngs)
        self.norm = nnx.LayerNorm(512, rngs=rngs)
        self.encoder = encoder(Block, 12, rngs=rngs)  # Encoder, or bdia.nnx.BDIAStack

    def __call__(self, images):  # [B, 8, 8], a token a row
        return self.head(self.norm(self.encoder(self.rows(images)).reshape(-1, 512)))


@nnx.jit
def train_step(model, optimizer, images, labels):
    def loss_fn(model):
        return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()

    loss, grads = nnx.value_and_grad(loss_fn)(model)
    optimizer.update(model, grads)
    return loss


def main(num_steps=30):
    images, labels = (jnp.float32(a[:1536]) for a in load_digits(return_X_y=True))
    images, labels = images.reshape(6, 256, 8, 8) / 8 - 1, jnp.int32(labels).reshape(6, 256)
    plain, model = (Classifier(e, nnx.Rngs(0)) for e in (Encoder, bdia.nnx.BDIAStack))
    memory = []
    for network in (plain, model):
        optimizer = nnx.Optimizer(network, optax.adam(1e-3), wrt=nnx.Param)
        report = bdia.memory_report(train_step, network, optimizer, images[0], labels[0])
        memory.append(report.temporaries / 2**20)
    print(f"memory of a training step: plain {memory[0]:.0f} MiB, reversible {memory[1]:.0f} MiB")
    assert memory[1] < memory[0] / 3

    for step in range(num_steps):
        loss = train_step(model, optimizer, images[step % 6], labels[step % 6])
        if step % 10 == 0 or step == num_steps - 1:
            print(f"step {step:2d}  loss {loss:.3f}")
    report = model.encoder.audit(model.rows(images[0]))
    print(report)
    assert report.exact and report.mismatches.sum() == 0

    model.eval()  # the plain network: in the plain loop its weights give the same logits
    plain.rows, plain.norm, plain.head = model.rows, model.norm, model.head
    for k, block in enumerate(plain.encoder.blocks):
        weights = nnx.state(model.encoder.blocks, nnx.Param)
        nnx.update(block, jax.tree.map(lambda w, k=k: w[k], weights))
    plain.eval()
    difference = jnp.abs(model(images[0]) - plain(images[0])).max()
    print(f"logits differ from the plain loop's by {difference:.4f} at most")
    assert difference < 0.05  # states are rounded to 2^-9


if __name__ == "__main__":
    main()
