"""What a training step needs on one device of a mesh: the whole program's values, counted."""

import dataclasses
import math
from collections.abc import Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, AxisType

from bdia_jax.models.attention import choose_implementation
from bdia_jax.nnx import Stack
from bdia_jax.sharding import AXES, batch_sharding
from train.config import Config, MeshConfig
from train.loop.state import Training
from train.plan.flat import Equation, Split, Value, flatten, split_of
from train.plan.live import Device, Peak, peaks
from train.plan.spread import Spread
from train.tasks.task import Task

_HOPPER = SimpleNamespace(platform="gpu", compute_capability="9.0")


@dataclasses.dataclass(frozen=True)
class Plan:
    """Bytes on one device. The rows add up to `total`: all that lives at the fullest moment.

    Attributes:
        parameters: trained and frozen ones, batch statistics.
        optimizer: its state.
        data: the batch. All training examples are on the devices too, and not counted.
        gradients: those that are there by then, most of all the blocks'.
        kept: from the stack's forward pass: side bits of "reversible", states of "remat",
            residuals of "store"; all blocks together.
        states: the last two states and their cotangents, or what else the backward scan carries.
        block: one block's backward pass: residuals, work space, its parameters where they are
            gathered or cast.
        rest: anything else.
        elsewhere: what the fullest moment outside of that backward pass needs in all: the loss and
            the embeddings, or the forward pass.
    """

    parameters: int
    optimizer: int
    data: int
    gradients: int
    kept: int
    states: int
    block: int
    rest: int
    elsewhere: int

    @property
    def total(self) -> int:
        """The largest sum at any moment."""
        names = [field.name for field in dataclasses.fields(self) if field.name != "elsewhere"]
        return sum(getattr(self, name) for name in names)

    @property
    def beside_kept(self) -> int:
        """What does not grow with depth, and what grows alike for every `backprop`."""
        return self.total - self.kept


def make_plan(config: Config, task: Task, device: str = "gpu") -> Plan:
    """The plan of a run. Nothing is compiled or allocated, and no device is needed.

    Counted is the gradient's program as JAX traces it, split over an abstract mesh
    (`train.plan.spread`), with the values that a compiler writes to memory (`train.plan.live`).
    Parameters, optimizer state and gradients are there throughout; updating them needs nothing
    else. Not counted: the gaps a compiler leaves between buffers, another order of work than the
    program's, what the runtime keeps. So plans are a little too low: see benchmarks/plan.py.

    Args:
        config: the run's; its mesh need not fit this machine.
        task: of `abstract_task`, or with arrays.
        device: "gpu", with flash attention where `bdia_jax.models.attention` takes it on a
            Hopper, or "cpu": attention weights are written, and so are transposed operands of
            matrix products.

    Raises:
        ValueError: as `make_program`; mesh.data=-1, for nothing says how many devices there are.
    """
    sizes = mesh_sizes(config.mesh)
    mesh: Any = AbstractMesh(
        tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes)
    )
    count = math.prod(sizes.values())
    if config.num_seeds > 1 and count > 1:
        raise ValueError(
            f"num_seeds is {config.num_seeds} with a mesh of {count} devices; train one seed at "
            "a time there"
        )
    one_seed = dataclasses.replace(config, num_seeds=1)
    training = Training(one_seed, task.make_model, mesh)
    state = training.abstract_state
    batch = _batch(config, task, mesh)
    kind = _device(device, config, training.abstract, batch, sizes)

    spread = Spread(sizes, partial(_fullest, sizes, kind))
    equations, values, results = _trace(training, task, state, batch)
    num_params = len(jax.tree.leaves(state["params"]))
    wanted: list[Split | None] = [value.split for value in values[:num_params]]
    wanted += [None] * (len(results) - num_params)
    equations = spread(equations, results, wanted)
    moments = list(peaks(equations, values, results, sizes, kind))
    top = max(moments, key=lambda moment: moment.bytes)
    elsewhere = max((m.bytes for m in moments if m.equation is not top.equation), default=0)
    modules = nnx.iter_modules(training.abstract)
    depths = {module.depth for _, module in modules if isinstance(module, Stack)}
    found = _sorted(top, spread.wanted, depths)
    held = {
        "parameters": _held([state.get(name, ()) for name in ("params", "frozen", "stats")]),
        "optimizer": _held(state["opt_state"]),
        "data": _held(batch),
    }
    found |= held | {"elsewhere": elsewhere + sum(held.values())}
    return Plan(**{name: size * config.num_seeds for name, size in found.items()})


def _trace(
    training: Training, task: Task, state: Any, batch: Any
) -> tuple[list[Equation], list[Value], list[Value]]:
    """The gradient as `train.loop.program` takes it: equations, arguments, results.

    Parameters come first among the arguments, and their gradients among the results.
    """

    def gradient(params, rest, batch, key):
        prepare_key, model_key = jax.random.split(key)
        batch = task.prepare(prepare_key, batch)

        def loss_fn(params):
            model = training.merge(rest | {"params": params})
            model.train()
            total, weight = task.metrics(model, batch, nnx.Rngs(model_key))["loss"]
            return jnp.sum(total) / jnp.sum(weight), training.stats(model)

        return jax.grad(loss_fn, has_aux=True)(params)

    rest = {name: leaf for name, leaf in state.items() if name not in ("params", "opt_state")}
    key = jax.eval_shape(lambda: jax.random.key(0))
    arguments = (state["params"], rest, batch, key)
    trace = jax.make_jaxpr(gradient)(*arguments)
    values = [Value(a.shape, a.dtype, split_of(a)) for a in jax.tree.leaves(arguments)]
    equations, results = flatten(trace.jaxpr, trace.consts, values)
    return equations, values, results


def _fullest(sizes, kind, equations, arguments, results, carry) -> int:
    moments = peaks(equations, arguments, results, sizes, kind, carry)
    return max((moment.bytes for moment in moments), default=0)


def mesh_sizes(config: MeshConfig) -> dict[str, int]:
    """Axis -> devices.

    Raises:
        ValueError: data=-1.
    """
    if config.data == -1:
        raise ValueError("mesh.data is -1, all other devices there are; say how many to plan for")
    return {name: getattr(config, name) for name in AXES}


def _batch(config: Config, task: Task, mesh: Any) -> Any:
    def array(leaf):
        shape = (config.batch_size, *leaf.shape[1:])
        return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=batch_sharding(mesh, shape[0]))

    return jax.tree.map(array, task.train_groups[-1])


def _device(device: str, config: Config, model: Any, batch: Any, sizes: dict[str, int]) -> Device:
    if device == "cpu":
        # threefry is a loop there: from two counters, which leave the scan, two words, their copies
        # in the loop, and the next two
        kind = Device(copies_layouts=True, fuses_reductions=False)
        return dataclasses.replace(kind, combines_sums=True, random_counters=2, random_buffers=6)
    if device != "gpu":
        raise ValueError(f"device is {device!r}, expected 'gpu' or 'cpu'")
    attention = getattr(getattr(getattr(model, "stack", None), "blocks", None), "attention", None)
    if attention is None or sizes["sequence"] > 1:  # flash attention cannot split tokens
        return Device()
    dtype = attention.query.dtype or jnp.float32
    heads, inner = attention.num_heads, attention.query.kernel.shape[-1]
    q = jax.ShapeDtypeStruct((1, 1, heads, inner // heads), dtype)
    if choose_implementation(q, True if config.input.masks_attention else None, _HOPPER) == "xla":
        return Device()
    positions = getattr(model, "positions", None)
    tokens = batch.tokens.shape[1] - 1 if hasattr(batch, "tokens") else positions.shape[1]  # pyright: ignore
    return Device(flash_tokens=tokens)


def _sorted(top: Peak, gradients: Mapping[Value, Split], depths: set[int]) -> dict[str, int]:
    """What lives at the fullest moment, by what it is."""
    found: dict[str, int] = dict.fromkeys(("gradients", "kept", "states", "block", "rest"), 0)
    carried: list[Value] = []
    finals: list[Value] = []
    stacked: list[Value] = []
    scan = top.equation
    if scan is not None and scan.name == "scan" and scan.params["length"] in depths:
        first, num_carry = scan.params["num_consts"], scan.params["num_carry"]
        carried, finals = scan.ins[first:][:num_carry], scan.outs[:num_carry]
        stacked = [*scan.ins[first + num_carry :], *scan.outs[num_carry:]]
        found["block"] = scan.inner
    for value, size in top.live.items():
        if value in carried:
            found["states"] += size
        elif value in gradients and value not in finals:
            found["gradients"] += size
        elif value in stacked:
            found["kept"] += size
    found["rest"] = top.bytes - sum(found.values())
    return found


def _held(tree: Any) -> int:
    return sum(_local_bytes(leaf) for leaf in jax.tree.leaves(tree))


def _local_bytes(leaf: Any) -> int:
    shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
    return math.prod(shape) * leaf.dtype.itemsize
