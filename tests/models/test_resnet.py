from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from toy import GRAD_TOLERANCE, assert_grads_close, relative_error

from bdia_jax.models.resnet import BasicBlock, ResNet, Transition
from bdia_jax.nnx import BDIAStack

pytestmark = pytest.mark.usefixtures("quick_compile")  # tests of exactness ask for `optimized`
F32 = GRAD_TOLERANCE[jnp.dtype(jnp.float32)]
IMAGES = jax.random.normal(jax.random.key(1), (4, 4, 4, 3))
SMALL = {"image_shape": (4, 4, 3), "num_classes": 5, "widths": (8, 16), "depths": (2, 3)}
PLAIN = {"magnitude": 0, "fixed_point": None, "backprop": "store"}


@cache
def initialized():
    return nnx.split(ResNet(**SMALL, rngs=nnx.Rngs(0)))


def small_resnet(**attributes):
    """The same initial model every time, its stacks with these attributes."""
    model = nnx.merge(*initialized(), copy=True)
    for stack in model.stacks:
        for name, value in attributes.items():
            setattr(stack, name, value)
    return model


def loss(model):
    return jnp.sum(jnp.sin(model(IMAGES, rngs=nnx.Rngs(1))))


def statistics(model):
    return jax.tree.leaves(nnx.state(model, nnx.BatchStat))


@cache
def gradient(backprop):
    """(the leaves of the gradient, the model afterwards) of one step."""
    model = small_resnet(backprop=backprop)
    grads = nnx.jit(nnx.grad(loss))(model)
    return jax.tree.leaves(grads), model


# --- the network ---------------------------------------------------------------------


def test_the_default_has_fifteen_blocks_and_the_parameters_they_say():
    model = nnx.eval_shape(lambda: ResNet(rngs=nnx.Rngs(0)))
    assert sum(s.depth for s in model.stacks) + len(model.transitions) == 15

    def block(before, after):
        return 2 * before + 9 * before * after + 2 * after + 9 * after * after

    expected = (
        9 * 3 * 64
        + 5 * block(64, 64)
        + (block(64, 128) + 64 * 128)
        + 4 * block(128, 128)
        + (block(128, 256) + 128 * 256)
        + 4 * block(256, 256)
        + 2 * 256
        + (256 * 10 + 10)
    )
    counted = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert counted == expected == 7_427_146
    logits = nnx.eval_shape(lambda: ResNet(rngs=nnx.Rngs(0))(jnp.ones((2, 32, 32, 3))))
    assert logits.shape == (2, 10) and logits.dtype == jnp.float32


def normalized(x):
    return nnx.relu((x - x.mean((0, 1, 2))) / jnp.sqrt(x.var((0, 1, 2)) + 1e-5))


def convolved(x, layer, stride=1):
    layout = ("NHWC", "HWIO", "NHWC")
    strides = (stride, stride)
    return jax.lax.conv_general_dilated(
        x, layer.kernel[...], strides, "SAME", dimension_numbers=layout
    )


def test_a_block_is_pre_activation_and_a_transition_halves():
    block, transition = BasicBlock(8, rngs=nnx.Rngs(0)), Transition(8, 16, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 4, 4, 8))

    @nnx.jit
    def both(block, transition):
        inner = normalized(convolved(normalized(x), block.conv1))
        h = convolved(inner, block.conv2)
        active = normalized(x)
        inner = normalized(convolved(active, transition.conv1, 2))
        shortcut = active[:, ::2, ::2] @ transition.shortcut.kernel[0, 0]
        y = shortcut + convolved(inner, transition.conv2)
        return (block(x), transition(x)), (h, y)

    for actual, expected in zip(*both(block, transition), strict=True):
        np.testing.assert_allclose(actual, expected, atol=1e-4)


def test_the_plain_resnet_is_the_loop_over_its_blocks():
    model = small_resnet(**PLAIN)
    model.eval()

    @nnx.jit
    def both(model):
        x = model.stem(IMAGES)
        for stage, stack in enumerate(model.stacks):
            if stage:
                x = model.transitions[stage - 1](x)
            graphdef, state = nnx.split(stack.blocks)
            for k in range(stack.depth):
                x = x + nnx.merge(graphdef, jax.tree.map(lambda leaf, k=k: leaf[k], state))(x)
        return model(IMAGES), model.head(nnx.relu(model.norm(x)).mean((1, 2)))

    np.testing.assert_allclose(*both(model), atol=1e-5)


# --- training ------------------------------------------------------------------------


def test_every_gradient_equals_store():
    assert len(gradient("reversible")[0]) == 2 * 6 + 7 + 1 + 2 + 2
    assert_grads_close(gradient("reversible")[0], gradient("store")[0], F32)


def test_a_step_updates_the_statistics_once():
    stepped, stored = (statistics(gradient(b)[1]) for b in ("reversible", "store"))
    model = small_resnet()
    before = statistics(model)
    run = nnx.jit(lambda model: model(IMAGES, rngs=nnx.Rngs(1)))
    run(model)
    once = statistics(model)
    run(model)
    twice = statistics(model)
    assert len(once) == 14
    for leaves in zip(stepped, stored, once, twice, before, strict=True):
        after, by_store, by_forward, by_two, unused = (np.asarray(leaf) for leaf in leaves)
        np.testing.assert_allclose(after, by_forward, atol=1e-6)
        np.testing.assert_allclose(after, by_store, atol=1e-6)
        assert relative_error(after, by_two) > 1e-3  # a second update would show
        assert np.any(after != unused)
    # the transition, which is evaluated again under remat: one update of momentum 0.9
    fresh = small_resnet()
    x = fresh.stacks[0](fresh.stem(IMAGES), rngs=nnx.Rngs(1))
    mean = gradient("reversible")[1].transitions[0].norm1.mean[...]
    np.testing.assert_allclose(mean, 0.1 * x.mean((0, 1, 2)), atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_its_blocks_are_rebuilt_exactly(dtype, optimized):
    stack = BDIAStack(partial(_basic_block, dtype), 5, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (4, 4, 4, 8))
    audit = stack.audit(x)
    assert audit.exact and audit.mismatches.shape == (4,), audit


def _basic_block(dtype, rngs):
    return BasicBlock(8, dtype=dtype, rngs=rngs)


def test_inference_takes_the_running_statistics():
    model = small_resnet()
    model.eval()
    before = statistics(model)
    run = nnx.jit(lambda model: (model(IMAGES[:1]), model(IMAGES)))
    alone, together = run(model)
    np.testing.assert_allclose(alone, together[:1], atol=2e-2)  # a quantum may differ
    for a, b in zip(statistics(model), before, strict=True):
        np.testing.assert_array_equal(a, b)
    model.train()
    alone, together = run(model)
    assert relative_error(alone, together[:1]) > 0.1


def residual_bytes(backprop, depths):
    """What jax.vjp holds for the backward pass, beyond parameters and statistics."""
    stack = partial(BDIAStack, backprop=backprop)
    options = SMALL | {"depths": depths, "stack": stack}
    model = nnx.eval_shape(lambda: ResNet(**options, rngs=nnx.Rngs(0)))
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def vjp(params, rest):
        run = lambda params: nnx.merge(graphdef, params, rest, copy=True)(IMAGES)  # noqa: E731
        return jax.vjp(run, params)[1]

    leaves = jax.tree.leaves(jax.eval_shape(vjp, params, rest))
    held = jax.tree.leaves((params, nnx.state(model, nnx.BatchStat)))
    return sum(y.size * y.dtype.itemsize for y in leaves) - sum(y.size * 4 for y in held)


def test_an_added_block_costs_its_side_bits():
    state = 4 * 4 * 4 * 8  # elements, in stage 1
    growth = residual_bytes("reversible", (8, 2)) - residual_bytes("reversible", (4, 2))
    # two bits an element, and gamma and random keys, which are smaller than that
    assert state * 2 / 8 <= growth / 4 < state
    control = residual_bytes("store", (8, 2)) - residual_bytes("store", (4, 2))
    assert control / 4 > 4 * 4 * state


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"images have shape \(4, 4, 4\)"):
        small_resnet()(IMAGES[..., 0])
    for options, message in [
        ({"depths": (1, 1)}, "stage 1 needs at least 2"),
        ({"depths": (1, 2, 2)}, "one of each per stage"),
        ({"image_shape": (5, 4, 3)}, r"\(5, 4, 3\).*divisible by 2"),
    ]:
        with pytest.raises(ValueError, match=message):
            ResNet(**(SMALL | options), rngs=nnx.Rngs(0))
