"""Many devices: the rebuild stays exact, the numbers the same. All meshes: benchmarks.soak."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from bdia_jax import FixedPoint
from bdia_jax.models.blocks import PreNormBlock
from bdia_jax.models.gpt2 import GPT2
from bdia_jax.models.llama import Llama
from bdia_jax.nnx import BDIAStack
from bdia_jax.sharding import AXES, make_mesh, param_shardings, shard, state_sharding

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")

B, T, D, DEPTH = 8, 8, 32, 5
MESHES = {"1": {}, "8": {"fsdp": 2, "tensor": 2, "sequence": 2}}


def make_stack(sizes, dtype=jnp.float32, frac_bits=9, dropout_rate=0.0):
    def block(rngs):
        return PreNormBlock(D, 4, 64, dropout_rate=dropout_rate, dtype=dtype, rngs=rngs)

    guard_bits = 1 if dtype == jnp.float32 else 3
    stack = BDIAStack(block, DEPTH, rngs=nnx.Rngs(0), fixed_point=FixedPoint(frac_bits, guard_bits))
    if sizes:
        shard(stack, make_mesh(**sizes))
    return stack


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(1), (B, T, D))


@nnx.jit
def value_and_grads(stack, x):
    def loss(stack, x):
        y = stack(x, rngs=nnx.Rngs(3))
        return jnp.sum(y * jnp.cos(jnp.arange(y.size).reshape(y.shape))), y

    (grads, grad_x), y = nnx.grad(loss, argnums=(0, 1), has_aux=True)(stack, x)
    return y, (grads, grad_x)


@pytest.fixture(scope="module")
def results(x, quick_compile):
    return {
        name: jax.device_get(value_and_grads(make_stack(sizes, frac_bits=20, dropout_rate=0.1), x))
        for name, sizes in MESHES.items()
    }


def worst(tree, other):
    """The largest difference of a leaf, relative to the leaf's largest element."""
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True)
    return max(float(np.max(np.abs(a - b)) / np.max(np.abs(b))) for a, b in pairs)


@pytest.mark.full
@pytest.mark.claim("rebuild is exact")
def test_every_state_is_rebuilt_exactly(x):
    audit = make_stack(MESHES["8"]).audit(x)
    assert audit.exact and audit.elements * len(audit.mismatches) == B * T * D * (DEPTH - 1)


def test_states_are_split_as_said(x):
    mesh = make_mesh(fsdp=2, tensor=2, sequence=2)
    assert state_sharding(mesh, x.shape).spec == P(("data", "fsdp"), "sequence")
    assert state_sharding(mesh, (3, T, D)).spec == P(None, "sequence")  # 2 does not divide 3
    assert state_sharding(make_mesh(data=2), (4, D)).spec == P(("data", "fsdp"))
    for shape in ((B, 7, D), (B, D)):
        with pytest.raises(ValueError, match=r"splits axis 1 .* into 2 parts"):
            state_sharding(mesh, shape)


def test_parameters_are_split_by_heads_and_features_and_over_fsdp():
    mesh = make_mesh(fsdp=2, tensor=2)
    model = nnx.eval_shape(
        lambda: GPT2(51, 16, width=8, depth=3, num_heads=2, mlp_dim=32, rngs=nnx.Rngs(0))
    )
    specs = {
        ".".join(map(str, path)): sharding.spec
        for path, sharding in nnx.to_flat_state(nnx.as_pure(param_shardings(model, mesh)))
    }
    blocks = "stack.blocks"
    for name in ("attention.query", "attention.key", "attention.value", "mlp.hidden"):
        assert specs[f"{blocks}.{name}.kernel"] == P(None, "fsdp", "tensor"), name
        assert specs[f"{blocks}.{name}.bias"] == P(None, "tensor"), name
    for name in ("attention.out", "mlp.out"):
        assert specs[f"{blocks}.{name}.kernel"] == P(None, "tensor", "fsdp"), name
    assert specs["embedding"] == specs["positions"] == P(None, "fsdp")  # 2 does not divide 51
    assert specs[f"{blocks}.mlp_norm.scale"] == P(None, None)


@pytest.mark.parametrize("tied", [True, False])
def test_a_table_of_classes_is_split_along_its_width(tied):
    """The loss takes it in chunks of the classes: of a table split along them, each would gather
    all of it."""
    sizes = {"width": 8, "depth": 2, "num_heads": 2, "mlp_dim": 16}
    model = nnx.eval_shape(
        lambda: Llama(64, 16, **sizes, tie_embeddings=tied, rngs=nnx.Rngs(0))  # 2 divides both
    )
    specs = nnx.to_pure_dict(nnx.as_pure(param_shardings(model, make_mesh(fsdp=2))))
    assert specs["embedding"].spec == P(None, "fsdp")
    assert tied or specs["head"].spec == P(None, "fsdp")


def test_a_users_matrices_are_split_over_fsdp_and_never_between_blocks():
    class Block(nnx.Module):
        def __init__(self, rngs):
            self.w = nnx.Param(jnp.zeros((3, 4)))
            self.odd = nnx.Param(jnp.zeros((3, 5)))

    stack = nnx.eval_shape(lambda: BDIAStack(Block, 4, rngs=nnx.Rngs(0)))
    specs = nnx.to_pure_dict(nnx.as_pure(param_shardings(stack, make_mesh(fsdp=2))))["blocks"]
    assert specs["w"].spec == P(None, None, "fsdp")
    assert specs["odd"].spec == P(None, None, None)


def test_a_mesh_that_cannot_be_is_refused():
    assert make_mesh().axis_names == AXES
    with pytest.raises(ValueError, match="data 0"):
        make_mesh(data=0)
    with pytest.raises(ValueError, match=r"4096 devices, but there are"):
        make_mesh(fsdp=4096)


@pytest.mark.full
@pytest.mark.claim("sharded equals unsharded")
def test_output_and_gradients_do_not_depend_on_the_mesh(results):
    """To rounding, so gamma and dropout are the same: 20 fractional bits make quanta as small."""
    assert worst(results["8"], results["1"]) < 1e-5


@pytest.mark.full
@pytest.mark.control("sharded equals unsharded")
def test_other_keys_would_be_noticed(x, results):
    y = nnx.jit(lambda stack, x: stack(x, rngs=nnx.Rngs(4)))(
        make_stack({}, frac_bits=20, dropout_rate=0.1), x
    )
    assert worst(np.asarray(y), results["1"][0]) > 0.1
