"""The exactness soak: 10^10 rebuilt activations compared with the forward's, bit for bit.

Many settings in turn: transformer and MLP blocks, float32 and bfloat16, formats, dropout, by branch
and in chunks, on one CPU device and on meshes of two to eight. Every round draws new parameters
(from half to four times the usual size), inputs, gammas and dropout keys from its seed, and runs
the forward and backward pass of `bdia_jax.audit`, compiled once a setting. In every fourth round
of a setting the backward pass also runs compiled without anything being looked at, and x_0 is
compared at its end.

Guard bits are those an audit suggests. At 4096 tokens on a device and more XLA's CPU compiler fuses
LayerNorm otherwise in the backward pass than in the forward (YNNPACK), which float32 bears with 1
to 5 of them, but bfloat16 at four times the usual size with none: those settings have fewer tokens,
or sizes up to 1.

The controls are counted by the same code, and two of the three must show mismatches: a block
that is off by +-1e-5 in the backward pass, with the parity bit alone and, exact again, with one
guard bit; bfloat16 under `benchmarks.faults.unpinned`.

A line is added to soak_rounds.jsonl after every round; started again, the program goes on from
there.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from bdia_jax import sample_gamma
from bdia_jax.audit import forward_and_back, prepare
from bdia_jax.nnx import BDIAStack
from bdia_jax.sharding import AXES, BATCH_AXES, make_mesh, param_shardings, state_sharding
from benchmarks import record
from benchmarks.faults import unpinned
from benchmarks.soak_settings import CONTROLS, OFF_BY, SCALES, SETTINGS, Setting, make_stack, toy

UNPROBED_EVERY = 4


# --- one setting -------------------------------------------------------------------------


class Soak:
    """One setting, compiled: `run(seed, unprobed)` is a round."""

    def __init__(self, setting: Setting):
        self.setting = setting
        stack = make_stack(setting)
        x = jax.ShapeDtypeStruct(setting.shape, jnp.float32)
        functions = stack._functions(x, nnx.Rngs(0))  # pyright: ignore[reportArgumentType]
        self.pure, self.block_fn, self.chunks = functions
        self.draw = jax.jit(self._draw, out_shardings=self._shardings(stack))
        self.backward = jax.jit(self._backward, static_argnums=3)

    def run(self, seed: int, unprobed: bool) -> dict:
        """Counts of one round."""
        start = time.perf_counter()
        operands = self.draw(seed)
        with nullcontext() if self.setting.pinned else unpinned():
            _, seen, _ = self.backward(*operands, True)
            wrong_x0 = int(self.backward(*operands, False)[0]) if unprobed else None
        seen = {name: np.asarray(values)[1:] for name, values in seen.items()}  # 0 undoes nothing
        counts = {name: int(seen[name].sum()) for name in ("mismatches", "corrections", "invalid")}
        return {
            "setting": self.setting.name,
            "seed": seed,
            "elements": self.setting.elements,
            **counts,
            "max_drift": float(seen["drift"].max()),
            "drift_bound": self.setting.fixed_point.drift_bound,
            "unprobed_x0_mismatches": wrong_x0,
            "seconds": round(time.perf_counter() - start, 3),
        }

    def _draw(self, seed):
        """(params, x0, gamma): kernels and x0 of a random size, everything else about its usual."""
        setting = self.setting
        keys = iter(jax.random.split(jax.random.key(seed), 100))
        sizes = jnp.array([size for size in SCALES if size <= setting.largest])
        scale, size = jax.random.choice(next(keys), sizes, (2,))
        leaves, treedef = jax.tree.flatten(self.pure.params)

        def fresh(leaf):
            if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                return jax.random.split(next(keys), leaf.shape)
            if not jnp.issubdtype(leaf.dtype, jnp.floating):
                return leaf
            noise = jax.random.normal(next(keys), leaf.shape)
            if leaf.ndim == 3:  # [K, in, out]
                return scale * noise / leaf.shape[1] ** 0.5
            return leaf + 0.1 * scale * noise

        params = treedef.unflatten([fresh(leaf) for leaf in leaves])
        x0 = size * jax.random.normal(next(keys), setting.shape)
        magnitude = 2.0**-setting.gamma_bits
        return params, x0, sample_gamma(next(keys), setting.depth, setting.batch, magnitude)

    def _shardings(self, stack: BDIAStack):
        """Of (params, x0, gamma), as training places them; keys and counts are whole everywhere."""
        setting = self.setting
        mesh = make_mesh(**{name: getattr(setting, name) for name in AXES})
        whole = NamedSharding(mesh, PartitionSpec())
        _, *others = self.pure.params
        params = (param_shardings(stack, mesh)["blocks"], *jax.tree.map(lambda _: whole, others))
        gamma = NamedSharding(mesh, PartitionSpec(None, BATCH_AXES))
        return params, state_sharding(mesh, setting.shape), gamma

    def _backward(self, params, x0, gamma, probe):
        whole = {"batch_chunks": 1, "token_chunks": 1, "per_sample": None}
        options = {"fixed_point": self.setting.fixed_point, "backprop": "reversible"}
        options |= {"has_aux": True} | whole | self.chunks
        static, operands = prepare(self.block_fn, params, x0, gamma, (), **options)
        return forward_and_back(static, operands, probe)


compiled = cache(Soak)


# --- all of them -------------------------------------------------------------------------


_COUNTS = ("rounds", "elements", "mismatches", "invalid", "corrections", "seconds")
_EMPTY = dict.fromkeys((*_COUNTS, "unprobed_rounds", "unprobed_x0_mismatches", "max_drift"), 0)
_EMPTY |= {"seeds": []}


def summary(rounds: list[dict]) -> dict:
    """Sums over all rounds, and a row a setting."""
    rows: dict[str, dict] = {}
    for one in rounds:
        row = rows.setdefault(one["setting"], _EMPTY | {"drift_bound": one["drift_bound"]})
        for name in _COUNTS:
            row[name] += one.get(name, 1)  # of rounds each is one
        row["max_drift"] = max(row["max_drift"], one["max_drift"])
        if one["unprobed_x0_mismatches"] is not None:
            row["unprobed_rounds"] += 1
            row["unprobed_x0_mismatches"] += one["unprobed_x0_mismatches"]
        row["seeds"] = [*row["seeds"], one["seed"]]
    names = (*_COUNTS, "unprobed_x0_mismatches")
    total = {name: sum(row[name] for row in rows.values()) for name in names}
    return {"total": total | {"seconds": round(total["seconds"])}, "settings": rows}


def read_lines(path: Path) -> list[dict]:
    """Rounds and controls of an earlier run. A last line that was cut off is removed."""
    if not path.exists():
        return []
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]
    path.write_text(whole)
    return [json.loads(line) for line in whole.splitlines()]


def control(setting: Setting, must_be_exact: bool) -> dict:
    """A round of a setting of CONTROLS."""
    found = compiled(setting).run(0, unprobed=True)
    as_expected = (found["mismatches"] == 0) == must_be_exact
    print(f"control: {found['mismatches']} differ  {setting.name}", flush=True)
    return found | {"must_be_exact": must_be_exact, "as_expected": as_expected}


def soak(
    settings: Sequence[Setting],
    controls: Sequence[tuple[Setting, bool]],
    path: Path,
    is_enough: Callable[[dict], bool],
    keep: Callable[[dict], Any] = lambda results: None,
) -> dict:
    """The controls once, then rounds of the settings in turn; stops at once if an element differs.

    Args:
        settings: all different.
        controls: (setting, whether it must be exact).
        path: gets a line after every round; those in it count, of settings named here.
        is_enough: of the results, whether to end.
        keep: is handed the results after every round.

    Returns:
        The `summary` of all rounds, and "controls".
    """
    lines = read_lines(path)

    def add(line: dict) -> dict:
        lines.append(line | {"jax": jax.__version__})
        with path.open("a") as file:
            file.write(json.dumps(lines[-1]) + "\n")
        return line

    done = {line["setting"]: line for line in lines}
    checked = [done.get(each[0].name) or add(control(*each)) for each in controls]
    names = [setting.name for setting in settings]
    rounds = [line for line in lines if line["setting"] in names]
    results: dict[str, Any] = summary(rounds) | {"controls": checked}
    keep(results)
    while not (is_enough(results) or _wrong(results)):
        counts = [sum(one["setting"] == name for one in rounds) for name in names]
        index = int(np.argmin(counts))
        seed = counts[index] * len(SETTINGS) + index  # no two rounds alike
        unprobed = counts[index] % UNPROBED_EVERY == 0
        rounds.append(found := add(compiled(settings[index]).run(seed, unprobed)))
        results = summary(rounds) | {"controls": checked}
        keep(results)
        total = results["total"]
        print(
            f"{total['elements']:.4e} compared  {total['mismatches']} differ  "
            f"{found['elements'] / found['seconds'] / 1e6:6.1f} M/s  {found['setting']}",
            flush=True,
        )
    return results


def _wrong(results: dict) -> int:
    total = results["total"]
    return total["mismatches"] + total["unprobed_x0_mismatches"] + total["invalid"]


def verdict(results: dict) -> bool:
    """Whether nothing differed and the controls came out as they must."""
    return not _wrong(results) and all(found["as_expected"] for found in results["controls"])


def main(argv: list[str]) -> dict:
    """Goes on until enough elements are compared, and records after every round."""
    options = record.parser(__doc__)
    options.add_argument("--elements", type=float, default=1e10, help="to compare in all")
    options.add_argument("--rounds", type=int, help="of each setting, in place of --elements")
    args = record.parse(options, argv)
    record.cpu_devices(8)
    settings, controls = [*SETTINGS], [*CONTROLS]
    if args.toy:
        settings = [toy(SETTINGS[-1])]
        controls = [(toy(setting), exact) for setting, exact in CONTROLS[:2]]
        args.rounds = args.rounds or 1
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{record.stem('soak_rounds')}.jsonl"
    config = {"scales": SCALES, "unprobed_every": UNPROBED_EVERY, "off_by": OFF_BY}

    def is_enough(results: dict) -> bool:
        if args.rounds is None:
            return results["total"]["elements"] >= args.elements
        counts = [row["rounds"] for row in results["settings"].values()]
        return len(counts) == len(settings) and min(counts) >= args.rounds

    def keep(results: dict) -> None:
        record.write("soak", results, config, argv=argv, args=args)

    return soak(settings, controls, path, is_enough, keep)


if __name__ == "__main__":
    sys.exit(not verdict(main(sys.argv[1:])))
