"""bdia_scan: a stack of residual blocks trained without storing its activations.

The whole method: one forward scan that keeps the last two states and the packed side
bits, and one reverse scan that rebuilds each state while it accumulates gradients. (It is
over 300 lines because the two are read together.)
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bdia_jax._autodiff import autodiff_scan, updating_scan
from bdia_jax._block import Leaves
from bdia_jax._call import (
    Arrays,
    BlockFn,
    Frozen,
    Operands,
    PyTree,
    Static,
    bind_static,
    check,
    compiled_once,
    separate,
)
from bdia_jax._loop import scan_blocks
from bdia_jax._mesh import zeros_like
from bdia_jax._parts import (
    Cotangents,
    branches_value,
    narrowed,
    no_aux,
    over_batch_chunks,
    value,
    value_and_vjp,
)
from bdia_jax._updating import Slots, Update, make_update, take_held
from bdia_jax._verify import checksum, nan_by, nan_unless, per_part, zero_or_nan
from bdia_jax.fixed_point import FixedPoint, dequantize, pack_bits, quantize, unpack_bits
from bdia_jax.recurrence import Rounding, inverse_step, per_element, plain_step, step


def bdia_scan(
    block_fn: BlockFn,
    params: PyTree,
    x0: jax.Array,
    gamma: jax.Array | None,
    *consts: PyTree,
    fixed_point: FixedPoint | None = FixedPoint(),
    backprop: str = "reversible",
    has_aux: bool = False,
    batch_chunks: int = 1,
    token_chunks: int | tuple[int, ...] = 1,
    per_sample: PyTree = None,
    verify: bool | int = True,
    failures: jax.Array | None = None,
) -> Any:
    """Runs K residual blocks as a BDIA-transformer (arXiv 2407.09093) and returns x_K.

    x_{k+1} = gamma_k x_{k-1} + Q[(1 - gamma_k) x_k + (1 + gamma_k) h_k(x_k)]   (eq. 21)

    with fixed-point states, or eq. 10 in floating point if `fixed_point` is None. With gamma None
    (inference) it is x_{k+1} = Q[x_k + h_k(x_k)], the unchanged transformer. The backward pass of
    "reversible" rebuilds every state by eq. 24 from the last two and `fixed_point.side_bits` bits
    per activation and block. That is exact if the value before rounding, with the block evaluated
    again, comes within `fixed_point.drift_bound` quanta; `bdia_jax.audit` measures it.
    Rounding is straight-through: its derivative is one.

    Args:
        block_fn: (params_k, x, *consts) -> h, or (h, aux) with `has_aux`: everything block
            k adds to the residual stream. x is float32 [B, ..., D], h any float dtype of the
            same shape. It must be deterministic (dropout takes its key from params_k) and
            must not close over traced values; those go through params or consts. As for
            `jax.jit`, a function that is called again is not traced again.
            Or a tuple of such functions, the branches of a block: (f, g) is
            h = f(x) + g(x + f(x)). The backward pass of "reversible" then holds the residuals of
            one branch at a time, and evaluates every branch but the last once more.
        params: pytree of arrays stacked on a leading axis K. Float leaves get gradients;
            integers, booleans and PRNG keys ride along.
        x0: float32 or bfloat16 [B, ..., D].
        gamma: float [K, B] or [K, 1] from `sample_gamma`, row 0 zero, or None. No gradient
            flows into it. Under jit its values cannot be read, so a bad one (row 0 not zero,
            or not +-2^-p, p up to gamma_bits, when reversible) makes x_K and every gradient NaN
            instead of raising.
        *consts: pytrees handed to every block (encoder memory, masks, conditioning); the
            gradients of their float leaves are summed over blocks. A Python bool or str stays
            one, for the block to decide by: every value compiles a program.
        fixed_point: the state format, or None for no quantization.
        backprop: "reversible"; "store", plain autodiff, the reference; or "remat",
            `jax.checkpoint` around every block. The forward values are the same bits. Only
            the latter two take gamma of any magnitude, and only they can differentiate
            with gamma None, or forward (`jax.jvp`).
        has_aux: whether block_fn returns (h, aux).
        batch_chunks: chunks of the batch a block is evaluated on, one after the other; the
            backward pass of "reversible" needs memory for one chunk, and evaluates nothing more
            for it ("store" and "remat" only compute the same). The block must treat samples alike
            and have no aux. A typed PRNG key is folded with the chunk's index; of keys as plain
            integers all chunks draw alike.
        token_chunks: likewise chunks of axis 1 of x [B, T, ..., D], for a block that treats
            tokens alike (an MLP); one number, or one for each branch. It sees consts whole.
        per_sample: which of consts every sample has its own of, so that batch_chunks cuts them
            along: a bool, or a pytree of bools that is a prefix of consts, as in
            `jax.vmap(in_axes=)`. True asks for a leading axis of B, or of 1 for all samples. None:
            none of them, and an error where a leading axis of B leaves that open.
        verify: whether the backward pass of "reversible" proves each rebuilt state by a checksum,
            4 bytes for every sample and block. Where one is wrong, the gradients that come from
            it are NaN: of params of this block and those below, of consts, and of the sample's x0.
            A number n verifies n parts of axis 1 each: for a mesh that splits it over n devices.
        failures: `jnp.zeros(K)`, to learn where that happened: its gradient is, for each block k,
            the number of samples (or parts) whose rebuilt x_k was wrong or came after a wrong one.

    Returns:
        x_K, float32 [B, ..., D]; with `has_aux` also aux, stacked [K, ...], differentiable; a
        tuple of them, one for each branch, if block_fn is a tuple.
        A state that is not finite or leaves +-2^(31 - frac_bits) makes x_K NaN there.

    Raises:
        ValueError: at trace time, with the offending value and the remedy.

    Example:
        >>> import bdia_jax as bdia
        >>> w = 0.1 * jax.random.normal(jax.random.key(0), (12, 16, 16))
        >>> x0 = jax.random.normal(jax.random.key(1), (4, 16))
        >>> gamma = bdia.sample_gamma(jax.random.key(2), depth=12, batch_size=4)
        >>> loss = lambda w: jnp.sum(bdia.bdia_scan(lambda w, x: jnp.tanh(x @ w), w, x0, gamma))
        >>> jax.grad(loss)(w).shape
        (12, 16, 16)
    """
    options = {"fixed_point": fixed_point, "backprop": backprop}
    params, group, numbers = take_held(params)
    block_fn, consts = bind_static(block_fn, consts)
    arrays, parts = check(params, x0, gamma, consts, verify=verify, failures=failures, **options)
    options |= {
        "block_fn": tuple(block_fn) if isinstance(block_fn, list) else block_fn,
        "verify": parts,
        "has_aux": has_aux,
        "batch_chunks": batch_chunks,
        "token_chunks": token_chunks,
        "per_sample": Frozen.of(per_sample),
    }
    if group:
        if backprop == "store":
            raise ValueError(
                f"parameters of {group.name!r} are updated in the backward pass, but that of "
                "backprop='store' is autodiff's; take backprop='reversible' or 'remat'"
            )
        update = make_update(group, numbers, arrays.params)
        run = functools.partial(_run, **options, update=update, slots=group.slots)
    else:
        run = compiled_once(_run, **options)
    try:
        return run(arrays=arrays)
    except TypeError as error:
        if "forward-mode" not in str(error):
            raise
        raise ValueError(
            "backprop='reversible' has no forward-mode derivative (jvp, jacfwd, hessian); "
            "use backprop='store' for it"
        ) from error


def _run(
    block_fn: BlockFn,
    arrays: Arrays,
    *,
    backprop: str,
    per_sample: Frozen,
    update: Update | None = None,
    slots: Slots | None = None,
    **options: Any,
) -> Any:
    """What `bdia_scan` returns, of checked arrays."""
    static, operands = separate(block_fn, arrays, per_sample=per_sample.thawed(), **options)
    static, operands = static._replace(update=update), operands._replace(slots=slots)
    if backprop == "reversible":
        result: Any = _reversible(static, operands)
    elif update:
        result = updating_scan(static.block, static.fixed_point, update, *operands[:4], slots)
    else:
        remat = backprop == "remat"
        result = autodiff_scan(static.block, static.fixed_point, *operands[:4], remat=remat)
    x_last, aux = result
    return (x_last, static.merge_aux(*aux)) if options["has_aux"] else x_last


# --- forward: nothing is kept but the last two states and the side bits ---------------


class Kept(NamedTuple):
    """What the forward pass hands the backward pass of K blocks, beside params and consts.

    n_prev, n_last: int32 [B, ..., D], n_{K-1} and n_K. packed: uint8 [K, B, ...] side bits or None.
    sums: uint32 [K, B, parts], checksums of n_{k-1}, or None.
    """

    n_prev: jax.Array
    n_last: jax.Array
    packed: Any
    sums: Any


def forward_scan(
    static: Static, operands: Operands, probe: Callable[..., Any] | None = None
) -> tuple[Kept, Any]:
    """(what is kept, aux [K, ...]).

    With `probe(n_prev, h, rounding)` its results, stacked, take the place of aux.
    """
    block, fixed_point, parts = static.block, static.fixed_point, static.verify

    def body(carry, inputs):
        n_prev, n = carry
        params_k, gamma_k = inputs
        if gamma_k is None:
            x = dequantize(n, fixed_point)
            h, aux = value(block, narrowed(block, params_k), x, operands.consts)
            return (n, plain_step(n, h, fixed_point)), (aux, None, None)
        # while n_prev is whole; its low bits are what `step` calls side
        packed = pack_bits(n_prev, fixed_point.side_bits)
        sums = checksum(n_prev, fixed_point.side_bits, parts) if parts else None
        like = jnp.zeros_like(n, jnp.float32)
        (n_next, aux, seen), *_ = over_batch_chunks(
            block,
            functools.partial(_do, static, probe is not None),
            params_k,
            operands.consts,
            known=(per_element(gamma_k, n), n),
            states=(n_prev, no_aux(block), (like, Rounding(n, like)) if probe else None),
        )
        return (n, n_next), (probe(n_prev, *seen) if probe else aux, packed, sums)

    n0 = quantize(operands.x0, fixed_point)
    last, (aux, *kept) = scan_blocks(body, (n0, n0), (operands.params, operands.gamma))
    return Kept(*last, *kept), aux


def _do(static: Static, is_probed: bool, params_k: Leaves, consts: Leaves, known, states):
    """Block k: (n_{k+1}, aux, what a probe sees) in the place of (n_{k-1}, .., ..)."""
    (gamma, n), (n_prev, *_) = known, states
    x = dequantize(n, static.fixed_point)
    h, aux = branches_value(static.block.branches, params_k, x, consts)
    n_next, _, rounding = step(n_prev, n, h, gamma, static.fixed_point)
    return (n_next, aux, (h, rounding) if is_probed else None), None, None


# --- backward: every state is rebuilt on the way down ---------------------------------


class Known(NamedTuple):
    """What the reverse scan knows when it comes to block k.

    gamma, gamma_above: gamma_k and gamma_{k+1}, [B or 1, 1, ..]. packed: block k's side bits.
    n: n_k. ct: the cotangent of x_{k+1}. sums: uint32 [B, parts], the checksums that n_k has to
    have; None if that is not asked.
    """

    gamma: jax.Array
    gamma_above: jax.Array
    packed: jax.Array
    n: jax.Array
    ct: jax.Array
    sums: Any


class Around(NamedTuple):
    """What is overwritten in place as block k is undone.

    n: n_{k+1}, then n_{k-1}. ct: the cotangent of x_{k+2}, then of x_k. sound: bool [B, parts],
    whether all states above n_k were the forward's, then with n_k; None if that is not asked. seen:
    anything, then what a probe sees; None without one.
    """

    n: jax.Array
    ct: jax.Array
    sound: Any
    seen: Any


class Seen(NamedTuple):
    """For `audit`: by how much the guard moved a rounding, and what was rounded."""

    correction: jax.Array
    rounding: Rounding


def reverse_scan(
    static: Static,
    operands: Operands,
    kept: Kept,
    ct_x_last: jax.Array,
    ct_aux: Any,
    probe: tuple[Callable[..., Any], PyTree] | None = None,
) -> tuple[Cotangents, Any, jax.Array, Any]:
    """Rebuilds x_{K-1} .. x_0 and accumulates cotangents on the way.

    `probe` is (look, inputs [K, ...]): `look(inputs_k, n_prev, seen)` lets `audit` see every
    rebuild as training compiles it.

    Returns:
        (cotangents of params, x0 and consts, those of failures and slots, the rebuilt n_0, what
        look returned, stacked).
    """
    look, probe_inputs = probe or (None, None)
    parts, side_bits = static.verify, static.fixed_point.side_bits
    update, slots = static.update, operands.slots
    counts = operands.failures is not None or (update is not None and bool(parts))

    def body(carry, inputs):
        n, ct, gamma_above, around, ct_consts, sums, verdict, updated = carry
        params_k, gamma_k, packed_k, sums_k, ct_aux_k, probe_inputs_k, k = inputs
        gamma_k = per_element(gamma_k, n)
        if update:
            params_k = update.read(updated, params_k, k)
        around, ct_params_k, ct_consts = over_batch_chunks(
            static.block,
            functools.partial(_undo, static, ct_aux_k),
            params_k,
            operands.consts,
            known=Known(gamma_k, gamma_above, packed_k, n, ct, sums),
            states=around._replace(seen=Seen(n, Rounding(n, ct)) if look else None),
            ct_consts=ct_consts,
            start=verdict,
        )
        looked = look and look(probe_inputs_k, around.n, around.seen)
        if parts:
            verdict = zero_or_nan(around.sound)
            ct_params_k = nan_by(verdict, ct_params_k)
        failed, squares = ~around.sound if counts else None, None
        if update:
            found = update.block(updated, params_k, ct_params_k, k, slots)
            updated, ct_params_k, squares = found
        below = Around(n, ct, around.sound, None)
        carry = (around.n, around.ct, gamma_k, below, ct_consts, sums_k, verdict, updated)
        return carry, (ct_params_k, failed, squares, looked)

    sums, sound, verdict = None, None, None
    if parts:
        sums = checksum(kept.n_prev, side_bits, parts)
        sound = sums == sums  # true, and of their type inside `jax.shard_map`
        verdict = zero_or_nan(sound)
    init = (
        kept.n_prev,
        ct_x_last,
        jnp.zeros_like(per_element(operands.gamma[0], kept.n_last)),
        Around(kept.n_last, jnp.zeros_like(ct_x_last), sound, None),
        jax.tree.map(zeros_like, operands.consts.diff),
        sums,
        verdict,
        update and update.carry(operands.params, slots),
    )
    params, numbers = update.inputs(operands.params, slots) if update else (operands.params, None)
    inputs = (params, operands.gamma, kept.packed, kept.sums, ct_aux, probe_inputs, numbers)
    last, (ct_params, failed, squares, looked) = scan_blocks(body, init, inputs, reverse=True)
    _, ct_x0, _, above, ct_consts, _, verdict, updated = last  # undoing block 0 gives no state
    if verdict is not None:
        ct_consts = nan_by(verdict, ct_consts)
    failed = failed if failed is None else jnp.sum(failed, (1, 2), jnp.float32)
    ct_slots = None
    if update:
        ct_params, ct_slots = update.cotangents(updated, ct_params, squares, failed, slots)
    return Cotangents(ct_params, ct_x0, ct_consts), (failed, ct_slots), above.n, looked


def _undo(static: Static, ct_aux_k, params_k: Leaves, consts: Leaves, known: Known, around: Around):
    """Block k undone: (around x_k, cotangents of params_k and of consts).

    With u_k the cotangent of x_k: it gets gamma_{k+1} u_{k+2} as x_{k-1} of the block above,
    (1 - gamma_k) u_{k+1} + J_h^T (1 + gamma_k) u_{k+1} from this one; params_k and consts get their
    vjp under (1 + gamma_k) u_{k+1}. The block is evaluated once, for the rebuild and for the vjp.
    """
    n, gamma, u = known.n, known.gamma, known.ct

    def rebuild(h):
        side = unpack_bits(known.packed, static.fixed_point.side_bits, n.shape)
        n_prev, correction, rounding = inverse_step(around.n, n, h, gamma, side, static.fixed_point)
        return n_prev, Seen(correction, rounding) if around.seen else None

    (n_prev, seen), ct = value_and_vjp(
        static.block.branches,
        params=params_k,
        x=dequantize(n, static.fixed_point),
        consts=consts,
        scale=1.0 + gamma,
        ct=u,
        ct_aux=ct_aux_k,
        use=rebuild,
    )
    ct_x, sound = known.gamma_above * around.ct + (1.0 - gamma) * u + ct.x, None
    if static.verify:
        sums = checksum(n, static.fixed_point.side_bits, static.verify)
        sound = around.sound & (sums == known.sums)
        ct_x = nan_unless(per_part(sound, ct_x), ct_x)
    return Around(n_prev, ct_x, sound, seen), ct.params, ct.consts


# --- the two as one function with a derivative ----------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _reversible(static: Static, operands: Operands) -> tuple[jax.Array, Leaves]:
    """(x_K, aux)."""
    kept, aux = forward_scan(static, operands)
    return dequantize(kept.n_last, static.fixed_point), aux


def _reversible_fwd(static: Static, operands: Operands):
    if operands.gamma is None:
        raise ValueError(
            "backprop='reversible' cannot differentiate gamma=None (inference); pass "
            "gamma=sample_gamma(...) to train, or backprop='store' or 'remat'"
        )
    kept, aux = forward_scan(static, operands)
    x0_dtype = jnp.zeros((0,), operands.x0.dtype)  # all of x0 that is needed
    residuals = (operands._replace(x0=x0_dtype), kept)
    return (dequantize(kept.n_last, static.fixed_point), aux), residuals


def _reversible_bwd(static: Static, residuals, cotangents):
    (operands, kept), (ct_x_last, ct_aux) = residuals, cotangents
    gradients, noted, *_ = reverse_scan(static, operands, kept, ct_x_last, ct_aux.diff)
    (ct_params, ct_x0, ct_consts), (failed, ct_slots) = _first_order((gradients, noted))
    ct_x0 = ct_x0.astype(operands.x0.dtype)
    failed = failed if operands.failures is not None else None
    cotangents = Leaves(ct_params, None), ct_x0, None, Leaves(ct_consts, None), failed, ct_slots
    return (Operands(*cotangents),)


@jax.custom_jvp
def _first_order(gradients):
    """The identity, but not differentiable: integer states carry no second derivative."""
    return gradients


@_first_order.defjvp
def _first_order_jvp(primals, tangents):
    raise ValueError("backprop='reversible' has no second derivative; use backprop='store' for it")


_reversible.defvjp(_reversible_fwd, _reversible_bwd)
