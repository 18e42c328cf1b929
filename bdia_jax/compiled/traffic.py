"""The work of a compiled program: bytes it moves, products it takes, and a bound of its time.

`work(read(compiled.as_text()))` lists its kernels. Bytes are counted as if nothing stayed in a
cache: a kernel reads its operands and writes its results once; of an operand it only slices, the
slices; of a result it updates in place, the update. Products are those of matrices and of
attention, twice each; convolutions are not counted.
"""

import math
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from bdia_jax.compiled.hlo import Instruction, Program
from bdia_jax.compiled.targets import Target

# what has no memory of its own, or the kernels of which are counted by themselves
_FREE = {"parameter", "get-tuple-element", "tuple", "bitcast", "constant", "after-all"}
_FREE |= {"opt-barrier", "partition-id", "replica-id", "add-dependency"}
_SLICES = {"dynamic-slice", "slice", "gather"}
_SAME = {"bitcast", "reshape"}  # of the same memory
_CAST = _SAME | {"convert", "copy"}


class Work(NamedTuple):
    """A kernel.

    name, opcode: of its instruction.
    loop: how deep in loops it stands.
    times: how often it runs. In a loop of unknown length once, as in a training program, whose
        steps are such a loop; each branch of a conditional as if it were taken.
    read, written: bytes of one time.
    flops: of its products, one time; dtype: of their operands, "" without products.
    source: the operation of the JAX program it was made for.
    """

    name: str
    opcode: str
    loop: int
    times: int
    read: int
    written: int
    flops: int
    dtype: str
    source: str

    def seconds(self, target: Target) -> float:
        """The least all its times take on a GPU: by bandwidth or by products, whichever is more."""
        least = (self.read + self.written) / target.bandwidth
        if self.flops:
            least = max(least, self.flops / target.flops[self.dtype])
        return self.times * least


class Total(NamedTuple):
    """Of a program: kernels that run, bytes they move, FLOPs, and the bound of time in seconds.

    The bound is roofline's: what the GPU cannot be faster than. It is no forecast.
    """

    kernels: int
    bytes: int
    flops: int
    seconds: float


def total(kernels: Iterable[Work], target: Target) -> Total:
    """All of them together."""
    found = list(kernels)
    return Total(
        kernels=sum(each.times for each in found),
        bytes=sum(each.times * (each.read + each.written) for each in found),
        flops=sum(each.times * each.flops for each in found),
        seconds=sum(each.seconds(target) for each in found),
    )


def work(program: Program) -> list[Work]:
    """Every kernel of a program that moves bytes."""
    return list(_walk(program, program.entry, 1, 0))


def _walk(program: Program, name: str, times: int, loop: int) -> Iterator[Work]:
    named = {one.name: one for one in program.computations[name]}
    for one in named.values():
        if one.opcode == "while":
            trips = program.trips(one)
            inner = times * (1 if trips is None else trips)
            yield from _walk(program, dict(one.called)["body"], inner, loop + 1)
        elif one.opcode in ("call", "conditional"):
            for _, inner in one.called:
                yield from _walk(program, inner, times, loop)
        else:
            read, written = _bytes(program, one, named)
            if read or written:
                flops, dtype = _flops(program, one, named)
                about = (one.name, one.opcode, loop, times, read, written)
                yield Work(*about, flops, dtype, one.source)


# --- bytes -------------------------------------------------------------------------------


def _size(one: Instruction) -> int:
    return sum(array.bytes for array in one.arrays)


def _bytes(program: Program, one: Instruction, named: dict[str, Instruction]) -> tuple[int, int]:
    """(read, written) by one instruction."""
    op = one.opcode
    if op in _FREE or (op.endswith(("-done", "-update")) and op != "dynamic-update-slice"):
        return 0, 0
    operands = [named[name] for name in one.operands if name in named]
    if op == "fusion":
        return _fused_bytes(program.computations[one.called[0][1]])
    if op in _SLICES:
        return _size(one), _size(one)
    if op == "dynamic-update-slice":
        return _size(operands[1]), _size(operands[1])
    if op.endswith("-start"):
        if one.called:
            inner = {each.name: each for each in program.computations[one.called[0][1]]}
            moved = [_bytes(program, each, inner) for each in inner.values()]
            return sum(read for read, _ in moved), sum(written for _, written in moved)
        read = sum(map(_size, operands))
        return read, read
    arrays = one.arrays
    if op == "custom-call" and len(arrays) > 1:  # bytes beside the results are work space
        arrays = tuple(array for array in arrays if array.dtype not in ("s8", "u8"))
    return sum(map(_size, operands)), sum(array.bytes for array in arrays)


def _fused_bytes(fused: list[Instruction]) -> tuple[int, int]:
    """(read, written) by a fusion of these instructions, the last of which is its result."""
    named = {one.name: one for one in fused}
    users: dict[str, list[Instruction]] = {}
    for one in fused:
        for operand in one.operands:
            users.setdefault(operand, []).append(one)
    (root,) = (one for one in fused if one.is_root)
    results = [named[name] for name in root.operands] if root.opcode == "tuple" else [root]
    written, in_place = 0, set()
    for result in results:
        base = result
        while base.opcode in _CAST and base.operands:
            base = named[base.operands[0]]
        if base.opcode == "dynamic-update-slice":
            written += _size(named[base.operands[1]])
            target = named[base.operands[0]]
            while target.opcode in _CAST:
                target = named[target.operands[0]]
            in_place.add(target.name)
        else:
            written += _size(result)
    read = 0
    for one in fused:
        if one.opcode == "parameter" and one.name in users:
            read += _read_of(one, users, is_in_place=one.name in in_place)
    return read, written


def _read_of(one: Instruction, users: dict[str, list[Instruction]], *, is_in_place: bool) -> int:
    """Bytes a fusion reads of its parameter."""
    uses = list(_uses(one.name, users))
    slices = [user for user, name in uses if user.opcode in _SLICES and user.operands[0] == name]
    updates = [
        user
        for user, name in uses
        if user.opcode == "dynamic-update-slice" and user.operands[0] == name
    ]
    if len(slices) + len(updates) == len(uses):
        return 0 if is_in_place and not slices else sum(map(_size, slices))
    return _size(one)


def _uses(name: str, users: dict[str, list[Instruction]]) -> Iterator[tuple[Instruction, str]]:
    """(user, the name it uses) of a value, also under another shape."""
    for user in users.get(name, ()):
        if user.opcode in _SAME:
            yield from _uses(user.name, users)
        else:
            yield user, name


# --- products ----------------------------------------------------------------------------


def _flops(program: Program, one: Instruction, named: dict[str, Instruction]) -> tuple[int, str]:
    """(FLOPs, dtype of the operands) of the products of one instruction."""
    if one.opcode == "fusion" or (one.opcode.endswith("-start") and one.called):
        inner = {each.name: each for each in program.computations[one.called[0][1]]}
        found = [_flops(program, each, inner) for each in inner.values()]
        return sum(flops for flops, _ in found), next((d for _, d in found if d), "")
    if one.opcode == "dot":
        contracted = _numbers(r"lhs_contracting_dims=\{([\d,]*)\}", one.rest)
        return _product(named[one.operands[0]], contracted, one)
    if one.opcode != "custom-call":
        return 0, ""
    target = re.search(r'custom_call_target="([^"]*)"', one.rest)
    target = target[1] if target else ""
    if "cublas" in target:
        contracted = _numbers(r'"lhs_contracting_dimensions":\[([^\]]*)\]', one.rest)
        return _product(named[one.operands[0]], contracted, one)
    if "fmha" in target:  # q k^T and the product with v; five such products for gradients
        q, k = (named[name].arrays[0] for name in one.operands[:2])
        batch, tokens, heads, width = q.shape
        products = 5 if "Backward" in target else 2
        return products * 2 * batch * heads * tokens * k.shape[1] * width, q.dtype
    return 0, ""


def _product(left: Instruction, contracted: list[int], one: Instruction) -> tuple[int, str]:
    array = left.arrays[0]
    depth = math.prod(array.shape[axis] for axis in contracted)
    return 2 * math.prod(one.arrays[0].shape) * depth, array.dtype


def _numbers(pattern: str, text: str) -> list[int]:
    found = re.search(pattern, text)
    return [int(each) for each in re.findall(r"\d+", found[1])] if found else []
