"""What stands in compiled programs: no copy of parameters, gradients or optimizer state, and no
pass over the state but those of the recurrence. Programs are read, not run."""

from functools import partial
from math import prod

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

from bdia_jax import FixedPoint, bdia_scan, memory_report
from bdia_jax.compiled.hlo import read
from bdia_jax.fixed_point import dequantize, pack_bits, quantize
from bdia_jax.models.blocks import PreNormBlock
from bdia_jax.models.gpt2 import GPT2
from bdia_jax.nnx import BDIAStack
from bdia_jax.recurrence import step
from configs import gpt2_openwebtext, vit_digits
from train.loop.optimizer import make_optimizer
from train.loop.program import compile_steps, make_program
from train.tasks import open_config
from train.tasks.task import Task


def of_size(kernels, shape):
    """Those that write this shape, in any order of its axes."""
    return [kernel for kernel in kernels if sorted(kernel.shape) == sorted(shape)]


def moved(kernels, shapes):
    return [kernel for shape in shapes for kernel in of_size(kernels, shape) if kernel.moves]


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


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(compiled_scan, id="scan"),
        pytest.param(compiled_stack, id="stack", marks=pytest.mark.full),
    ],
)
def gradient(request):
    """(the compiled gradient, shapes of the stacked matrices)."""
    compiled, params = request.param()
    return compiled, {leaf.shape for leaf in jax.tree.leaves(params) if leaf.ndim == 3}


def passes(compiled):
    """The forward loop, which writes side bits, and the backward one, which writes gradients."""
    loops = compiled.loops()
    (forward,) = (loop for loop in loops if any(kernel.dtype == "u8" for kernel in loop))
    (backward,) = (loop for loop in loops if stacked_writes(loop))
    return forward, backward


def stacked_writes(kernels):
    """Arrays [K, ., .] written block by block."""
    writes = (k for k in kernels if "dynamic-update-slice" in k.ops and k.dtype == "f32")
    return [k for k in writes if len(k.shape) == 3 and k.shape[0] == DEPTH]


@pytest.mark.claim("no copy of parameters in the compiled gradient")
def test_of_parameters_and_gradients_there_is_no_copy(gradient):
    compiled, stacked_shapes = gradient
    for shape in stacked_shapes:
        found = of_size(compiled.kernels(), shape)
        writes = [kernel for kernel in found if "dynamic-update-slice" in kernel.ops]
        # gradients: zeros once, and every block's written in place
        assert writes
        assert all(kernel.ops <= {"broadcast"} for kernel in found if kernel not in writes), found
    for loop in passes(compiled):
        assert not moved(loop, {shape[1:] for shape in stacked_shapes})


@pytest.mark.control("no copy of parameters in the compiled gradient")
def test_a_slice_of_all_parameters_and_a_transposed_copy_of_a_blocks_are_seen():
    def transposed(params, x):
        w_in = jax.lax.optimization_barrier(params["w_in"].T)
        return jax.nn.gelu(x @ w_in.T) @ params["w_out"]

    def first_block_apart(params, x, gamma):
        head, tail = (jax.tree.map(lambda p, at=at: p[at], params) for at in (0, slice(1, None)))
        h = mlp_block(head, x)
        return bdia_scan(transposed, tail, x + h, gamma[1:].at[0].set(0.0))

    compiled = compiled_gradient(first_block_apart, MLP, X, GAMMA)
    tails = {(DEPTH - 1, *leaf.shape[1:]) for leaf in MLP.values()}
    assert moved(compiled.kernels(), tails | {leaf.shape for leaf in MLP.values()})
    (forward,) = (loop for loop in compiled.loops() if side_bits(loop))
    assert moved(forward, {(WIDTH, HIDDEN)})


def integer_states(loop):
    """int32 [B, T, D] that is computed, not copied."""
    return [k for k in of_size(loop, STATE) if k.dtype == "s32" and not k.moves]


def side_bits(loop):
    return [kernel for kernel in loop if kernel.dtype in ("u8", "s8")]


@pytest.mark.claim("a block takes one pass over the state")
def test_packing_is_one_more_pass_and_unpacking_and_rebuilding_are_one(gradient):
    forward, backward = passes(gradient[0])
    assert len(integer_states(forward)) == len(integer_states(backward)) == 1
    (packed,) = side_bits(forward)
    assert "dynamic-update-slice" in packed.ops and prod(packed.shape) == DEPTH * prod(STATE) // 4
    assert not side_bits(backward)


@pytest.mark.control("a block takes one pass over the state")
def test_a_pass_of_its_own_for_the_bits_is_seen():
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
    (loop,) = (loop for loop in compiled.loops() if side_bits(loop))
    assert len(integer_states(loop)) > 1


def test_copies_of_the_state_are_those_of_the_loop_alone(gradient):
    # (n_{k-1}, n_k) becomes (n_k, n_{k+1}): XLA copies what changes its place in the carry.
    # The forward loop carries two states, the backward loop two and two cotangents.
    for loop, most in zip(passes(gradient[0]), (3, 6), strict=True):
        assert len([kernel for kernel in of_size(loop, STATE) if kernel.ops == {"copy"}]) <= most


# --- the training program --------------------------------------------------------------

SIZES = {"width": 64, "depth": 8, "num_heads": 2, "mlp_dim": 96}


def gpt2_program(optimizer):
    values = gpt2_openwebtext.get_config("smoke").unlock()
    values.update({"batch_size": 2, "optimizer": optimizer})
    values.model.update(SIZES | {"dtype": "float32"})
    config = open_config(values.lock())

    def make_model(rngs):
        return GPT2(300, 16, **config.model_arguments, rngs=rngs)

    def metrics(model, tokens, rngs):
        loss = model.loss(model.features(tokens[:, :-1], rngs=rngs), tokens[:, 1:])
        return {"loss": (loss.sum(-1), jnp.full(len(loss), 16.0))}

    examples = (jnp.zeros((4, 17), jnp.int32),)
    return make_program(config, Task(examples, examples, make_model, metrics))


@pytest.fixture(scope="module")
def program():
    """(the program, its compiled steps)."""
    made = gpt2_program("adamw")
    return made, compile_steps(made)


def size_in_bytes(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def copied(compiled, state):
    """Kernels that move parameters or moments."""
    shapes = {leaf.shape for leaf in jax.tree.leaves(state) if leaf.ndim >= 2 and leaf.size > 2000}
    assert len(shapes) >= 3
    return moved(read(compiled.as_text()).kernels(), shapes)


@pytest.mark.full
@pytest.mark.claim("no copy of parameters in the compiled step")
def test_a_step_writes_the_state_over_the_old_one_and_copies_none_of_it(program):
    made, compiled = program
    report, state = memory_report(compiled), jax.eval_shape(made.init)
    assert report.aliased == size_in_bytes(state)
    assert copied(compiled, state) == []
    # beyond the gradients it needs no second copy of the parameters
    assert report.temporaries < 1.6 * size_in_bytes(state["params"])


@pytest.mark.full
@pytest.mark.control("no copy of parameters in the compiled step")
def test_a_step_that_keeps_the_old_state_copies_it():
    made = gpt2_program("adamw")
    compiled = compile_steps(made._replace(train_steps=jax.jit(made.train_steps.__wrapped__)))
    assert memory_report(compiled).aliased == 0
    assert copied(compiled, jax.eval_shape(made.init))


@pytest.mark.claim("clipping keeps no second copy of the gradients")
@pytest.mark.control("clipping keeps no second copy of the gradients")
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
