"""Reads the text of a compiled program, and says what passes over memory it makes.

`read(compiled.as_text())` parses the HLO of one device, as `jax.jit(f).lower(...).compile()` has
optimized it. A kernel is one pass over memory: an instruction, or a fusion with all it fuses.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

MOVES = {"copy", "copy-start", "transpose", "slice", "concatenate", "pad", "reverse"}

_CONTROL = {"while", "call", "conditional"}  # the kernels stand in what these call
# no memory of their own
_NAMES = {"parameter", "get-tuple-element", "tuple", "bitcast", "constant"}
_HEADER = re.compile(r"^(?:ENTRY )?%?(\S+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?(\S+) = (.*)$")
_ARRAY = re.compile(r"\b(pred|token|[a-z]+\d+\w*)\[([\d,<= ]*)\]")
_CALLED = re.compile(
    r"\b(calls|to_apply|body|condition|\w+_computations?)=(?:\{([^}]*)\}|%?([^\s,}]+))"
)
_OPERAND = re.compile(r"%([\w.\-]+)")


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


class Instruction(NamedTuple):
    """A line of a program. rest: operands and attributes. is_root: the computation's result."""

    name: str
    type: str
    opcode: str
    rest: str
    is_root: bool

    @property
    def arrays(self) -> tuple[Array, ...]:
        """Of the type: one, or those of a tuple."""
        plain = re.sub(r"\{[^{}]*\}|/\*.*?\*/", "", self.type)
        return tuple(
            Array(dtype, tuple(int(size.strip("<= ")) for size in shape.split(",") if size.strip()))
            for dtype, shape in _ARRAY.findall(plain)
        )

    @property
    def source(self) -> str:
        """The operation of the JAX program that it was made for, "" if it does not say."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found[1] if found else ""

    @property
    def operands(self) -> list[str]:
        """The names of what it takes."""
        inside = self.rest[: _closing("(" + self.rest) - 2]
        plain = re.sub(r"/\*.*?\*/", "", inside)
        return [] if self.opcode in ("constant", "parameter") else _OPERAND.findall(plain)

    @property
    def called(self) -> list[tuple[str, str]]:
        """(attribute, computation) of every one it calls."""
        return [
            (attribute, name.strip().lstrip("%"))
            for attribute, several, one in _CALLED.findall(self.rest)
            for name in (several or one).split(",")
        ]


class Kernel(NamedTuple):
    """One pass over memory.

    dtype, shape: of what it writes.
    ops: its operation, or all that a fusion does; names and constants are none.
    """

    dtype: str
    shape: tuple[int, ...]
    ops: frozenset[str]

    @property
    def moves(self) -> bool:
        """Whether it does no arithmetic. A block's slice of the parameters is read, not moved."""
        return bool(self.ops & MOVES) and self.ops <= MOVES | {"dynamic-slice"}


class Program(NamedTuple):
    """A parsed program.

    computations: instructions by name.
    entry: the name of the computation that it begins with.
    devices: how many run it together.
    """

    computations: dict[str, list[Instruction]]
    entry: str
    devices: int

    def kernels(self) -> list[Kernel]:
        """All of them; one that writes a tuple stands for each of its arrays."""
        return self._kernels(self.entry)

    def loops(self) -> list[list[Kernel]]:
        """Those of every loop in which there is no other loop."""
        loops = [one for one in self._instructions(self.entry) if one.opcode == "while"]
        bodies = dict.fromkeys(dict(loop.called)["body"] for loop in loops)
        return [
            self._kernels(body)
            for body in bodies
            if not any(one.opcode == "while" for one in self._instructions(body))
        ]

    def trips(self, loop: Instruction) -> int | None:
        """How often a loop runs, if it says so, or is one as a scan has it."""
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest):
            return int(known[1])
        # as a scan has it: an index from 0 in steps of 1, compared with a constant
        reached = [*self.computations[dict(loop.called)["condition"]]]
        for one in reached:
            reached += [i for _, inner in one.called for i in self.computations[inner]]
        compares = [one for one in reached if one.opcode == "compare"]
        bounds = [one for one in reached if one.opcode == "constant" and one.type.startswith("s")]
        if len(compares) == len(bounds) == 1 and "direction=LT" in compares[0].rest:
            return int(bounds[0].rest.partition(")")[0])
        return None

    def _instructions(self, name: str) -> Iterator[Instruction]:
        """Of a computation, and of those it hands over to; not what fusions and reductions call."""
        for one in self.computations[name]:
            yield one
            for _, inner in one.called if one.opcode in _CONTROL else ():
                yield from self._instructions(inner)

    def _kernels(self, name: str) -> list[Kernel]:
        found: list[Kernel] = []
        broadcasts: set[str] = set()
        for one in self._instructions(name):
            ops = {one.opcode}
            if one.opcode == "fusion":
                (_, fused), *_ = one.called
                ops = {inner.opcode for inner in self.computations[fused]}
            ops -= _NAMES | _CONTROL
            # several arrays of one shape that begin as zeros: one broadcast and its copies
            if ops == {"copy"} and broadcasts.issuperset(one.operands):
                ops = {"broadcast"}
            if ops == {"broadcast"}:
                broadcasts.add(one.name)
            if ops:
                found += [Kernel(*array, frozenset(ops)) for array in one.arrays]
        return found


def read(text: str) -> Program:
    """The program of this text.

    Raises:
        ValueError: it is no HLO module.
    """
    computations: dict[str, list[Instruction]] = {}
    entry, current = None, None
    for line in text.splitlines():
        if current is None:
            if header := _HEADER.match(line):
                current = computations.setdefault(header[1], [])
                entry = header[1] if line.startswith("ENTRY") else entry
        elif line.startswith("}"):
            current = None
        elif found := _INSTRUCTION.match(line):
            current.append(_instruction(*found.groups()))
    if entry is None:
        raise ValueError(f"no entry computation in {text[:60]!r}; pass compiled.as_text()")
    counts = (re.search(rf"{name}=(\d+)", text) for name in ("num_partitions", "replica_count"))
    return Program(computations, entry, math.prod(int(count[1]) for count in counts if count))


def _instruction(root: str | None, name: str, text: str) -> Instruction:
    """A type, an opcode, operands; a tuple's type has parentheses of its own."""
    end = _closing(text) if text.startswith("(") else text.index(" ")
    opcode, _, rest = text[end:].strip().partition("(")
    return Instruction(name, text[:end], opcode, rest, bool(root))


def _closing(text: str) -> int:
    depth = 0
    for position, char in enumerate(text):
        depth += (char == "(") - (char == ")")
        if depth == 0:
            return position + 1
    raise ValueError(f"unbalanced parentheses in {text[:80]!r}")
