"""The order of examples: every epoch all of them once, and nothing but (key, step) matters."""

from itertools import chain

import jax
import jax.numpy as jnp
import pytest

from train.data.batches import Batches

pytestmark = pytest.mark.full

KEY = jax.random.key(0)


def seen(batches, steps, key=KEY):
    """(group, example) of every example of every step."""
    out = []
    for step in steps:
        epoch, group, position = batches.locate(jnp.int32(step))
        examples = batches.examples(key, int(group), epoch, position)
        out.append([(int(group), int(example)) for example in examples])
    return out


def flat(steps):
    return list(chain.from_iterable(steps))


def test_every_epoch_sees_every_example_once():
    batches = Batches([20], 5)
    steps = seen(batches, range(8))
    first, second = flat(steps[:4]), flat(steps[4:])
    assert batches.steps_per_epoch == 4
    assert sorted(first) == sorted(second) == [(0, n) for n in range(20)]
    assert first != second
    assert seen(batches, [6]) == [steps[6]]  # a function of the step alone
    assert flat(seen(batches, range(4), jax.random.key(1))) != first


def test_groups_are_mixed_and_each_seen_once():
    batches = Batches([12, 3, 8], 4)  # the small group: a batch of 3
    steps = seen(batches, range(12))
    assert batches.steps_per_epoch == 6
    everything = [(group, n) for group, size in enumerate([12, 3, 8]) for n in range(size)]
    assert sorted(flat(steps[:6])) == sorted(flat(steps[6:])) == everything
    order = [step[0][0] for step in steps]
    assert order[:6] != order[6:] and order[:6] != sorted(order[:6])


def test_incomplete_batch_is_left_out():
    steps = seen(Batches([11], 4), range(4))
    first, second = flat(steps[:2]), flat(steps[2:])
    assert len(set(first)) == len(set(second)) == 8
    assert set(first) != set(second)
