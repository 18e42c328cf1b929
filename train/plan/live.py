"""The most memory a program needs at a time: which values are written, and how long they live.

As XLA does it, in short. Elementwise work, broadcasts and transposes are fused into whatever uses
them; written are results of matrix products, reductions, scans and gathers, what a matrix product
takes, and what is dear to compute and used twice. A value lives from where it is computed to its
last use, in the program's order. An elementwise result may overwrite an operand that nobody needs
any more, and a scan's carry its initial value.
"""

import collections
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

from train.plan.flat import Equation, Value
from train.plan.kinds import DEAR, FUSED, IN_PLACE, MOVES, REDUCTIONS, SAME


@dataclasses.dataclass(frozen=True)
class Device:
    """What compilers for a kind of device do differently.

    Attributes:
        copies_layouts: an operand of a matrix product whose axes are not in its order is copied.
        fuses_reductions: what a reduction takes is not written.
        combines_sums: the sums over devices of a block's gradients are taken at its end, together.
        random_counters: arrays random bits are computed from, held throughout a scan.
        random_buffers: further arrays beside the random bits while they are computed.
        flash_tokens: T, if attention weights [.., T, .., T] are never written; 0 if they are.
    """

    copies_layouts: bool = False
    fuses_reductions: bool = True
    combines_sums: bool = False
    random_counters: int = 0
    random_buffers: int = 0
    flash_tokens: int = 0


@dataclasses.dataclass(frozen=True)
class Peak:
    """The moment of the most bytes: what lives then, during which equation."""

    bytes: int
    live: dict[Value, int]
    equation: Equation | None


def peaks(
    equations: list[Equation],
    arguments: Sequence[Value],
    results: Sequence[Value],
    sizes: dict[str, int],
    device: Device,
    carry: tuple[int, int] | None = None,
) -> Iterator[Peak]:
    """Every equation's moment, arguments not counted.

    Args:
        carry: of a scan's body: how many of the arguments are its consts, and its carry. Then
            the rest are rows, counted from their first use (they are cut out of the whole), and
            results beyond the carry are written to the whole at once.
    """
    if carry and device.combines_sums:
        equations = _sums_last(equations, results[carry[1] :])
    program = _Program(equations, arguments, results, sizes, device)
    rows: set[Value] = set()
    now = 0
    if carry:
        num_consts, num_carry = carry
        rows = {program.root(value) for value in arguments[num_consts + num_carry :]}
        slots = [program.root(value) for value in arguments[num_consts:][:num_carry]]
        now = program.exchanged(slots, results[:num_carry]) + program.counters()
        program.write_at_once(results[num_carry:], results[:num_carry])
    outside = {program.root(value) for value in arguments}
    live: dict[Value, int] = {}
    for index, equation in enumerate(program.equations):
        new = [value for value in program.written(equation) if value not in outside]
        if not new:
            continue
        if equation.name not in FUSED or equation.name == "layout_copy":
            taken = {program.root(value) for value in equation.ins} & rows
            rows -= taken
            new += taken
        dying = {value for value in live if program.last.get(value, -1) <= index}
        size = sum(program.bytes(value) for value in new)
        live |= {value: program.bytes(value) for value in new}
        now += size
        overwritten = min(size, sum(live[v] for v in dying & program.overwritable(equation)))
        within = equation.inner
        if equation.name == "random_bits":
            within = device.random_buffers * size
        yield Peak(now + within - overwritten, dict(live), equation)
        for value in [value for value in live if program.last.get(value, -1) <= index]:
            now -= live.pop(value)


class _Program:
    """Equations, which values are written, and the last use of each."""

    def __init__(self, equations, arguments, results, sizes, device: Device):
        self._sizes, self._device = sizes, device
        self._same: dict[Value, Value] = {}
        self.equations = self._distinct(equations)
        if device.copies_layouts:
            self.equations = list(self._with_copies(self.equations))
        self._stacked = {
            self.root(value)
            for equation in self.equations
            if equation.name == "scan"
            for value in _rows(equation)
        }
        self._producer = {out: e for e in self.equations for out in e.outs}
        self._users: dict[Value, list[Equation]] = {}
        for equation in self.equations:
            for value in equation.ins:
                self._users.setdefault(self.root(value), []).append(equation)
        finals = {self.root(value) for value in results}
        self._held = {self.root(value) for value in arguments}
        self._held |= {v for v in self._producer if v in finals or self._is_written(v)}
        self._sources: dict[Value, frozenset[Value]] = {}
        self.last: dict[Value, int] = {}
        for index, equation in enumerate(self.equations):
            if self.written(equation):
                for value in equation.ins:
                    self.last |= dict.fromkeys(self.sources(value), index)
        for value in results:
            self.last |= dict.fromkeys(self.sources(value), len(self.equations))

    def _distinct(self, equations) -> list[Equation]:
        """Without those that only give a value another name."""
        distinct = []
        for equation in equations:
            if equation.name in SAME:
                self._same |= zip(equation.outs, equation.ins, strict=True)
            else:
                distinct.append(equation)
        return distinct

    def _with_copies(self, equations) -> Iterator[Equation]:
        made: dict[Any, Value] = {}
        for equation in equations:
            if equation.name == "dot_general":
                contract, batch = equation.params["dimension_numbers"]
                ins = []
                for side, value in enumerate(equation.ins):
                    order = _other_order(value, contract[side], batch[side], is_left=side == 0)
                    key = (self.root(value), order)
                    if order and key not in made:
                        made[key] = Value(value.shape, value.dtype, value.split)
                        yield Equation("layout_copy", [value], [made[key]], {})
                    ins.append(made[key] if order else value)
                equation = dataclasses.replace(equation, ins=ins)
            yield equation

    def root(self, value: Value) -> Value:
        """The value of which this one is another name."""
        while value in self._same:
            value = self._same[value]
        return value

    def bytes(self, value: Value) -> int:
        tokens = self._device.flash_tokens
        axes = len(value.shape) - (value in self._stacked)
        if tokens and axes > 3 and value.shape.count(tokens) > 1:
            return 0
        return value.local_bytes(self._sizes)

    def _is_written(self, value: Value) -> bool:
        name = self._producer[value].name
        if name not in FUSED or name == "layout_copy":
            return True
        fused = FUSED | REDUCTIONS if self._device.fuses_reductions else FUSED
        users = self._users.get(value, [])
        if name in DEAR and len(users) > 1:
            return True
        # XLA moves a broadcast number into the scans that read it
        is_number = (
            name == "broadcast_in_dim" and math.prod(self._producer[value].ins[0].shape) == 1
        )
        return any(
            user.name not in fused and not (is_number and self._is_const(value, user))
            for user in users
        )

    def _is_const(self, value: Value, scan: Equation) -> bool:
        if scan.name != "scan":
            return False
        others = scan.ins[scan.params["num_consts"] :]
        return all(self.root(other) is not value for other in others)

    def written(self, equation: Equation) -> list[Value]:
        return [out for out in equation.outs if out in self._held]

    def sources(self, value: Value) -> frozenset[Value]:
        """The written values that are read to compute this one, or itself."""
        value = self.root(value)
        if value in self._held or value not in self._producer:
            return frozenset([value])
        if value not in self._sources:
            each = (self.sources(v) for v in self._producer[value].ins)
            self._sources[value] = frozenset().union(*each)
        return self._sources[value]

    def overwritable(self, equation: Equation) -> set[Value]:
        """What its results may overwrite."""
        ins = equation.ins if equation.name in IN_PLACE else []
        if equation.name == "scan":
            first = equation.params["num_consts"]
            ins = ins[first : first + equation.params["num_carry"]]
        return {source for value in ins for source in self.sources(value)}

    def exchanged(self, slots: Sequence[Value], results: Sequence[Value]) -> int:
        """Bytes of copies of carries of which each becomes a part of the other."""
        read = [self.sources(value) for value in results]
        pairs = ((i, j) for i in range(len(slots)) for j in range(i))
        return sum(
            self.bytes(slots[i]) for i, j in pairs if slots[i] in read[j] and slots[j] in read[i]
        )

    def counters(self) -> int:
        """Bytes of `Device.random_counters`: one set for all random bits of a shape."""
        each = {
            out.shape: self.bytes(out)
            for equation in self.equations
            if equation.name == "random_bits"
            for out in equation.outs
        }
        return self._device.random_counters * sum(each.values())

    def write_at_once(self, values: Sequence[Value], kept: Sequence[Value]) -> None:
        """Lets results live to their last use only."""
        stays = {self.root(value) for value in kept}
        for value in {self.root(value) for value in values} - stays:
            uses = [
                index
                for index, equation in enumerate(self.equations)
                if self.written(equation) and any(value in self.sources(v) for v in equation.ins)
            ]
            if value in self._producer:
                self.last[value] = max(uses, default=-1)


def _rows(scan: Equation) -> list[Value]:
    """What a scan reads and writes a row of at a time."""
    num_carry = scan.params["num_carry"]
    return [*scan.ins[scan.params["num_consts"] + num_carry :], *scan.outs[num_carry:]]


def _sums_last(equations: list[Equation], results: Sequence[Value]) -> list[Equation]:
    """With the sums over devices that only these results are made of at the end."""
    producer = {out: e for e in equations for out in e.outs}
    users = collections.Counter(value for e in equations for value in e.ins)
    last: set[int] = set()
    for value in results:
        chain = []
        while value in producer and users[value] <= 1:
            equation = producer[value]
            chain.append(id(equation))
            if equation.name == "all_reduce":
                last |= set(chain)
            if equation.name not in SAME | MOVES or len(equation.ins) != 1:
                break
            value = equation.ins[0]
    return sorted(equations, key=lambda equation: id(equation) in last)


def _other_order(value: Value, contract, batch, *, is_left: bool) -> tuple[int, ...]:
    """The order of axes a matrix product takes: batch, free, contracted; on the right also batch,
    contracted, free. () if the value has it."""
    axes = [axis for axis, length in enumerate(value.shape) if length > 1]
    free = [axis for axis in axes if axis not in contract and axis not in batch]
    batch, contract = ([axis for axis in some if axis in axes] for some in (batch, contract))
    orders = [[*batch, *free, *contract], [*batch, *contract, *free]][: 1 if is_left else 2]
    return () if axes in orders else tuple(orders[-1])
