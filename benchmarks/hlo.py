"""What a compiled program sends between devices: the collectives in the text of its HLO.

`collectives(compiled.as_text())` lists them with how often they run; `sent_bytes` adds up what one
device sends with the ring algorithms, of n devices in a group

    all-gather      result (n - 1) / n        all-reduce  2 operand (n - 1) / n
    reduce-scatter  operand (n - 1) / n       all-to-all    operand (n - 1) / n
    collective-permute, collective-broadcast  operand

The program has to be the optimized one, of `jax.jit(f).lower(...).compile()`: that of one device.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
KINDS += ("collective-broadcast", "ragged-all-to-all")
INTEGERS = ("s8", "s16", "s32", "s64", "u8", "u16", "u32", "u64")

_HEADER = re.compile(r"^(?:ENTRY )?%?(\S+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?(\S+) = (.*)$")
_ARRAY = re.compile(r"\b(pred|token|[a-z]+\d+\w*)\[([\d,<= ]*)\]")
_CALLED = re.compile(
    r"\b(calls|to_apply|body|condition|true_computation|false_computation)=%?([^\s,}]+)"
)
_CALLED_LISTS = re.compile(r"\b(branch_computations|called_computations)=\{([^}]*)\}")


class Array(NamedTuple):
    """dtype as HLO writes it (f32, bf16, s32, u8), and shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        bits = {"pred": 8, "token": 0}.get(self.dtype)
        if bits is None:  # f32, bf16, s4, f8e4m3fn
            bits = int(re.findall(r"\d+", self.dtype)[0])
        return -(-math.prod(self.shape) * bits // 8)


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


def collectives(text: str) -> list[Collective]:
    """All that the program runs.

    Args:
        text: of an optimized HLO module.

    Raises:
        ValueError: no HLO module; a loop around a collective of which neither the compiler nor
            its condition says how often it runs.
    """
    computations, entry = _computations(text)
    if entry is None:
        raise ValueError(f"no entry computation in {text[:60]!r}; pass compiled.as_text()")
    devices = re.search(r"num_partitions=(\d+)", text)
    replicas = re.search(r"replica_count=(\d+)", text)
    world = math.prod(int(found.group(1)) for found in (devices, replicas) if found)
    return list(_walk(computations, entry, 1, False, world))


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


# --- the text ----------------------------------------------------------------------------


class _Instruction(NamedTuple):
    name: str
    type: str
    opcode: str
    rest: str  # operands and attributes


def _computations(text: str) -> tuple[dict[str, list[_Instruction]], str | None]:
    """(instructions of each computation, the name of the entry)."""
    computations: dict[str, list[_Instruction]] = {}
    entry, current = None, None
    for line in text.splitlines():
        if current is None:
            if header := _HEADER.match(line):
                current = computations.setdefault(header.group(1), [])
                entry = header.group(1) if line.startswith("ENTRY") else entry
        elif line.startswith("}"):
            current = None
        elif found := _INSTRUCTION.match(line):
            current.append(_instruction(*found.groups()))
    return computations, entry


def _instruction(name: str, text: str) -> _Instruction:
    """A type, an opcode, operands; a tuple's type has parentheses of its own."""
    end = _closing(text) if text.startswith("(") else text.index(" ")
    opcode, _, rest = text[end:].strip().partition("(")
    return _Instruction(name, text[:end], opcode, rest)


def _closing(text: str) -> int:
    depth = 0
    for position, char in enumerate(text):
        depth += (char == "(") - (char == ")")
        if depth == 0:
            return position + 1
    raise ValueError(f"unbalanced parentheses in {text[:80]!r}")


def _walk(computations, name: str, times: int, in_loop: bool, world: int) -> Iterator[Collective]:
    for one in computations[name]:
        kind = one.opcode.removesuffix("-start")
        if kind in KINDS:
            source = re.search(r'op_name="([^"]*)"', one.rest)
            yield Collective(
                kind,
                _results(one),
                _group_size(one.rest, world) if "permute" not in kind else world,
                times,
                in_loop,
                source.group(1) if source else "",
            )
        elif one.opcode in ("async-done", "async-update"):
            continue  # counted where it starts
        elif one.opcode == "while":
            called = dict(_CALLED.findall(one.rest))
            inner = [*_walk(computations, called["body"], 1, True, world)]
            checks = [*_walk(computations, called["condition"], 1, True, world)]
            if inner or checks:
                trips = _trips(computations, one, called["condition"])
                yield from (c._replace(times=times * trips * c.times) for c in inner)
                yield from (c._replace(times=times * (trips + 1) * c.times) for c in checks)
        else:
            called = [called for _, called in _CALLED.findall(one.rest)]
            for _, names in _CALLED_LISTS.findall(one.rest):
                called += [called.strip().lstrip("%") for called in names.split(",")]
            for inner in called:
                yield from _walk(computations, inner, times, in_loop, world)


def _results(one: _Instruction) -> tuple[Array, ...]:
    """Of a start that returns (operands, results, ...), the results."""
    arrays = tuple(
        Array(dtype, tuple(int(size.strip("<= ")) for size in shape.split(",") if size.strip()))
        for dtype, shape in _ARRAY.findall(re.sub(r"\{[^{}]*\}|/\*.*?\*/", "", one.type))
    )
    if one.opcode in ("all-gather-start", "all-to-all-start", "reduce-scatter-start"):
        return arrays[len(arrays) // 2 :]
    if one.opcode in ("collective-permute-start", "collective-broadcast-start"):
        return arrays[1:2] if not one.type.startswith("((") else arrays[len(arrays) // 2 :]
    return arrays


def _group_size(rest: str, world: int) -> int:
    """From {{0,1},{2,3}}, from [2,4]<=[8], or from mesh['a'=2,'b'=4] {'b'}."""
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return listed.group(1).count(",") + 1
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", rest):
        return int(iota.group(2))
    if mesh := re.search(r"replica_groups=(?:@?\w+)?\[([^\]]*)\][^{]*\{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'([^']*)'=(\d+)", mesh.group(1)))
        axes = re.findall(r"'([^']*)'(?::\(\d+\)(\d+))?", mesh.group(2))  # 'a', or 'a':(1)2 of it
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    return world  # replica_groups={}


def _trips(computations, loop: _Instruction, condition: str) -> int:
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest):
        return int(known.group(1))
    # as a scan has it: an index from 0 in steps of 1, compared with a constant
    reached = [*computations[condition]]
    for one in reached:
        reached += [i for _, called in _CALLED.findall(one.rest) for i in computations[called]]
    compares = [one for one in reached if one.opcode == "compare"]
    bounds = [one for one in reached if one.opcode == "constant" and one.type.startswith("s")]
    if len(compares) == len(bounds) == 1 and "direction=LT" in compares[0].rest:
        return int(bounds[0].rest.partition(")")[0])
    raise ValueError(
        f"loop {loop.name} has collectives, but neither a known trip count nor a condition i < n; "
        "use lax.scan or fori_loop with constant bounds"
    )
