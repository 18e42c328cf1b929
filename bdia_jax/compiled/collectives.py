"""What a compiled program sends between devices, from the text of its HLO.

`collectives(read(compiled.as_text()))` lists them with how often they run; `sent_bytes` adds up
what one device sends with the ring algorithms, of n devices in a group

    all-gather      result (n - 1) / n        all-reduce  2 operand (n - 1) / n
    reduce-scatter  operand (n - 1) / n       all-to-all    operand (n - 1) / n
    collective-permute, collective-broadcast  operand
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from bdia_jax.compiled.hlo import Array, Instruction, Program

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
KINDS += ("collective-broadcast", "ragged-all-to-all")
INTEGERS = ("s8", "s16", "s32", "s64", "u8", "u16", "u32", "u64")


class Collective(NamedTuple):
    """One collective.

    kind: of KINDS; started asynchronously or not.
    results: what a device has of it afterwards.
    group_size: how many devices take part together.
    times: how often it runs; of a conditional's branches, each as if it were taken.
    in_loop: whether a loop runs it.
    source: the operation of the JAX program it was made for.
    """

    kind: str
    results: tuple[Array, ...]
    group_size: int
    times: int
    in_loop: bool
    source: str

    @property
    def bytes(self) -> int:
        """Of the results, once."""
        return sum(result.bytes for result in self.results)

    @property
    def sent(self) -> float:
        """Bytes one device sends, all times together."""
        n = self.group_size
        if n == 1:
            return 0.0
        share = {"all-reduce": 2 * (n - 1) / n, "reduce-scatter": n - 1.0}
        share |= dict.fromkeys(("all-gather", "all-to-all", "ragged-all-to-all"), (n - 1) / n)
        return self.times * self.bytes * share.get(self.kind, 1.0)


def collectives(program: Program, unknown: int | None = None) -> list[Collective]:
    """All that the program runs.

    Args:
        program: of `read`.
        unknown: how often a loop runs of which neither the compiler nor its condition says it; 1
            for the steps of a training program.

    Raises:
        ValueError: such a loop around a collective, and unknown=None.
    """
    return list(_walk(program, program.entry, 1, False, unknown))


def sent_bytes(found: list[Collective]) -> dict[str, float]:
    """Bytes one device sends, by kind (those that occur) and in all ("total")."""
    sent = {kind: sum(c.sent for c in found if c.kind == kind) for kind in KINDS}
    return {kind: size for kind, size in sent.items() if size} | {"total": sum(sent.values())}


def of_integers(found: list[Collective], in_loop: bool = True) -> list[Collective]:
    """Those that carry integers: fixed-point states are s32, packed side bits u8.

    Args:
        found: from `collectives`.
        in_loop: only those a loop runs, as the scans over blocks are.
    """
    return [
        c
        for c in found
        if any(result.dtype in INTEGERS for result in c.results)
        and c.group_size > 1
        and (c.in_loop or not in_loop)
    ]


def _walk(
    program: Program, name: str, times: int, in_loop: bool, unknown: int | None
) -> Iterator[Collective]:
    for one in program.computations[name]:
        kind = one.opcode.removesuffix("-start")
        if kind in KINDS:
            everyone = program.devices
            size = everyone if "permute" in kind else _group_size(one.rest, everyone)
            yield Collective(kind, _results(one), size, times, in_loop, one.source)
        elif one.opcode == "while":
            called = dict(one.called)
            for inner, once_more in (("body", 0), ("condition", 1)):
                for each in _walk(program, called[inner], times, True, unknown):
                    trips = _trips(program, one, unknown) + once_more
                    yield each._replace(times=trips * each.times)
        elif one.opcode not in ("async-done", "async-update"):  # counted where it starts
            for _, inner in one.called:
                yield from _walk(program, inner, times, in_loop, unknown)


def _results(one: Instruction) -> tuple[Array, ...]:
    """Of a start that returns (operands, results, ...), the results."""
    arrays = one.arrays
    if one.opcode in ("all-gather-start", "all-to-all-start", "reduce-scatter-start"):
        return arrays[len(arrays) // 2 :]
    if one.opcode in ("collective-permute-start", "collective-broadcast-start"):
        return arrays[1:2] if not one.type.startswith("((") else arrays[len(arrays) // 2 :]
    return arrays


def _group_size(rest: str, everyone: int) -> int:
    """From {{0,1},{2,3}}, from [2,4]<=[8], or from mesh['a'=2,'b'=4] {'b'}."""
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return listed[1].count(",") + 1
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", rest):
        return int(iota[2])
    if mesh := re.search(r"replica_groups=(?:@?\w+)?\[([^\]]*)\][^{]*\{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'([^']*)'=(\d+)", mesh[1]))
        axes = re.findall(r"'([^']*)'(?::\(\d+\)(\d+))?", mesh[2])  # 'a', or 'a':(1)2 of it
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    return everyone  # replica_groups={}


def _trips(program: Program, loop: Instruction, unknown: int | None) -> int:
    trips = program.trips(loop)
    trips = unknown if trips is None else trips
    if trips is None:
        raise ValueError(
            f"loop {loop.name} has collectives, but neither a known trip count nor a condition "
            "i < n; use lax.scan or fori_loop with constant bounds, or say unknown=1"
        )
    return trips
