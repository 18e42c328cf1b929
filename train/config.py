"""The frozen form of an experiment's config, checked once at the door (`train.tasks.open_config`).

What a field may be stands beside it (`train.fields`). What depends on other fields is checked by
the class that knows: `Config`, the input of a task, or the model.
"""

import dataclasses
import math
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import jax.numpy as jnp
from pydantic import Field

from bdia_jax import FixedPoint
from bdia_jax.baselines import MidpointStack, RevStack
from bdia_jax.nnx import BDIAStack
from train.fields import (
    LIST,
    Amount,
    Count,
    Float,
    Int,
    NotNegative,
    Positive,
    Share,
    Text,
    checked,
)

_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
_STACKS = {"bdia": BDIAStack, "revnet": RevStack, "midpoint": MidpointStack}


class Input:
    """`config.input`, what a config says of the data: each task has a class of its own."""

    group: ClassVar[str] = "input"

    @property
    def tokenizer_name(self) -> str:
        """As `train.data.tokens.open_tokenizer` takes it; "" without text."""
        return ""

    @property
    def masks_attention(self) -> bool:
        """Whether the loss is made with a mask, which rules flash attention out."""
        return False

    def check(self, config: "Config") -> None:
        """Raises ValueError if the rest of the config does not fit."""


@checked
class ModelConfig:
    """`config.model`: the arguments of a model, of which each has a class of its own.

    takes_revnet: its features can be doubled. is_standard: there are checkpoints of it to start
    from, and it takes adapters (`bdia_jax.lora`).
    """

    group: ClassVar[str] = "model"
    takes_revnet: ClassVar[bool] = False
    is_standard: ClassVar[bool] = False

    name: Text
    dtype: Literal["float32", "bfloat16"]

    def check(self, config: "Config") -> None:
        """Raises ValueError if the rest of the config does not fit."""
        if config.stack == "revnet" and not self.takes_revnet:
            raise ValueError("stack='revnet' doubles the features; only the ViT takes them")
        if config.lora.rank and not self.is_standard:
            raise ValueError(
                f"lora.rank is {config.lora.rank} with model {self.name!r}: adapters are for "
                "a ViT or a language model; set lora.rank=0"
            )


@checked
class StandardConfig(ModelConfig):
    """The arguments of a decoder-only model, or of a ViT."""

    is_standard: ClassVar[bool] = True

    width: Count
    depth: Count
    num_heads: Count
    mlp_dim: Count
    dropout_rate: Share


@checked
class PretrainedConfig(ModelConfig):
    """The model of `config.init_from`: its config.json has the architecture."""

    is_standard: ClassVar[bool] = True

    dropout_rate: Share

    def check(self, config: "Config") -> None:
        if not config.init_from:
            raise ValueError("model.name is 'pretrained', but there is no init_from to start from")
        if config.stack != "bdia":
            raise ValueError(
                f"init_from={config.init_from!r} with stack={config.stack!r}: a checkpoint is of "
                "the standard transformer, whose network only stack='bdia' keeps"
            )
        super().check(config)


@checked
class LoRAConfig:
    """Adapters of query and value projections (`bdia_jax.lora`); rank 0 for none.

    Only they are trained then, and the head of an image classifier; all else is frozen.
    """

    group: ClassVar[str] = "lora"

    rank: Amount
    alpha: NotNegative
    dropout_rate: Annotated[Float, Field(ge=0, le=0.99)]


@checked
class MeshConfig:
    """Devices along each axis of the mesh (`bdia_jax.sharding.make_mesh`); data=-1: all the rest.

    data splits the batch; fsdp the batch, parameters, gradients and optimizer state; tensor heads
    and hidden features; sequence the tokens. The result is the same to rounding whatever they are,
    and a run may be resumed with others.
    """

    group: ClassVar[str] = "mesh"

    data: Annotated[Int, Field(ge=-1)]
    fsdp: Count
    tensor: Count
    sequence: Count

    def __post_init__(self):
        if self.data == 0:
            raise ValueError("mesh.data is 0, expected at least 1, or -1 for all other devices")


@checked
class Config:
    """One training run. Lengths are in steps.

    num_seeds runs, of seed, seed + 1, ..., are trained at once, side by side on the device.
    task is a name of `train.tasks.TASKS`, which says what input and model are. dataset is a name of
    `train.datasets` or of TFDS, data_dir its folder ("" for the TFDS default), train_split and
    eval_split TFDS splits. init_from is a Hugging Face folder to start from, "" for random
    parameters; its architecture then takes the place of the config's. lora trains adapters only.
    stack is "bdia", or a baseline: "revnet" or "midpoint". gamma is |gamma| in training, 0 for the
    plain transformer (`open_config` takes -1, too); gamma_changes ((steps, gamma), ..) is what it
    becomes after so many steps; quantize=False keeps floating-point states; guard_bits=-1 takes
    what an audit before the first step asks for; by_branch, batch_chunks and token_chunks make the
    backward pass of a block smaller (`BDIAStack`). mesh says over how many devices what is split.
    schedule is what follows warmup_steps. A step whose loss or gradient is not finite ends the run
    if non_finite is "stop", and is left out if it is "skip". Of the checkpoints the keep_last
    newest stay, and the keep_best best, by the evaluation at their step.
    """

    group: ClassVar[str] = ""

    seed: Int
    num_seeds: Count
    task: Text
    dataset: Text
    data_dir: Text
    train_split: Text
    eval_split: Text
    input: Any  # an Input and a ModelConfig of the task
    model: Any
    init_from: Text
    lora: LoRAConfig
    stack: Literal["bdia", "revnet", "midpoint"]
    gamma: Share
    gamma_changes: Annotated[tuple[Annotated[tuple[Count, Share], LIST], ...], LIST]
    quantize: bool
    frac_bits: Int
    guard_bits: Annotated[Int, Field(ge=-1, le=7)]
    backprop: Literal["reversible", "store", "remat"]
    by_branch: bool
    batch_chunks: Count
    token_chunks: Count
    mesh: MeshConfig
    optimizer: Literal["set_adam", "adamw"]
    b2: Share
    schedule: Literal["constant", "linear", "cosine"]
    learning_rate: Positive
    warmup_steps: Amount
    weight_decay: NotNegative
    grad_clip_norm: NotNegative
    non_finite: Literal["stop", "skip"]
    batch_size: Count
    num_steps: Count
    log_every_steps: Count
    eval_every_steps: Count
    checkpoint_every_steps: Count
    keep_last: Count
    keep_best: Amount

    def __post_init__(self):
        if self.warmup_steps >= self.num_steps:
            raise ValueError(
                f"warmup_steps {self.warmup_steps} leaves nothing of num_steps {self.num_steps}"
            )
        if self.batch_size % self.batch_chunks:
            raise ValueError(
                f"batch_chunks {self.batch_chunks} does not divide batch_size {self.batch_size}; "
                "take a divisor of it, or another batch_size"
            )
        steps = [step for step, _ in self.gamma_changes]
        if steps != sorted(set(steps)):
            raise ValueError(
                f"gamma_changes is {self.gamma_changes}, expected (steps, gamma) with rising steps"
            )
        is_baseline = self.stack != "bdia"
        if is_baseline and (self.quantize or self.gamma or self.backprop == "remat"):
            raise ValueError(
                f"stack={self.stack!r} with gamma={self.gamma}, quantize={self.quantize} and "
                f"backprop={self.backprop!r}: this baseline has floating-point states and no "
                "gamma; set gamma=0, quantize=False and backprop 'reversible' or 'store'"
            )
        if is_baseline and self.parts:
            raise ValueError(f"stack={self.stack!r} with {self.parts}: only stack='bdia' has them")
        if is_baseline and self.gamma_changes:
            raise ValueError(
                f"stack={self.stack!r} with gamma_changes={self.gamma_changes}: only stack='bdia' "
                "has a gamma"
            )
        is_reversible = is_baseline or (self.quantize and all(map(_is_power, self.gammas)))
        if self.backprop == "reversible" and not is_reversible:
            gammas = ", ".join(map(str, self.gammas))
            raise ValueError(
                f"backprop='reversible' with gamma={gammas} and quantize={self.quantize}: it "
                "needs gamma 0.5, 0.25, .. or 0.0078125, a power of 1/2, and quantize=True; "
                "take --config.backprop=store or remat"
            )
        self.model.check(self)
        self.input.check(self)

    @property
    def parts(self) -> str:
        """What a block's backward pass is cut into, and how not to; "" for nothing."""
        if not self.by_branch and self.batch_chunks * self.token_chunks == 1:
            return ""
        return (
            f"by_branch={self.by_branch}, batch_chunks={self.batch_chunks}, "
            f"token_chunks={self.token_chunks} (set False, 1 and 1)"
        )

    @property
    def gammas(self) -> tuple[float, ...]:
        """All that |gamma| ever is."""
        return (self.gamma, *(gamma for _, gamma in self.gamma_changes))

    @property
    def chooses_guard_bits(self) -> bool:
        """Whether an audit is to choose them."""
        return self.guard_bits == -1 and self.stack == "bdia" and self.backprop == "reversible"

    @property
    def model_arguments(self) -> dict[str, Any]:
        """Keyword arguments of the model, its stack included."""
        values = dataclasses.asdict(self.model)
        del values["name"]
        return values | {"dtype": _DTYPES[self.model.dtype], "stack": self._make_stack()}

    def _make_stack(self):
        if self.stack != "bdia":
            return partial(_STACKS[self.stack], backprop=self.backprop)
        fixed_point = None
        if self.quantize:
            powers = [gamma for gamma in self.gammas if _is_power(gamma)]
            gamma_bits = max((round(-math.log2(gamma)) for gamma in powers), default=1)
            guard_bits = 1 if self.guard_bits == -1 else self.guard_bits  # 1 until chosen
            fixed_point = FixedPoint(self.frac_bits, guard_bits, gamma_bits)
        names = ("backprop", "by_branch", "batch_chunks", "token_chunks")
        options = {name: getattr(self, name) for name in names}
        return partial(BDIAStack, magnitude=self.gamma, fixed_point=fixed_point, **options)


def _is_power(gamma: float) -> bool:
    return gamma > 0 and math.log2(gamma) in range(-7, 0)
