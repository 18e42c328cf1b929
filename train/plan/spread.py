"""Which part of every value of a program a device holds: XLA's propagation of shardings, in short.

What is known is how arguments and gradients are split (`bdia_jax.sharding`), and the states, by
the constraint in the program. The rest follows equation by equation, forward. An operand of a
matrix product that is split in a way the other cannot follow is gathered, once: the parameters
of a block over fsdp, keys and values over sequence. An equation this does not know returns its
result whole, which is never too little.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

from train.plan.flat import Equation, Split, Value, alive, as_split, flatten, parts, whole
from train.plan.kinds import ELEMENTWISE, MOVES, REDUCTIONS

_MAKERS = frozenset({"broadcast_in_dim", "iota", "random_bits"})

# (equations of a scan's body, arguments, results, (number of consts, of carries)) -> bytes
Inner = Callable[[list[Equation], list[Value], list[Value], tuple[int, int]], int]


class Spread:
    """Propagation over a mesh with axes of `sizes`; `inner` measures the bodies of scans."""

    def __init__(self, sizes: dict[str, int], inner: Inner):
        self.sizes = sizes
        self._inner = inner
        self._free: set[Value] = set()  # made by every device, so split as whoever uses them
        self.wanted: dict[Value, Split] = {}

    def __call__(
        self, equations: list[Equation], results: Sequence[Value], wanted: Sequence[Split | None]
    ) -> list[Equation]:
        """The equations with every split filled in, gathers put between, scans measured.

        Args:
            wanted: how the results are to be split; None: as it comes. `self.wanted` tells it of
                what they are sums of, too.
        """
        equations = alive(equations, results)
        self.wanted |= {v: w for v, w in zip(results, wanted, strict=True) if w is not None}
        for equation in reversed(equations):
            for out in equation.outs:
                if out in self.wanted and equation.name in ELEMENTWISE:
                    for value in equation.ins:
                        if value.shape == out.shape:
                            self.wanted.setdefault(value, self.wanted[out])
        done: list[Equation] = []
        gathered: dict[tuple[Value, Split], Value] = {}
        for equation in equations:
            if equation.name == "scan":
                self._scan(equation)
            elif equation.name == "dot_general":
                equation = self._product(equation, done, gathered)
            else:
                self._simple(equation)
            done.append(equation)
        for equation in reversed(done):
            if equation.name in ELEMENTWISE:
                self._split_free(equation.ins, equation.outs[0])
        return done

    def _fit(self, split: Sequence[Sequence[str]], shape: Sequence[int]) -> Split:
        """Every mesh axis once, and only where it divides."""
        seen: set[str] = set()
        fitted = []
        for axes, length in zip(split, shape, strict=True):
            axes = tuple(a for a in dict.fromkeys(axes) if a not in seen and self.sizes[a] > 1)
            axes = () if length % parts(axes, self.sizes) else axes
            seen |= set(axes)
            fitted.append(axes)
        return tuple(fitted)

    def _simple(self, equation: Equation) -> None:
        for out in equation.outs:
            split = self._fit(_rule(equation, out), out.shape)
            if out in self.wanted and equation.name in ELEMENTWISE | MOVES | {"scatter-add"}:
                split = self._joined(split, self.wanted[out], out.shape)
            out.split = split
        if equation.name in _MAKERS | ELEMENTWISE and all(
            math.prod(value.shape) == 1 or value in self._free for value in equation.ins
        ):
            self._free.add(equation.outs[0])

    def _split_free(self, ins: Sequence[Value], out: Value) -> None:
        for value in ins:
            if value in self._free and value.shape == out.shape:
                value.split = self._joined(value.split, out.split, out.shape)

    def _joined(self, split: Split, other: Split, shape: Sequence[int]) -> Split:
        """`split` where it says something, else `other`."""
        used = {axis for axes in split for axis in axes}
        both = [(*a, *(x for x in b if x not in used)) for a, b in zip(split, other, strict=True)]
        return self._fit(both, shape)

    def _product(self, equation: Equation, done: list[Equation], gathered: dict) -> Equation:
        (out,) = equation.outs
        contract, batch = equation.params["dimension_numbers"]
        ins = list(equation.ins)
        small = min(range(2), key=lambda side: math.prod(ins[side].shape))
        yielding, other = ins[small], ins[1 - small]
        used = {axis for axes in other.split for axis in axes}
        split = list(yielding.split)
        for axis in range(len(split)):
            facing: tuple[str, ...] = ()
            for pairs in (contract, batch):
                if axis in pairs[small]:
                    facing = other.split[pairs[1 - small][list(pairs[small]).index(axis)]]
            split[axis] = tuple(a for a in split[axis] if a not in used or a in facing)
        if tuple(split) != yielding.split:
            key = (yielding, tuple(split))
            if key not in gathered:
                gathered[key] = Value(yielding.shape, yielding.dtype, tuple(split))
                done.append(Equation("all_gather", [yielding], [gathered[key]], {}))
            ins[small] = gathered[key]
        left, right = ins
        taken = {
            axis
            for value, axes in zip(ins, contract, strict=True)
            for i in axes
            for axis in value.split[i]
        }
        rows = [(*left.split[i], *right.split[j]) for i, j in zip(*batch, strict=True)]
        for side, value in enumerate(ins):
            free = set(range(len(value.shape))) - {*contract[side], *batch[side]}
            rows += [value.split[i] for i in sorted(free)]
        split = self._fit([[a for a in axes if a not in taken] for axes in rows], out.shape)
        out.split = self._joined(split, self.wanted.get(out, whole(len(out.shape))), out.shape)
        if parts(sorted(taken), self.sizes) == 1:
            return Equation(equation.name, ins, equation.outs, equation.params)
        partial = Value(out.shape, out.dtype, split)  # every device's own sum
        done.append(Equation(equation.name, ins, [partial], equation.params))
        return Equation("all_reduce", [partial], [out], {})

    def _scan(self, equation: Equation) -> None:
        """The carry is split as what comes in, what goes out of the body, and what is wanted."""
        params, ins, outs = equation.params, equation.ins, equation.outs
        num_consts, num_carry = params["num_consts"], params["num_carry"]
        first = num_consts + num_carry
        carry = [
            self._joined(value.split, self.wanted.get(out, whole(len(out.shape))), out.shape)
            for value, out in zip(ins[num_consts:first], outs, strict=False)
        ]
        stacked = [self.wanted.get(out) for out in outs[num_carry:]]
        rows = [None if split is None else split[1:] for split in stacked]
        while True:
            arguments = [Value(v.shape, v.dtype, v.split) for v in ins[:num_consts]]
            arguments += [
                Value(v.shape, v.dtype, split)
                for v, split in zip(ins[num_consts:first], carry, strict=True)
            ]
            arguments += [Value(v.shape[1:], v.dtype, v.split[1:]) for v in ins[first:]]
            self._free |= {
                argument
                for argument, value in zip(arguments, ins[:num_consts], strict=False)
                if value in self._free
            }
            body, results = flatten(params["body"][0], params["body"][1], arguments)
            body = self(body, results, [*carry, *rows])
            before = carry
            carry = [
                self._joined(split, value.split, value.shape)
                for split, value in zip(carry, results, strict=False)
            ]
            if carry == before:
                break
        for value, argument in zip(ins[:first], arguments, strict=False):
            if value in self._free:
                value.split = argument.split
        for out, split in zip(outs, carry, strict=False):
            out.split = split
        for out, row, split in zip(outs[num_carry:], results[num_carry:], rows, strict=True):
            out.split = ((), *(row.split if split is None else split))
        equation.inner = self._inner(body, arguments, results, (num_consts, num_carry))


def _rule(equation: Equation, out: Value) -> Sequence[Sequence[str]]:
    """How `out` is split if its operands are as they are; not fitted."""
    name, ins, params, ndim = equation.name, equation.ins, equation.params, len(out.shape)
    if name == "sharding_constraint":
        return as_split(params["sharding"].spec, ndim)
    if not ins:
        return whole(ndim)
    first = ins[0]
    if name == "broadcast_in_dim":
        split = list(whole(ndim))
        for axis, to in enumerate(params["broadcast_dimensions"]):
            if first.shape[axis] == out.shape[to]:
                split[to] = first.split[axis]
        return split
    if name == "transpose":
        return [first.split[axis] for axis in params["permutation"]]
    if name in REDUCTIONS or name == "squeeze":
        gone = {
            axis % len(first.shape) for axis in params["axes" if "axes" in params else "dimensions"]
        }
        return [axes for axis, axes in enumerate(first.split) if axis not in gone]
    if name == "reshape":
        return _reshaped(first, out.shape)
    if name == "gather":
        return _gathered(ins, params, ndim)
    # an axis of the result is split as the operands' axes of the same place and length
    split = [() for _ in out.shape]
    for value in ins:
        if len(value.shape) == ndim:
            same = zip(split, value.split, value.shape, out.shape, strict=True)
            split = [(*a, *b) if x == y else a for a, b, x, y in same]
    return split


def _reshaped(value: Value, shape: Sequence[int]) -> Sequence[Sequence[str]]:
    """The slowest axis of a group that is merged or cut hands its split on."""
    split: list[tuple[str, ...]] = list(whole(len(shape)))
    i = j = 0
    while i < len(value.shape) and j < len(shape):
        old, new = [i], [j]
        a, b = value.shape[i], shape[j]
        while a != b:
            if a < b:
                i += 1
                old.append(i)
                a *= value.shape[i]
            else:
                j += 1
                new.append(j)
                b *= shape[j]
        source = [axis for axis in old if value.shape[axis] > 1]
        target = [axis for axis in new if shape[axis] > 1]
        if source and target:
            split[target[0]] = value.split[source[0]]
        i, j = i + 1, j + 1
    return split


def _gathered(ins: Sequence[Value], params: dict[str, Any], ndim: int) -> Sequence[Sequence[str]]:
    """Rows of a table: split as the index, and along the row as the table."""
    table, index = ins
    numbers, used = params["dimension_numbers"], {a for axes in index.split for a in axes}
    kept = [a for a in range(len(table.shape)) if a not in numbers.collapsed_slice_dims]
    rows, columns = iter(index.split[:-1]), iter(kept)
    split = []
    for axis in range(ndim):
        if axis in numbers.offset_dims:
            column = next(columns)
            is_all = params["slice_sizes"][column] == table.shape[column]
            split.append([a for a in table.split[column] if a not in used] if is_all else [])
        else:
            split.append(next(rows, ()))
    return split
