"""Does a wrong gradient ever leave the backward pass? Blocks that drift at random, in every way.

    python -m benchmarks.verification [--trials 10000]

In a trial some blocks of a stack come back, in the backward pass, off by 0.1 to 100 times what the
guard bits bear. Its gradient is compared by bits with that of the same compiled program without
drift, once verified and once not: it is right, or NaN, or else wrong and a number. The settings are
float32 and bfloat16 blocks, whole, by branch and in chunks, every |gamma|, and meshes of 1 to 8
devices.
"""

import dataclasses
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bdia_jax import FixedPoint, bdia_scan, sample_gamma
from benchmarks import record

DEPTH, SHAPE = 6, (8, 8, 16)  # K; B, T, D
# of h, in its own units, at gamma = 1/2
BOUND = FixedPoint().drift_bound * 2.0**-9 / 1.5
RIGHT, NAN, WRONG = "right", "nan", "wrong_and_finite"


@dataclasses.dataclass(frozen=True)
class Setting:
    """dtype: of the blocks. options: of `bdia_scan`. devices: [axis 0, axis 1] of x are split.

    gamma_bits: p of |gamma| = 2^-p.
    """

    dtype: str
    way: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    branches: int = 1
    devices: tuple[int, int] = (1, 1)
    gamma_bits: int = 1

    @property
    def name(self) -> str:
        """As it is told."""
        return f"{self.dtype} {self.way}"


def _settings() -> list[Setting]:
    ways: list[tuple[str, dict[str, Any], int]] = [
        ("whole", {}, 1),
        ("batch_chunks", {"batch_chunks": 2}, 1),
        ("token_chunks", {"token_chunks": 2}, 1),
        ("both", {"batch_chunks": 2, "token_chunks": 4}, 1),
        ("by branch", {}, 2),
        ("by branch, in chunks", {"batch_chunks": 2, "token_chunks": (1, 2)}, 2),
        ("in parts", {"verify": 4}, 1),
    ]
    meshes = {"2 devices": (2, 1), "4 devices": (4, 1), "8 devices": (8, 1)}
    meshes |= {"8 devices, 4 of them over tokens": (2, 4)}
    found = []
    for dtype in ("float32", "bfloat16"):
        found += [Setting(dtype, *way) for way in ways]
        for p in range(2, 8):
            found.append(Setting(dtype, f"gamma 1/{2**p}", gamma_bits=p))
        for name, devices in meshes.items():
            options = {"verify": devices[1]} if devices[1] > 1 else {}
            found.append(Setting(dtype, name, options, devices=devices))
        chunks = {"batch_chunks": 2}
        found.append(Setting(dtype, "4 devices, in chunks", chunks, devices=(4, 1)))
    return found


SETTINGS = {setting.name: setting for setting in _settings()}


def run(setting: Setting, trials: int, seed: int = 0) -> dict[str, Any]:
    """How many gradients were right, NaN, or wrong and finite, verified and not.

    false_alarms: gradients that are NaN though the rebuild, not verified, was right.
    """
    rng = np.random.default_rng(seed)
    verified, unverified = (_gradient(setting, rng_seed=seed, verify=v) for v in (True, False))
    none = np.zeros(DEPTH, np.float32)
    right = verified(none), unverified(none)
    assert all(_outcome(each, each) == RIGHT for each in right), "a gradient without drift is NaN"
    counts: dict[str, Counter] = {"verified": Counter(), "unverified": Counter()}
    false_alarms = 0
    for _ in range(trials):
        size = BOUND * 10.0 ** rng.uniform(-1, 2, DEPTH) * (rng.random(DEPTH) < 0.3)
        eps = size.astype(np.float32)
        one, other = (
            _outcome(fn(eps), each) for fn, each in zip((verified, unverified), right, strict=True)
        )
        counts["verified"][one] += 1
        counts["unverified"][other] += 1
        false_alarms += one == NAN and other == RIGHT
    outcomes = (RIGHT, NAN, WRONG)
    return {
        **{name: {each: count[each] for each in outcomes} for name, count in counts.items()},
        "false_alarms": false_alarms,
    }


def _outcome(found: Any, right: Any) -> str:
    """Leaf by leaf: one that is wrong and finite is enough."""
    pairs = [*zip(jax.tree.leaves(found), jax.tree.leaves(right), strict=True)]
    is_finite = [bool(np.isfinite(a).all()) for a, _ in pairs]
    is_right = [bool((a.view(np.uint32) == b.view(np.uint32)).all()) for a, b in pairs]
    if all(is_right) and all(is_finite):
        return RIGHT
    if any(fine and not same for fine, same in zip(is_finite, is_right, strict=True)):
        return WRONG
    return NAN


def _gradient(setting: Setting, *, rng_seed: int, verify: bool) -> Callable[[np.ndarray], Any]:
    """eps [K] -> the gradients of params and x0, compiled."""
    rng = np.random.default_rng(rng_seed)
    width = SHAPE[-1]
    scale = 1.5 / width**0.5
    params = {
        name: rng.normal(scale=scale, size=(DEPTH, width, width)).astype(np.float32)
        for name in ("up", "down")
    } | {"bias": rng.normal(size=(DEPTH, width)).astype(np.float32)}
    x0 = jnp.asarray(2 * rng.normal(size=SHAPE), jnp.float32)
    key, fixed_point = jax.random.key(rng_seed), FixedPoint(gamma_bits=setting.gamma_bits)
    gamma = sample_gamma(key, DEPTH, SHAPE[0], 2.0**-setting.gamma_bits)
    split = None
    if setting.devices != (1, 1):
        count = int(np.prod(setting.devices))
        devices = np.array(jax.devices()[:count]).reshape(setting.devices)
        split = NamedSharding(
            Mesh(devices, ("data", "sequence")), PartitionSpec("data", "sequence")
        )
        x0 = jax.device_put(x0, split)
    block = partial(_block, jnp.dtype(setting.dtype))
    fns = (*(block,) * (setting.branches - 1), _drifting(block))
    options: dict[str, Any] = setting.options | {"fixed_point": fixed_point}
    options |= {} if verify else {"verify": False}

    def loss(floats, x0, eps):
        x_last = bdia_scan(
            fns if setting.branches > 1 else fns[0], floats | {"eps": eps}, x0, gamma, **options
        )
        return jnp.sum(jnp.sin(x_last))

    fn = jax.jit(jax.grad(loss, (0, 1)))
    return lambda eps: jax.device_get(fn(params, x0, eps))


def _block(dtype, params, x):
    """An MLP over normalized tokens; half of its units are off, where a NaN could get lost."""
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    x = (x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-5)).astype(dtype)
    hidden = jax.nn.relu(x @ params["up"].astype(dtype) + params["bias"].astype(dtype))
    product = jnp.matmul(hidden, params["down"].astype(dtype), preferred_element_type=jnp.float32)
    return 0.5 * product


def _drifting(block):
    """The block, off by +-params["eps"] where it is differentiated, as in the backward pass."""

    @jax.custom_vjp
    def drifting(params, x):
        return block(params, x)

    def forward(params, x):
        h, vjp = jax.vjp(block, params, x)
        sign = jnp.where(h * 1e4 % 2 < 1, 1.0, -1.0)
        return h + params["eps"] * sign, vjp

    drifting.defvjp(forward, lambda vjp, ct: vjp(ct))
    return drifting


def main(argv: list[str]) -> dict:
    """Tries and records."""
    options = record.parser(__doc__)
    options.add_argument("--trials", type=int, default=10_000, help="of all settings together")
    args = record.parse(options, argv)
    record.cpu_devices(8)
    settings = [*SETTINGS.values()]
    trials = args.trials
    if args.toy:
        settings, trials = settings[:1], 20
    each = -(-trials // len(settings))
    results: dict[str, Any] = {"settings": {}}
    for seed, setting in enumerate(settings):
        row = results["settings"][setting.name] = run(setting, each, seed)
        print(f"{setting.name:45s} {row}", flush=True)
    rows = results["settings"].values()
    results["total"] = {
        "trials": each * len(settings),
        "false_alarms": sum(row["false_alarms"] for row in rows),
        **{
            f"{which}_{outcome}": sum(row[which][outcome] for row in rows)
            for which in ("verified", "unverified")
            for outcome in (RIGHT, NAN, WRONG)
        },
    }
    print(results["total"])
    config = {"depth": DEPTH, "shape": SHAPE, "format": FixedPoint(), "trials_per_setting": each}
    record.write("verification", results, config, argv=argv, args=args)
    return results


if __name__ == "__main__":
    main(sys.argv[1:])
