"""ResNet: pre-activation blocks, batch statistics in a reversible stack, memory by depth."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from toy import assert_grads_close, relative_error
from toy_models import F32, drifting_stack, loop

from bdia_jax import residual_bytes
from bdia_jax.models.resnet import BasicBlock, ResNet, Transition
from bdia_jax.nnx import BDIAStack

# tests of exactness ask for `optimized`
pytestmark = [pytest.mark.full, pytest.mark.usefixtures("quick_compile")]
IMAGES, FEATURES = (
    jnp.asarray(np.random.default_rng(0).normal(size=(4, 4, 4, channels)), jnp.float32)
    for channels in (3, 8)
)
SMALL = {"image_shape": (4, 4, 3), "num_classes": 5, "widths": (8, 16), "depths": (2, 3)}


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


def statistics(model):
    return jax.tree.leaves(nnx.state(model, nnx.BatchStat))


@cache
def gradient(backprop):
    """(the leaves of the gradient, the model afterwards) of one step."""
    model = small_resnet(backprop=backprop)
    loss = lambda model: jnp.sum(jnp.sin(model(IMAGES, rngs=nnx.Rngs(1))))  # noqa: E731
    grads = nnx.jit(nnx.grad(loss))(model)
    return jax.tree.leaves(grads), model


# --- the network ---------------------------------------------------------------------


def normalized(x):
    return nnx.relu((x - x.mean((0, 1, 2))) / jnp.sqrt(x.var((0, 1, 2)) + 1e-5))


def convolved(x, layer, stride=1):
    return jax.lax.conv_general_dilated(
        x,
        layer.kernel[...],
        (stride, stride),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def test_a_block_is_pre_activation_and_a_transition_halves():
    block, transition = BasicBlock(8, rngs=nnx.Rngs(0)), Transition(8, 16, rngs=nnx.Rngs(0))

    @nnx.jit
    def both(block, transition):
        active = normalized(FEATURES)
        h = convolved(normalized(convolved(active, block.conv1)), block.conv2)
        inner = normalized(convolved(active, transition.conv1, 2))
        shortcut = active[:, ::2, ::2] @ transition.shortcut.kernel[0, 0]
        y = shortcut + convolved(inner, transition.conv2)
        return (block(FEATURES), transition(FEATURES)), (h, y)

    for actual, expected in zip(*both(block, transition), strict=True):
        np.testing.assert_allclose(actual, expected, atol=1e-4)


def test_the_plain_resnet_is_the_loop_over_its_blocks():
    model = small_resnet(magnitude=0, fixed_point=None, backprop="store")
    model.eval()

    @nnx.jit
    def both(model):
        x = loop(model.stacks[0], model.stem(IMAGES))
        x = loop(model.stacks[1], model.transitions[0](x))
        return model(IMAGES), model.head(nnx.relu(model.norm(x)).mean((1, 2)))

    np.testing.assert_allclose(*both(model), atol=1e-5)


# --- training ------------------------------------------------------------------------


@pytest.mark.claim("gradients equal store's")
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


def audit(stack=BDIAStack):
    make_block = lambda rngs: BasicBlock(8, dtype=jnp.bfloat16, rngs=rngs)  # noqa: E731
    return stack(make_block, 5, rngs=nnx.Rngs(0)).audit(FEATURES)


@pytest.mark.claim("rebuild is exact")
def test_its_blocks_are_rebuilt_exactly(optimized):
    found = audit()
    assert found.exact and found.mismatches.shape == (4,), found


@pytest.mark.control("rebuild is exact")
def test_control_blocks_that_drift_are_not():
    assert not audit(drifting_stack).exact


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


def held(backprop, depths):
    options = SMALL | {"depths": depths, "stack": partial(BDIAStack, backprop=backprop)}
    model = nnx.eval_shape(lambda: ResNet(**options, rngs=nnx.Rngs(0)))
    return sum(residual_bytes(lambda model: model(IMAGES), model).values())


@pytest.mark.claim("memory of a block is its side bits")
@pytest.mark.control("memory of a block is its side bits")
def test_an_added_block_costs_its_side_bits():
    state = 4 * 4 * 4 * 8  # elements, in stage 1
    growth = held("reversible", (8, 2)) - held("reversible", (4, 2))
    # two bits an element, and gamma and random keys, which are smaller than that
    assert state * 2 / 8 <= growth / 4 < state
    stored = held("store", (8, 2)) - held("store", (4, 2))
    assert stored / 4 > 4 * 4 * state


@pytest.mark.parametrize(
    "options, message",
    [
        ({"depths": (1, 1)}, "stage 1 needs at least 2"),
        ({"depths": (1, 2, 2)}, "one of each per stage"),
        ({"image_shape": (5, 4, 3)}, r"\(5, 4, 3\).*divisible by 2"),
        ({}, r"images have shape \(4, 4, 4\)"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        nnx.eval_shape(lambda: ResNet(**(SMALL | options), rngs=nnx.Rngs(0))(IMAGES[..., 0]))
