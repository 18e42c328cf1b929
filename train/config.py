"""The frozen form of an experiment's config, checked once at the door."""

import dataclasses
import math
from functools import partial
from typing import Any, get_args, get_origin

import jax.numpy as jnp

from bdia_jax import FixedPoint
from bdia_jax.baselines import MidpointStack, RevStack
from bdia_jax.nnx import BDIAStack
from train.devices.mesh import MeshConfig
from train.inputs import DataToTextInput, ImageInput, PairInput, TextInput
from train.model_config import (
    GPT2Config,
    LoRAConfig,
    PretrainedConfig,
    ResNetConfig,
    TransformerConfig,
    ViTConfig,
)

_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


# Which model and inputs belong to which `config.model.name`; the input tells the task.
_MODELS: dict[str, tuple[type, tuple[type, ...]]] = {
    "vit": (ViTConfig, (ImageInput,)),
    "resnet": (ResNetConfig, (ImageInput,)),
    "gpt2": (GPT2Config, (TextInput, DataToTextInput)),
    "transformer": (TransformerConfig, (PairInput,)),
    "pretrained": (PretrainedConfig, (TextInput, DataToTextInput, ImageInput)),
}
_RANGES = {
    **dict.fromkeys(("num_seeds", "batch_size", "num_steps", "log_every_steps"), (1, math.inf)),
    **dict.fromkeys(("eval_every_steps", "checkpoint_every_steps", "keep_last"), (1, math.inf)),
    **dict.fromkeys(("warmup_steps", "weight_decay", "grad_clip_norm", "keep_best"), (0, math.inf)),
    **dict.fromkeys(("gamma", "b2", "model.dropout_rate"), (0, 1)),
    **dict.fromkeys(("model.width", "model.depth", "model.num_heads"), (1, math.inf)),
    **dict.fromkeys(("model.encoder_depth", "model.decoder_depth"), (1, math.inf)),
    **dict.fromkeys(("model.mlp_dim", "model.patch_size", "input.beam_size"), (1, math.inf)),
    **dict.fromkeys(("input.rand_augment_ops", "input.crop_padding"), (0, 1000)),
    **dict.fromkeys(("model.linformer_dim", "input.eval_translations"), (0, math.inf)),
    **dict.fromkeys(("batch_chunks", "token_chunks"), (1, math.inf)),
    **dict.fromkeys(("input.length_penalty", "input.no_repeat_ngram"), (0, math.inf)),
    **dict.fromkeys(("input.eval_generations", "lora.rank", "lora.alpha"), (0, math.inf)),
    **dict.fromkeys(("input.label_smoothing", "lora.dropout_rate"), (0, 0.99)),
    "guard_bits": (-1, 7),
    "input.rand_augment_magnitude": (0, 30),
    "input.length": (4, math.inf),  # samples are continued from a quarter of it
}
_STACKS = {"bdia": BDIAStack, "revnet": RevStack, "midpoint": MidpointStack}


@dataclasses.dataclass(frozen=True)
class Config:
    """One training run. Lengths are in steps.

    num_seeds runs, of seed, seed + 1, ..., are trained at once, side by side on the device.
    dataset is a name of `train.datasets` or of TFDS, data_dir its folder ("" for the TFDS
    default), train_split and eval_split TFDS splits. init_from is a Hugging Face folder to start
    from, "" for random parameters; its architecture then takes the place of the config's. lora
    trains adapters only. stack is "bdia", or a baseline: "revnet" or "midpoint". gamma is |gamma|
    in training, 0 for the plain transformer; quantize=False keeps floating-point states;
    guard_bits=-1 takes what an audit before the first step asks for; by_branch,
    batch_chunks and token_chunks make the backward pass of a block smaller (`BDIAStack`). mesh says
    over how many devices what is split. optimizer
    is "set_adam" or "adamw"; schedule, after warmup_steps, "constant", "linear" or "cosine". A
    step whose loss or gradient is not finite ends the run if non_finite is "stop", and is left out
    if it is "skip". Of the
    checkpoints the keep_last newest stay, and the keep_best best, by the evaluation at their step.
    """

    seed: int
    num_seeds: int
    dataset: str
    data_dir: str
    train_split: str
    eval_split: str
    input: ImageInput | TextInput | PairInput | DataToTextInput
    model: ViTConfig | ResNetConfig | GPT2Config | TransformerConfig | PretrainedConfig
    init_from: str
    lora: LoRAConfig
    stack: str
    gamma: float
    quantize: bool
    frac_bits: int
    guard_bits: int
    backprop: str
    by_branch: bool
    batch_chunks: int
    token_chunks: int
    mesh: MeshConfig
    optimizer: str
    b2: float
    schedule: str
    learning_rate: float
    warmup_steps: int
    weight_decay: float
    grad_clip_norm: float
    non_finite: str
    batch_size: int
    num_steps: int
    log_every_steps: int
    eval_every_steps: int
    checkpoint_every_steps: int
    keep_last: int
    keep_best: int

    def __post_init__(self):
        choices = {
            "stack": (*_STACKS,),
            "backprop": ("reversible", "store", "remat"),
            "optimizer": ("set_adam", "adamw"),
            "schedule": ("constant", "linear", "cosine"),
            "non_finite": ("stop", "skip"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected one of {allowed}")
        self._check_ranges()
        if self.model.dtype not in _DTYPES:
            raise ValueError(f"model.dtype is {self.model.dtype!r}, expected one of {(*_DTYPES,)}")
        if self.warmup_steps >= self.num_steps:
            raise ValueError(
                f"warmup_steps {self.warmup_steps} leaves nothing of num_steps {self.num_steps}"
            )
        gammas = self.input.inference_gammas if isinstance(self.input, ImageInput) else (0.0,)
        if gammas != (0.0,) and not (isinstance(self.model, ViTConfig) and self.stack == "bdia"):
            raise ValueError(
                f"input.inference_gammas is {gammas} with model {self.model.name!r} and stack "
                f"{self.stack!r}; only a ViT with stack 'bdia' takes others than (0.0,)"
            )
        self._check_parts()
        self._check_pretrained()
        if self.stack != "bdia":
            self._check_baseline()
        elif self.backprop == "reversible" and not (self.quantize and _is_power(self.gamma)):
            raise ValueError(
                f"backprop='reversible' with gamma={self.gamma} and quantize={self.quantize}: it "
                "needs gamma 0.5, 0.25 or 0.125 and quantize=True; "
                "take --config.backprop=store or remat"
            )

    def _check_ranges(self):
        for name, (low, high) in _RANGES.items():
            *where, field = name.split(".")
            value = getattr(getattr(self, where[0]) if where else self, field, None)
            if value is not None and not low <= value <= high:  # None: of another model or input
                raise ValueError(f"{name} is {value}, expected {low:g} to {high:g}")
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate is {self.learning_rate}, expected a positive number")
        for gamma in getattr(self.input, "inference_gammas", ()):
            if not -0.5 <= gamma <= 0.5:
                raise ValueError(f"input.inference_gammas has {gamma}, expected -0.5 to 0.5")

    def _check_parts(self):
        if self.batch_size % self.batch_chunks:
            raise ValueError(
                f"batch_chunks {self.batch_chunks} does not divide batch_size {self.batch_size}; "
                "take a divisor of it, or another batch_size"
            )
        if self._has_parts and isinstance(self.model, ResNetConfig):
            raise ValueError(
                f"model 'resnet' with {self._parts}: its blocks have batch statistics, which "
                "parts of them would each update; "
                "set by_branch=False, batch_chunks=1 and token_chunks=1"
            )

    def _check_pretrained(self):
        if self.init_from and self.stack != "bdia":
            raise ValueError(
                f"init_from={self.init_from!r} with stack={self.stack!r}: a checkpoint is of the "
                "standard transformer, whose network only stack='bdia' keeps"
            )
        tokenizer = getattr(self.input, "tokenizer", "")
        if tokenizer == "checkpoint" and not self.init_from:
            raise ValueError(
                "input.tokenizer is 'checkpoint', but there is no init_from; set "
                "--config.init_from=DIR, or take the tokenizer 'gpt2', 'bytes' or 'bpe'"
            )
        if self.lora.rank and isinstance(self.model, ResNetConfig | TransformerConfig):
            raise ValueError(
                f"lora.rank is {self.lora.rank} with model {self.model.name!r}: adapters are for "
                "a ViT or a language model; set lora.rank=0"
            )

    @property
    def _has_parts(self) -> bool:
        return self.by_branch or self.batch_chunks * self.token_chunks > 1

    @property
    def _parts(self) -> str:
        return (
            f"by_branch={self.by_branch}, batch_chunks={self.batch_chunks}, "
            f"token_chunks={self.token_chunks}"
        )

    def _check_baseline(self):
        if self.quantize or self.gamma or self.backprop == "remat":
            raise ValueError(
                f"stack={self.stack!r} with gamma={self.gamma}, quantize={self.quantize} and "
                f"backprop={self.backprop!r}: this baseline has floating-point states and no "
                "gamma; set gamma=0, quantize=False and backprop 'reversible' or 'store'"
            )
        if self._has_parts:
            raise ValueError(
                f"stack={self.stack!r} with {self._parts}: only stack='bdia' has them; set "
                "by_branch=False, batch_chunks=1 and token_chunks=1"
            )
        if self.stack == "revnet" and not isinstance(self.model, ViTConfig):
            raise ValueError("stack='revnet' doubles the features; only the ViT takes them")

    @classmethod
    def from_config_dict(cls, config: Any) -> "Config":
        """From the ml_collections.ConfigDict that a file in configs/ returns."""
        values = config.to_dict()
        groups = {name: values.get(name) for name in ("input", "model", "lora", "mesh")}
        for name, group in groups.items():
            if not isinstance(group, dict):
                raise ValueError(f"{name} is {group!r}, expected a group of fields")
        model = dict(groups["model"])
        init_from = _checked("init_from", values.get("init_from", ""), str)
        if init_from:
            if model.get("name") in ("resnet", "transformer"):
                raise ValueError(
                    f"init_from={init_from!r} with model {model['name']!r}: only a ViT "
                    "and a language model start from a checkpoint; set init_from=''"
                )
            kept = {field: model[field] for field in ("dropout_rate", "dtype") if field in model}
            model = {"name": "pretrained", **kept}
        name = model.get("name")
        if not (isinstance(name, str) and name in _MODELS):
            raise ValueError(f"model.name is {name!r}, expected one of {(*_MODELS,)}")
        model_class, input_classes = _MODELS[name]
        values["model"] = _build(model_class, model, "model")
        values["input"] = _build(_closest(input_classes, values["input"]), values["input"], "input")
        values["lora"] = _build(LoRAConfig, values["lora"], "lora")
        values["mesh"] = _build(MeshConfig, values["mesh"], "mesh")
        return _build(cls, values, "config")

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
            gamma_bits = round(-math.log2(self.gamma)) if _is_power(self.gamma) else 1
            guard_bits = 1 if self.guard_bits == -1 else self.guard_bits  # 1 until chosen
            fixed_point = FixedPoint(self.frac_bits, guard_bits, gamma_bits)
        return partial(
            BDIAStack,
            magnitude=self.gamma,
            fixed_point=fixed_point,
            backprop=self.backprop,
            by_branch=self.by_branch,
            batch_chunks=self.batch_chunks,
            token_chunks=self.token_chunks,
        )


def _closest(classes: tuple[type, ...], values: dict) -> type:
    """The dataclass whose fields are most like these."""
    return min(
        classes, key=lambda cls: len({f.name for f in dataclasses.fields(cls)} ^ values.keys())
    )


def _build(cls: type, values: dict, where: str):
    """cls(**values); missing and unknown fields are named, and values of a wrong type."""
    types = {field.name: field.type for field in dataclasses.fields(cls)}
    wrong = [f"no {name}" for name in sorted(types.keys() - values.keys())]
    wrong += [f"unknown {name}" for name in sorted(values.keys() - types.keys(), key=str)]
    if wrong:
        raise ValueError(f"{where} does not fit {cls.__name__}: {', '.join(wrong)}")
    prefix = "" if where == "config" else f"{where}."
    return cls(**{name: _checked(prefix + name, values[name], types[name]) for name in values})


def _checked(name: str, value: Any, kind: Any) -> Any:
    """The value, which has to be of this annotation; an int stands for a float, too."""
    if get_origin(kind) is tuple:
        if not isinstance(value, tuple | list):
            raise ValueError(f"{name} is {_short(value)}, expected several, as in '(1, 2)'")
        return tuple(_checked(f"an element of {name}", each, get_args(kind)[0]) for each in value)
    expected = _EXPECTED.get(kind)
    if expected is None:  # a group of fields, built and checked before
        return value
    is_right = isinstance(value, (int, float) if kind is float else kind)
    if kind in (int, float):
        is_right = is_right and not isinstance(value, bool) and abs(value) <= _LARGEST[kind]
    elif kind is str and is_right:
        is_right = not any(c == "\0" or "\ud800" <= c <= "\udfff" for c in value)
    if not is_right:
        raise ValueError(f"{name} is {_short(value)}, expected {expected}")
    return float(value) if kind is float else value


_EXPECTED = {
    int: "a whole number below 2^31",
    float: "a finite number",
    bool: "True or False",
    str: "text, without zero bytes",
}
_LARGEST = {int: 2**31 - 1, float: 3.4e38}  # the device's int32 and float32


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python refuses to write an int of thousands of digits
        return f"an int of {value.bit_length()} bits"
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"


def _is_power(gamma: float) -> bool:
    return gamma > 0 and math.log2(gamma) in (-1, -2, -3)
