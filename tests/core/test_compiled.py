"""What stands in compiled programs: no copy of parameters, gradients or optimizer state, and no
pass over the state but those of the recurrence. Programs are read, not run."""

import re
from functools import partial
from math import prod
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

from bdia_jax import FixedPoint, bdia_scan, memory_report
from bdia_jax.fixed_point import dequantize, pack_bits, quantize
from bdia_jax.models.blocks import PreNormBlock
from bdia_jax.models.gpt2 import GPT2
from bdia_jax.nnx import BDIAStack
from bdia_jax.recurrence import step
from configs import gpt2_openwebtext, vit_digits
from train.loop.optimizer import make_optimizer
from train.loop.program import compile_steps, make_program
from train.tasks import open_config
from train.tasks.images import Images, make_task
from train.tasks.task import Task

# --- reading an optimized program ------------------------------------------------------

MOVES = {"copy", "copy-start", "transpose", "slice", "concatenate", "pad", "reverse"}
# no memory of their own
NAMES = {"parameter", "get-tuple-element", "tuple", "bitcast", "while", "call", "constant"}
_INSTRUCTION = re.compile(
    r"\s*(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<dtype>[a-z]\w*)\[(?P<shape>[\d,]*)\]\S* "
    r"(?P<op>[a-z][\w\-]*)\((?:[^%(),]+ )?%?(?P<first>[\w.\-]*)"
)


class Instruction(NamedTuple):
    """ops: its operation, or in case of a fusion all of them, other than NAMES."""

    dtype: str
    shape: tuple[int, ...]
    ops: frozenset[str]

    @property
    def moves(self) -> bool:
        """Whether it does no arithmetic. A block's slice of the parameters is read, not moved."""
        return bool(self.ops & MOVES) and self.ops <= MOVES | {"dynamic-slice"}


class Compiled(NamedTuple):
    """Instructions outside of fusions: all of them, and those of each innermost loop."""

    instructions: list[Instruction]
    loops: list[list[Instruction]]


def read(text: str) -> Compiled:
    """The text of a compiled program, parsed."""
    computations: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if start := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            lines = computations[start[1]] = []
        elif " = " in line:
            lines.append(line)
    inner = {
        name
        for line in text.splitlines()
        if not re.search(r" (call|while|conditional)\(", line)
        for name in re.findall(r"(?:calls|to_apply)=%?([\w.\-]+)", line)
    }

    def operations(name):
        found = (_INSTRUCTION.match(line) for line in computations[name])
        return frozenset(match["op"] for match in found if match) - NAMES

    def instructions(name):
        found: dict[str, Instruction] = {}
        for line in computations[name]:
            match = _INSTRUCTION.match(line)
            if match is None or match["op"] in NAMES:
                continue
            fused = re.search(r" fusion\(.*calls=%?([\w.\-]+)", line)
            ops = operations(fused[1]) if fused else frozenset({match["op"]})
            # several arrays of one shape that begin as zeros: one broadcast and its copies
            if match["op"] == "copy" and match["first"] in found:
                source = found[match["first"]].ops
                ops = source if source == {"broadcast"} else ops
            shape = tuple(int(size) for size in match["shape"].split(",") if size)
            found[match["name"]] = Instruction(match["dtype"], shape, ops)
        return list(found.values())

    bodies = dict.fromkeys(re.findall(r"body=%?([\w.\-]+)", text))
    innermost = [name for name in bodies if " while(" not in "\n".join(computations[name])]
    outside = [name for name in computations if name not in inner]
    return Compiled(
        [instruction for name in outside for instruction in instructions(name)],
        [instructions(name) for name in innermost],
    )


def of_size(instructions, shape):
    """Those with this shape, in any order of its axes."""
    return [i for i in instructions if sorted(i.shape) == sorted(shape)]


def moved(instructions, shapes):
    return [i for shape in shapes for i in of_size(instructions, shape) if i.moves]


# --- gradients of a stack --------------------------------------------------------------

# sizes whose products differ, so that an array is known by its shape
BATCH, TOKENS, WIDTH, HIDDEN, DEPTH = 4, 24, 40, 72, 6
STATE = (BATCH, TOKENS, WIDTH)
X = jax.ShapeDtypeStruct(STATE, jnp.float32)
GAMMA = jax.ShapeDtypeStruct((DEPTH, BATCH), jnp.float32)
MLP = {
    name: jax.ShapeDtypeStruct((DEPTH, *shape), jnp.float32)
    for name, shape in {"w_in": (WIDTH, HIDDEN), "w_out": (HIDDEN, WIDTH)}.items()
}


def mlp_block(params, x):
    return jax.nn.gelu(x @ params["w_in"]) @ params["w_out"]


def compiled_gradient(forward, *args):
    loss = lambda *args: jnp.mean(forward(*args) ** 2)  # noqa: E731
    return read(jax.jit(jax.value_and_grad(loss)).lower(*args).compile().as_text())


def compiled_scan():
    return compiled_gradient(partial(bdia_scan, mlp_block), MLP, X, GAMMA), MLP


def compiled_stack():
    def make():
        block = partial(PreNormBlock, WIDTH, 2, HIDDEN)
        return BDIAStack(lambda rngs: block(rngs=rngs), DEPTH, rngs=nnx.Rngs(0))

    graphdef, params, rest = nnx.split(nnx.eval_shape(make), nnx.Param, ...)

    def forward(params, rest, x):
        return nnx.merge(graphdef, params, rest)(x, rngs=nnx.Rngs(1))

    return compiled_gradient(forward, params, rest, X), params


@pytest.fixture(scope="module", params=[compiled_scan, compiled_stack], ids=["scan", "stack"])
def gradient(request):
    """(the compiled gradient, shapes of the stacked matrices)."""
    compiled, params = request.param()
    return compiled, {leaf.shape for leaf in jax.tree.leaves(params) if leaf.ndim == 3}


def passes(compiled):
    """The forward loop and the loop of the backward pass."""
    writes_bits = [any(i.dtype == "u8" for i in loop) for loop in compiled.loops]
    forward = [loop for loop, writes in zip(compiled.loops, writes_bits, strict=True) if writes]
    backward = [loop for loop in compiled.loops if stacked_writes(loop)]
    assert len(forward) == len(backward) == 1
    return forward[0], backward[0]


def stacked_writes(instructions):
    """Arrays [K, ., .] written block by block."""
    writes = (i for i in instructions if "dynamic-update-slice" in i.ops and i.dtype == "f32")
    return [i for i in writes if len(i.shape) == 3 and i.shape[0] == DEPTH]


def test_of_all_parameters_and_gradients_there_is_no_copy(gradient):
    compiled, stacked_shapes = gradient
    for shape in stacked_shapes:
        found = of_size(compiled.instructions, shape)
        writes = [i for i in found if "dynamic-update-slice" in i.ops]
        # gradients: zeros once, and every block's written in place
        assert writes
        assert all(i.ops <= {"broadcast"} for i in found if i not in writes), found


def test_of_one_blocks_parameters_and_gradients_there_is_no_copy(gradient):
    compiled, stacked_shapes = gradient
    for loop in passes(compiled):
        assert not moved(loop, {shape[1:] for shape in stacked_shapes})


def test_control_a_slice_of_the_parameters_is_a_copy_of_them():
    def first_block_apart(params, x, gamma):
        head, tail = (jax.tree.map(lambda p, at=at: p[at], params) for at in (0, slice(1, None)))
        h = mlp_block(head, x)
        return bdia_scan(mlp_block, tail, x + h, gamma[1:].at[0].set(0.0))

    compiled = compiled_gradient(first_block_apart, MLP, X, GAMMA)
    tails = {(DEPTH - 1, *leaf.shape[1:]) for leaf in MLP.values()}
    assert moved(compiled.instructions, tails | {leaf.shape for leaf in MLP.values()})


def test_control_a_transposed_copy_of_a_blocks_parameters_is_seen():
    def block(params, x):
        w_in = jax.lax.optimization_barrier(params["w_in"].T)
        return jax.nn.gelu(x @ w_in.T) @ params["w_out"]

    compiled = compiled_gradient(partial(bdia_scan, block), MLP, X, GAMMA)
    assert moved(passes(compiled)[0], {(WIDTH, HIDDEN)})


def integer_states(loop):
    """int32 [B, T, D] that is computed, not copied."""
    return [i for i in of_size(loop, STATE) if i.dtype == "s32" and not i.moves]


def side_bits(loop):
    return [i for i in loop if i.dtype in ("u8", "s8")]


def test_forward_the_state_is_computed_once_and_packed_in_one_more_pass(gradient):
    forward, _ = passes(gradient[0])
    assert len(integer_states(forward)) == 1
    (packed,) = side_bits(forward)
    assert "dynamic-update-slice" in packed.ops and prod(packed.shape) == DEPTH * prod(STATE) // 4


def test_backward_unpacking_and_rebuilding_are_one_pass(gradient):
    _, backward = passes(gradient[0])
    assert len(integer_states(backward)) == 1
    assert not side_bits(backward)


def test_control_a_pass_of_its_own_for_the_bits_is_seen():
    def scan(params, x0, gamma):
        def body(carry, inputs):
            n_prev, n = carry
            params_k, gamma_k = inputs
            h = mlp_block(params_k, dequantize(n, fp))
            n_next, side, _ = step(n_prev, n, h, gamma_k[:, None, None], fp)
            side = jax.lax.sort(side)  # nothing fuses with a sort
            return (n, n_next), pack_bits(side, fp.side_bits)

        fp = FixedPoint()
        n0 = quantize(x0, fp)
        return jax.lax.scan(body, (n0, n0), (params, gamma))

    compiled = read(jax.jit(scan).lower(MLP, X, GAMMA).compile().as_text())
    (loop,) = [loop for loop in compiled.loops if side_bits(loop)]
    assert len(integer_states(loop)) > 1


def test_copies_of_the_state_are_those_of_the_loop_alone(gradient):
    # (n_{k-1}, n_k) becomes (n_k, n_{k+1}): XLA copies what changes its place in the carry.
    # The forward loop carries two states, the backward loop two and two cotangents.
    forward, backward = passes(gradient[0])
    for loop, most in ((forward, 3), (backward, 6)):
        assert len([i for i in of_size(loop, STATE) if i.ops == {"copy"}]) <= most


# --- the training program --------------------------------------------------------------

VIT = {"width": 64, "depth": 8, "num_heads": 2, "mlp_dim": 96}


def vit_program(optimizer):
    values = vit_digits.get_config("smoke").unlock()
    values.update({"batch_size": 2, "optimizer": optimizer, "model": VIT})
    config = open_config(values.lock())
    images = Images(jnp.zeros((4, 8, 8, 1), jnp.uint8), jnp.zeros(4, jnp.int32))
    task = make_task(config, images, images, num_classes=10)
    return make_program(config, task), task


def gpt2_program(optimizer):
    values = gpt2_openwebtext.get_config("smoke").unlock()
    values.update({"batch_size": 2, "optimizer": optimizer})
    values.model.update(VIT | {"dtype": "float32"})
    config = open_config(values.lock())

    def make_model(rngs):
        return GPT2(300, 16, **config.model_arguments, rngs=rngs)

    def metrics(model, tokens, rngs):
        loss = model.loss(model.features(tokens[:, :-1], rngs=rngs), tokens[:, 1:])
        return {"loss": (loss.sum(-1), jnp.full(len(loss), 16.0))}

    examples = (jnp.zeros((4, 17), jnp.int32),)
    task = Task(examples, examples, make_model, metrics)
    return make_program(config, task), task


@pytest.fixture(
    scope="module",
    params=[(vit_program, "set_adam"), (gpt2_program, "adamw")],
    ids=["vit-set_adam", "gpt2-adamw"],
)
def program(request):
    """(the program, its task, its compiled steps)."""
    make, optimizer = request.param
    made, task = make(optimizer)
    return made, task, compile_steps(made)


def size_in_bytes(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def matrices(tree):
    return {leaf.shape for leaf in jax.tree.leaves(tree) if leaf.ndim >= 2 and leaf.size > 2000}


def test_a_step_writes_the_whole_state_over_the_old_one(program):
    made, _, compiled = program
    report = memory_report(compiled)
    state = jax.eval_shape(made.init)
    assert report.aliased == size_in_bytes(state)


def test_a_step_copies_neither_parameters_nor_moments(program):
    made, _, compiled = program
    shapes = matrices(jax.eval_shape(made.init))
    assert len(shapes) >= 3
    assert moved(read(compiled.as_text()).instructions, shapes) == []


def test_beyond_the_gradients_a_step_needs_no_second_copy_of_the_parameters(program):
    made, _, compiled = program
    params = size_in_bytes(jax.eval_shape(made.init)["params"])
    assert memory_report(compiled).temporaries < 1.6 * params


def test_clipping_keeps_no_second_copy_of_the_gradients():
    values = vit_digits.get_config("smoke").unlock()
    values.update({"optimizer": "adamw", "weight_decay": 0.1})
    params = {name: jax.ShapeDtypeStruct((DEPTH, 64, 96), jnp.float32) for name in ("v", "w")}

    def temporaries(clip_norm, before=None):
        values.grad_clip_norm = clip_norm
        tx = make_optimizer(open_config(values), {"v": True, "w": True})
        tx = optax.chain(before or optax.identity(), tx)

        def update(state, grads):  # the state first and last: donated arrays go by their order
            params, opt_state = state
            updates, opt_state = tx.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        state = params, jax.eval_shape(tx.init, params)
        return memory_report(jax.jit(update, donate_argnums=0), state, params).temporaries

    gradients = size_in_bytes(params)
    assert temporaries(1.0) < 0.01 * gradients
    assert temporaries(0.0, optax.clip_by_global_norm(1.0)) >= gradients  # the control


def test_control_a_step_that_keeps_the_old_state_copies_it():
    made, _ = vit_program("set_adam")
    kept = made._replace(train_steps=jax.jit(made.train_steps.__wrapped__))
    compiled = compile_steps(kept)
    state = jax.eval_shape(made.init)
    assert memory_report(compiled).aliased == 0
    assert moved(read(compiled.as_text()).instructions, matrices(state))
