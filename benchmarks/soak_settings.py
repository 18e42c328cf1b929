"""What `benchmarks.soak` compiles: blocks, formats, meshes, and the controls."""

import dataclasses
import math
from functools import partial

import jax.numpy as jnp
from flax import nnx

from bdia_jax import FixedPoint
from bdia_jax.models.blocks import PreNormBlock
from bdia_jax.nnx import BDIAStack
from bdia_jax.sharding import AXES
from benchmarks.faults import OffBlock

SCALES = (0.5, 1.0, 2.0, 4.0)
OFF_BY = 1e-5


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is compiled once. bfloat16 ends in float32 in a transformer's h, not in an MLP's.

    data, fsdp, tensor, sequence: devices, as in `bdia_jax.sharding.make_mesh`.
    largest: of `SCALES`.
    off: by how much h is off in the backward pass.
    pinned: False for bfloat16 under `benchmarks.faults.unpinned`.
    """

    kind: str = "transformer"
    depth: int = 24
    batch: int = 1024
    tokens: int = 32
    width: int = 64
    dtype: str = "float32"
    frac_bits: int = 9
    guard_bits: int = 1
    gamma_bits: int = 1
    dropout_rate: float = 0.0
    by_branch: bool = False
    batch_chunks: int = 1
    token_chunks: int = 1
    data: int = 1
    fsdp: int = 1
    tensor: int = 1
    sequence: int = 1
    largest: float = SCALES[-1]
    off: float = 0.0
    pinned: bool = True

    @property
    def name(self) -> str:
        """All fields that are not the default: equal names are equal settings."""
        values = dataclasses.asdict(self)
        kept = [self.kind, *("depth", "batch", "tokens", "width"), self.dtype]
        words = [f"{word}={values[word]}" if word in values else word for word in kept]
        for field in dataclasses.fields(self):
            if field.name not in (*kept, "kind", "dtype") and values[field.name] != field.default:
                words.append(f"{field.name}={values[field.name]}")
        return " ".join(words)

    @property
    def fixed_point(self) -> FixedPoint:
        return FixedPoint(self.frac_bits, self.guard_bits, self.gamma_bits)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of a state."""
        return self.batch, self.tokens, self.width

    @property
    def elements(self) -> int:
        """Rebuilt activations of a round: x_0 .. x_{K-2}."""
        return (self.depth - 1) * math.prod(self.shape)


_MLP = partial(Setting, kind="mlp")
_HALF = partial(Setting, dtype="bfloat16", batch=64, depth=96)
SETTINGS = (
    Setting(guard_bits=2),
    Setting(guard_bits=2, depth=96, batch=256),
    Setting(guard_bits=5, frac_bits=12),
    Setting(frac_bits=5),
    Setting(guard_bits=2, gamma_bits=3, width=40),
    Setting(guard_bits=3, dropout_rate=0.1, depth=12, batch=512),
    Setting(by_branch=True, batch_chunks=4, batch=512),
    Setting(token_chunks=4, dropout_rate=0.1, depth=6, batch=256),
    _HALF(),
    _HALF(guard_bits=3, frac_bits=12),
    _HALF(gamma_bits=2, dropout_rate=0.1, depth=48),
    Setting(gamma_bits=7),
    Setting(guard_bits=2, gamma_bits=4, depth=96, batch=256),
    _HALF(gamma_bits=5),
    Setting(dtype="bfloat16", guard_bits=7, largest=1.0),
    Setting(dtype="bfloat16", guard_bits=4, largest=1.0, frac_bits=5, gamma_bits=2),
    _MLP(),
    _MLP(depth=96, batch=256),
    _MLP(guard_bits=3, frac_bits=12),
    _MLP(guard_bits=2, frac_bits=5, gamma_bits=3),
    _MLP(width=20, depth=48),
    _MLP(gamma_bits=6, depth=96, batch=256),
    _MLP(dropout_rate=0.1, depth=12, batch_chunks=4, batch=512),
    _HALF(kind="mlp"),
    _HALF(kind="mlp", guard_bits=2, frac_bits=12),
    _MLP(dtype="bfloat16", guard_bits=6, largest=1.0),
    Setting(data=2, guard_bits=2),
    Setting(fsdp=4, guard_bits=3, dropout_rate=0.1, depth=12, batch=512),
    Setting(data=8, dtype="bfloat16", batch=512),
    Setting(data=2, sequence=2, guard_bits=2),
    Setting(data=2, sequence=4, guard_bits=5, frac_bits=12),
    Setting(data=4, tensor=2, guard_bits=2),
    Setting(data=2, fsdp=2, tensor=2, guard_bits=2),
    Setting(fsdp=2, tensor=2, sequence=2, dtype="bfloat16", guard_bits=2, batch=128),
    Setting(data=4, by_branch=True, batch_chunks=2, guard_bits=3, frac_bits=12, batch=512),
    _MLP(data=8, depth=96, batch=256),
    _MLP(data=4, fsdp=2, guard_bits=2, gamma_bits=2, frac_bits=12),
    _MLP(data=4, sequence=2, dtype="bfloat16", guard_bits=2, batch=512),
    _MLP(data=2, tensor=4, gamma_bits=3, frac_bits=5),
)
_OFF = Setting(off=OFF_BY, batch=64)
CONTROLS = (  # (setting, whether it must be exact)
    (dataclasses.replace(_OFF, guard_bits=0), False),
    (_OFF, True),
    (_HALF(depth=24, width=128, pinned=False), False),
)


def toy(setting: Setting) -> Setting:
    """The setting at the least size, on at most four devices."""
    axes = [name for name in AXES if getattr(setting, name) > 1]
    parts = dict.fromkeys(AXES, 1) | dict.fromkeys(axes[:2], 2)
    small = {"kind": "mlp", "depth": 4, "batch": 8, "tokens": 8, "width": 16}
    return dataclasses.replace(setting, **parts, **small)


# --- blocks ------------------------------------------------------------------------------


class _MLPBlock(nnx.Module):
    """Plain layers that name no dtype: in bfloat16 all of it is, h too."""

    def __init__(self, width: int, dropout_rate: float, rngs: nnx.Rngs):
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.hidden = nnx.Linear(width, width, rngs=rngs)
        self.out = nnx.Linear(width, width, rngs=rngs)
        self.dropout = nnx.Dropout(dropout_rate, rngs=rngs)

    def __call__(self, x):
        return self.dropout(self.out(nnx.gelu(self.hidden(self.norm(x)))))


def make_stack(setting: Setting) -> BDIAStack:
    """The stack in training mode."""

    def make(rngs: nnx.Rngs) -> nnx.Module:
        width, rate = setting.width, setting.dropout_rate
        if setting.kind == "mlp":
            block = _MLPBlock(width, rate, rngs)
        else:
            options = {"dropout_rate": rate, "dtype": jnp.dtype(setting.dtype)}
            block = PreNormBlock(width, 2, width, **options, rngs=rngs)
        return OffBlock(block, setting.off) if setting.off else block

    return BDIAStack(
        make,
        setting.depth,
        rngs=nnx.Rngs(0),
        magnitude=2.0**-setting.gamma_bits,
        fixed_point=setting.fixed_point,
        by_branch=setting.by_branch,
        batch_chunks=setting.batch_chunks,
        token_chunks=setting.token_chunks,
        dtype=jnp.dtype(setting.dtype) if setting.kind == "mlp" else None,
    )
