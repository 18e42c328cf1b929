"""The training state of a run, and the model it is the state of."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bdia_jax import lora
from bdia_jax.nnx import stacked_params
from bdia_jax.sharding import set_mesh
from train.config import Config
from train.devices.mesh import state_shardings
from train.devices.shards import to_host
from train.loop.optimizer import make_optimizer
from train.loop.step_inputs import keys
from train.tasks import TASKS

# "step" int32 [], "seed" int32, "params" (what is trained), "frozen" (parameters that are not; with
# adapters only), "stats" (batch statistics), "opt_state". With num_seeds > 1 all but the step have
# that axis.
State = dict[str, Any]


class Training:
    """What is trained of a model, and how; no parameter is made yet.

    Args:
        config: the run's.
        make_model: (rngs) -> the model, without adapters.
        mesh: the devices, None for one.

    Attributes:
        tx: the optimizer.
        abstract: the model without adapters, shapes only.
        abstract_state: shapes, dtypes and shardings of the state.
    """

    def __init__(
        self,
        config: Config,
        make_model: Callable[[nnx.Rngs], nnx.Module],
        mesh: Mesh | None = None,
    ):
        self._config = config
        self._mesh = mesh
        self._trained = _trained(config)
        self.abstract = nnx.eval_shape(lambda: make_model(nnx.Rngs(0)))
        self._make_model = make_model
        model = nnx.eval_shape(lambda: self._make(nnx.Rngs(0)))
        self._local_graphdef = self._graphdef = self._split(model)[0]
        if mesh is not None:
            set_mesh(model, mesh)
            self._graphdef = self._split(model)[0]
        stacked = nnx.filter_state(stacked_params(model), self._trained)
        self.tx: optax.GradientTransformation = make_optimizer(config, nnx.to_pure_dict(stacked))
        # every call brings its own random streams; these keys only complete the model
        self._rng_state = jax.jit(lambda: self._split(self._make(nnx.Rngs(0)))[4])()
        self.abstract_state = jax.eval_shape(self._init, None)
        self._shardings = None
        if mesh is not None:
            self._shardings = state_shardings(self.abstract_state, model, self.tx, mesh)
            self.abstract_state = jax.tree.map(
                lambda leaf, split: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=split),
                self.abstract_state,
                self._shardings,
            )

    def init(self, pretrained: Any = None) -> State:
        """The state before the first step.

        Args:
            pretrained: nested dict of parameters in place of random ones.
        """
        return jax.jit(self._init, out_shardings=self._shardings)(pretrained)

    def _init(self, pretrained: Any) -> State:
        seed, count = jnp.int32(self._config.seed), self._config.num_seeds
        if count == 1:
            state = self._init_one(seed, pretrained)
        else:
            init = jax.vmap(self._init_one, in_axes=(0, None))
            state = init(seed + jnp.arange(count), pretrained)
        return state | {"step": jnp.zeros([], jnp.int32)}

    def _init_one(self, seed: jax.Array, pretrained: Any) -> State:
        model = self._make(nnx.Rngs(keys(seed)[0]))
        if pretrained is not None:
            nnx.update(model, pretrained)
        _, *parts, _ = self._split(model)
        params, frozen, stats = map(nnx.to_pure_dict, parts)
        opt_state = self.tx.init(params)
        state = {"seed": seed, "params": params, "stats": stats, "opt_state": opt_state}
        return state | ({"frozen": frozen} if frozen else {})

    def merge(self, state: State) -> Any:
        """The model of a state of one seed."""
        return nnx.merge(self._graphdef, *weights(state).values(), self._rng_state)

    def out_shardings(self, with_state: bool) -> Any:
        """Of (state, metrics), or of metrics alone; None without a mesh."""
        if self._mesh is None:
            return None
        whole = NamedSharding(self._mesh, PartitionSpec())
        return (self._shardings, whole) if with_state else whole

    def models(self, state: State) -> list[Any]:
        """The models, one a seed, in evaluation mode, on one device of this process.

        With several processes all have to call it.
        """
        values = weights(state)
        if self._mesh is not None:
            values = jax.tree.map(jnp.asarray, to_host(values))
        models = []
        for seed in range(self._config.num_seeds):
            one = values
            if self._config.num_seeds > 1:
                one = jax.tree.map(lambda leaf, seed=seed: leaf[seed], values)
            models.append(nnx.merge(self._local_graphdef, *one.values(), self._rng_state))
            models[-1].eval()
        return models

    def stats(self, model: Any) -> Any:
        """Batch statistics after a step."""
        return nnx.to_pure_dict(self._split(model)[3])

    def _make(self, rngs: nnx.Rngs) -> nnx.Module:
        model, options = self._make_model(rngs), self._config.lora
        if options.rank:
            lora.add(
                model,
                lora.query_and_value(model),
                rank=options.rank,
                alpha=options.alpha,
                dropout_rate=options.dropout_rate,
                rngs=rngs,
            )
        return model

    def _split(self, model: nnx.Module):
        """(graphdef, trained parameters, frozen ones, statistics, random state)."""
        graphdef, params, frozen, rng_state, stats = nnx.split(
            model, self._trained, nnx.Param, nnx.RngState, ...
        )
        return graphdef, params, frozen, stats, rng_state


def _trained(config: Config) -> Any:
    """Which parameters are: all, or adapters and what the task has beside them."""
    return nnx.Any(nnx.LoRAParam, TASKS[config.task].head) if config.lora.rank else nnx.Param


def weights(state: State) -> State:
    """What of a state the model consists of."""
    return {name: state[name] for name in ("params", "frozen", "stats") if name in state}
