"""memory_report and residual_bytes, against sizes that can be counted by hand."""

from functools import cache, partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from bdia_jax import FixedPoint, MemoryReport, bdia_scan, memory_report, residual_bytes
from bdia_jax.nnx import BDIAStack

BATCH, TOKENS, WIDTH, HIDDEN, DEPTH = 4, 32, 32, 128, 12
STATE = BATCH * TOKENS * WIDTH
W = jax.ShapeDtypeStruct((WIDTH, HIDDEN), jnp.float32)
X = jax.ShapeDtypeStruct((BATCH, TOKENS, WIDTH), jnp.float32)
SLACK = 256  # tuples of pointers, and alignment


def step(w, x):
    return w - 0.1 * jnp.sum(x), jnp.sum(x)


def tanh_mlp(params, x):
    return jnp.tanh(x @ params["w_in"]) @ params["w_out"]


def loss_of(backprop, fixed_point=FixedPoint()):
    def loss(params, x0, gamma):
        x = bdia_scan(tanh_mlp, params, x0, gamma, fixed_point=fixed_point, backprop=backprop)
        return jnp.sum(x**2)

    return loss


def abstract_stack():
    """(params, x0, gamma)."""
    sizes = {"w_in": (DEPTH, WIDTH, HIDDEN), "w_out": (DEPTH, HIDDEN, WIDTH)}
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in sizes.items()}
    return params, X, jax.ShapeDtypeStruct((DEPTH, BATCH), jnp.float32)


@cache
def gradient_report(backprop):
    return memory_report(jax.grad(loss_of(backprop)), *abstract_stack())


# --- memory_report ---------------------------------------------------------------------


def test_arguments_and_outputs_are_the_bytes_of_the_arrays():
    report = memory_report(step, W, X)
    assert report.arguments == 4 * (W.size + X.size)
    assert 0 <= report.outputs - 4 * (W.size + 1) <= SLACK
    assert report.aliased == 0
    assert report.total == report.arguments + report.outputs + report.temporaries


def test_what_is_donated_is_not_needed_twice():
    kept, donated = (memory_report(jax.jit(step, donate_argnums=n), W, X) for n in ((), (0,)))
    assert donated.aliased == 4 * W.size
    assert (kept - donated).total == 4 * W.size
    assert (kept - kept).total == 0


def test_static_arguments_and_keywords_reach_the_function():
    grow = jax.jit(lambda x, count, *, scale: scale * jnp.tile(x, count), static_argnums=1)
    report = memory_report(grow, X, 3, scale=jnp.float32(2))
    assert 0 <= report.outputs - 3 * 4 * X.size <= SLACK
    assert report.arguments == 4 * X.size + 4


def test_nothing_is_executed():
    def shout(x):
        jax.debug.callback(lambda: pytest.fail("executed"))
        return x + 1

    memory_report(shout, jnp.ones(3))
    residual_bytes(shout, jnp.ones(3))
    jax.effects_barrier()


@pytest.mark.full
@pytest.mark.claim("a reversible gradient needs least memory")
@pytest.mark.control("a reversible gradient needs least memory")
def test_a_gradient_needs_least_when_it_is_reversible():
    reversible, remat, store = map(gradient_report, ("reversible", "remat", "store"))
    assert reversible.temporaries < remat.temporaries < store.temporaries
    assert reversible.arguments == remat.arguments == store.arguments
    assert (store - reversible).temporaries > DEPTH * 4 * BATCH * TOKENS * HIDDEN


def make_stack(backprop="reversible"):
    class Block(nnx.Module):
        def __init__(self, rngs):
            self.dense = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

        def __call__(self, x):
            return jnp.tanh(self.dense(x))

    return BDIAStack(Block, 6, rngs=nnx.Rngs(0), backprop=backprop)


def mean_square(stack, x):
    return jnp.mean(stack(x) ** 2)


@pytest.mark.full
def test_modules_are_taken_abstract_or_not_jitted_or_not():
    stack = make_stack()
    abstract = nnx.eval_shape(make_stack)
    fn = nnx.grad(mean_square)
    report = memory_report(fn, abstract, X)
    assert report == memory_report(nnx.jit(fn), stack, jnp.ones(X.shape))
    weights = 4 * 6 * (WIDTH**2 + WIDTH)
    assert 0 <= report.arguments - weights - 4 * X.size <= SLACK


def test_a_compiled_program_reports_itself():
    compiled = jax.jit(step).lower(W, X).compile()
    assert memory_report(compiled) == memory_report(step, W, X)
    with pytest.raises(ValueError, match=r"compiled program and 2 arguments.*pass it alone"):
        memory_report(compiled, W, X)


@pytest.mark.parametrize("jit", [jax.jit, nnx.jit])
def test_a_lowered_program_is_compiled_and_reports_itself(jit):
    lowered = jit(step).lower(W, X)
    assert memory_report(lowered) == memory_report(step, W, X)
    with pytest.raises(ValueError, match=r"lowered program and 1 arguments.*pass it alone"):
        memory_report(lowered, W)


def test_of_a_sharded_program_it_is_one_devices():
    def gradient(w, x):
        return jax.grad(lambda w: jnp.sum(jnp.sin(jnp.tanh(x @ w)) ** 2))(w)

    mesh = jax.make_mesh((4,), ("data",))
    split, whole = (NamedSharding(mesh, PartitionSpec(*names)) for names in (("data",), ()))
    on_four = jax.jit(gradient, in_shardings=(whole, split), out_shardings=whole)
    one, four = memory_report(gradient, W, X), memory_report(on_four, W, X)
    assert one.arguments == 4 * (W.size + X.size)
    assert four.arguments == 4 * (W.size + X.size // 4)
    assert abs(four.outputs - one.outputs) <= SLACK  # every device has the whole gradient
    assert one.temporaries >= 4 * BATCH * TOKENS * HIDDEN
    assert four.temporaries < one.temporaries / 2


def test_a_backend_without_analysis_is_named():
    with pytest.raises(ValueError, match=r"'cpu' reports no memory analysis"):
        memory_report(SimpleNamespace(memory_analysis=lambda: None))  # pyright: ignore


def test_it_prints_a_table_in_mib():
    report = MemoryReport(arguments=3 * 2**20, outputs=2**20, aliased=2**19, temporaries=2**31)
    assert str(report).splitlines() == [
        "arguments         3.00 MiB",
        "outputs           1.00 MiB",
        "aliased          -0.50 MiB",
        "temporaries   2,048.00 MiB",
        "total         2,051.50 MiB",
    ]


# --- residual_bytes --------------------------------------------------------------------


def test_the_residual_of_a_product_and_an_exponential_is_the_exponential():
    sizes = residual_bytes(lambda w, x: jnp.sum(jnp.exp(x @ w)), W, X)
    assert sizes == {f"float32[{BATCH}, {TOKENS}, {HIDDEN}]": 4 * BATCH * TOKENS * HIDDEN}


def test_arguments_are_not_residuals_and_integers_are_not_differentiated():
    label = jax.ShapeDtypeStruct((5,), jnp.int32)
    loss = lambda x, label: jnp.sum(x * x) + jnp.sum(label)  # noqa: E731
    assert residual_bytes(loss, X, label) == {}


@pytest.mark.claim("memory of a block is its side bits")
def test_residuals_of_a_stack_are_two_states_and_the_side_bits():
    fp = FixedPoint(guard_bits=3)
    sizes = residual_bytes(loss_of("reversible", fp), *abstract_stack())
    side = [size for name, size in sizes.items() if name.startswith("uint8")]
    assert sum(side) == DEPTH * STATE * fp.side_bits // 8
    assert sizes[f"int32[{BATCH}, {TOKENS}, {WIDTH}]"] == 2 * 4 * STATE
    assert list(sizes.values()) == sorted(sizes.values(), reverse=True)


@pytest.mark.control("memory of a block is its side bits")
@pytest.mark.parametrize("backprop, width", [("remat", WIDTH), ("store", HIDDEN)])
def test_control_other_residuals_are_stacked_activations(backprop, width):
    largest, size = next(iter(residual_bytes(loss_of(backprop), *abstract_stack()).items()))
    assert largest == f"float32[{DEPTH}, {BATCH}, {TOKENS}, {width}]"
    assert size % (DEPTH * 4 * BATCH * TOKENS * width) == 0


def test_residuals_of_modules_jitted_or_not():
    stack = nnx.eval_shape(partial(make_stack, "remat"))
    sizes = residual_bytes(mean_square, stack, X)
    assert next(iter(sizes)) == f"float32[6, {BATCH}, {TOKENS}, {WIDTH}]"
    assert residual_bytes(nnx.jit(mean_square), stack, X) == sizes


def test_temporaries_hold_the_residuals():
    sizes = residual_bytes(loss_of("store"), *abstract_stack())
    assert gradient_report("store").temporaries > max(sizes.values())
