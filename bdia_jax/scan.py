"""bdia_scan: a stack of residual blocks trained without storing its activations.

The whole method: one forward scan that keeps the last two states and the packed side
bits, and one reverse scan that rebuilds each state while it accumulates gradients.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bdia_jax import _checks
from bdia_jax._autodiff import autodiff_scan
from bdia_jax._block import Blocks, make_blocks
from bdia_jax._branches import value, value_and_vjp
from bdia_jax._chunks import BATCH, add_consts, cut, cut_consts, fold, loop, put
from bdia_jax._split import Split, per_sample, split
from bdia_jax.fixed_point import FixedPoint, dequantize, pack_bits, quantize, unpack_bits
from bdia_jax.recurrence import inverse_step, step

PyTree = Any
BlockFn = Callable[..., Any] | Sequence[Callable[..., Any]]


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
) -> Any:
    """Runs K residual blocks as a BDIA-transformer (arXiv 2407.09093) and returns x_K.

    x_{k+1} = gamma_k x_{k-1} + Q[(1 - gamma_k) x_k + (1 + gamma_k) h_k(x_k)]   (eq. 21)

    with fixed-point states, or eq. 10 in floating point if `fixed_point` is None. With
    gamma None (inference) it is x_{k+1} = Q[x_k + h_k(x_k)], the unchanged transformer.
    The backward pass of "reversible" rebuilds every state by eq. 24 from the last two
    and `fixed_point.side_bits` bits per activation and block. The rebuild is exact if the
    block, evaluated again, comes within `fixed_point.drift_bound` quanta of its first
    evaluation; `bdia_jax.audit` measures that. Rounding is straight-through: its
    derivative is one.

    Args:
        block_fn: (params_k, x, *consts) -> h, or (h, aux) with `has_aux`: everything block
            k adds to the residual stream. x is float32 [B, ..., D], h any float dtype of the
            same shape. It must be deterministic (dropout takes its key from params_k) and
            must not close over traced values; those go through params or consts.
            Or a tuple of such functions, the branches of a block: (f, g) is
            h = f(x) + g(x + f(x)). The backward pass of "reversible" then holds the residuals of
            one branch at a time, and evaluates every branch but the last once more.
        params: pytree of arrays stacked on a leading axis K. Float leaves get gradients;
            integers, booleans and PRNG keys ride along.
        x0: float32 or bfloat16 [B, ..., D].
        gamma: float [K, B] or [K, 1] from `sample_gamma`, row 0 zero, or None. No gradient
            flows into it. Under jit its values cannot be read, so a bad one (row 0 not zero,
            or not +-2^-gamma_bits when reversible) makes x_K NaN instead of raising.
        *consts: pytrees handed to every block (encoder memory, masks, conditioning); the
            gradients of their float leaves are summed over blocks.
        fixed_point: the state format, or None for no quantization.
        backprop: "reversible"; "store", plain autodiff, the reference; or "remat",
            `jax.checkpoint` around every block. The forward values are the same bits. Only
            the latter two take gamma of any magnitude, and only they can differentiate
            with gamma None.
        has_aux: whether block_fn returns (h, aux).
        batch_chunks: parts of the batch a block is evaluated in, one after the other; the
            backward pass of "reversible" needs memory for one part, and evaluates nothing more
            for it ("store" and "remat" only compute the same). The block must treat samples alike
            and have no aux. Leaves of consts with a leading axis B are cut too. A typed PRNG key
            is folded with the part's index; of keys as plain integers all parts draw alike.
        token_chunks: likewise parts of axis 1 of x [B, T, ..., D], for a block that treats
            tokens alike (an MLP); one number, or one for each branch. It sees consts whole.

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
    options = (fixed_point, backprop, has_aux, batch_chunks, token_chunks)
    call = prepare(block_fn, params, x0, gamma, consts, *options)
    if backprop == "reversible":
        try:
            result: Any = _reversible(call.static, *call.operands)
        except TypeError as error:
            if "forward-mode" not in str(error):
                raise
            raise ValueError(
                "backprop='reversible' has no forward-mode derivative (jvp, jacfwd, hessian); "
                "use backprop='store' for it"
            ) from error
    else:
        remat = backprop == "remat"
        result = autodiff_scan(call.static.blocks, fixed_point, *call.operands, remat=remat)
    x_last, aux = result
    if call.gamma_is_valid is not True:
        x_last = jnp.where(call.gamma_is_valid, x_last, jnp.float32(jnp.nan))
    return (x_last, call.static.merge_aux(*aux)) if has_aux else x_last


class Static(NamedTuple):
    """What is known at trace time: the blocks over split leaves, and the format."""

    blocks: Blocks
    fixed_point: Any  # FixedPoint; None only on the way to autodiff_scan
    merge_aux: Callable[[Any, Any], PyTree]


class Call(NamedTuple):
    static: Static
    operands: tuple
    gamma_is_valid: jax.Array | bool


def prepare(
    block_fn,
    params,
    x0,
    gamma,
    consts,
    fixed_point,
    backprop,
    has_aux,
    batch_chunks,
    token_chunks,
) -> Call:
    """Checks everything, and separates what is differentiated from what is not."""
    _checks.check_choices(fixed_point, backprop)
    params = _checks.as_arrays(params, "params")
    consts = _checks.as_arrays(consts, "consts")
    x0 = _checks.check_x0(x0)
    depth = _checks.check_depth(params)
    gamma, gamma_is_valid = _checks.check_gamma(
        gamma, depth, x0.shape[0], fixed_point if backprop == "reversible" else None
    )
    is_inference = gamma is None
    blocks, merge_aux = make_blocks(
        block_fn, params, x0, consts, has_aux, batch_chunks, token_chunks, is_inference
    )
    static = Static(blocks, fixed_point, merge_aux)
    operands = (split(params)[0], x0, gamma, split(consts)[0])
    return Call(static, operands, gamma_is_valid)


# --- "reversible": nothing is kept but the last two states and the side bits ----------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _reversible(static: Static, params: Split, x0, gamma, consts: Split):
    (_, n_last), (aux, _) = forward_scan(static, params, x0, gamma, consts)
    return dequantize(n_last, static.fixed_point), aux


def forward_scan(static: Static, params: Split, x0, gamma, consts: Split, probe=None):
    """((n_{K-1}, n_K), (aux [K, ...], packed side bits [K, ...])).

    With `probe(n_prev, pre_round)` its results, stacked, take the place of aux.
    """
    fixed_point = static.fixed_point

    def body(carry, block_inputs):
        n_prev, n = carry
        params_k, gamma_k = block_inputs
        x = dequantize(n, fixed_point)
        h, aux = value(static.blocks, params_k, x, consts)
        if gamma_k is None:
            return (n, quantize(x + h, fixed_point)), (aux, None)
        n_next, side, pre_round = step(n_prev, n, h, per_sample(gamma_k, n), fixed_point)
        if probe is not None:
            aux = probe(n_prev, pre_round)
        return (n, n_next), (aux, pack_bits(side, fixed_point.side_bits))

    n0 = quantize(x0, fixed_point)
    return jax.lax.scan(body, (n0, n0), (params, gamma))


def _reversible_fwd(static, params, x0, gamma, consts):
    if gamma is None:
        raise ValueError(
            "backprop='reversible' cannot differentiate gamma=None (inference); pass "
            "gamma=sample_gamma(...) to train, or backprop='store' or 'remat'"
        )
    (n_prev, n_last), (aux, packed) = forward_scan(static, params, x0, gamma, consts)
    residuals = (params, gamma, consts, n_prev, n_last, packed, jnp.zeros((0,), x0.dtype))
    return (dequantize(n_last, static.fixed_point), aux), residuals


def _reversible_bwd(static, residuals, cotangents):
    params, gamma, consts, n_prev, n_last, packed, x0_like = residuals
    (ct_params, ct_x0, ct_consts), _ = reverse_scan(
        static, params, gamma, consts, (n_prev, n_last), packed, cotangents
    )
    ct_params, ct_x0, ct_consts = _first_order((ct_params, ct_x0, ct_consts))
    return Split(ct_params, None), ct_x0.astype(x0_like.dtype), None, Split(ct_consts, None)


@jax.custom_jvp
def _first_order(gradients):
    """The identity, but not differentiable: integer states carry no second derivative."""
    return gradients


@_first_order.defjvp
def _first_order_jvp(primals, tangents):
    raise ValueError("backprop='reversible' has no second derivative; use backprop='store' for it")


_reversible.defvjp(_reversible_fwd, _reversible_bwd)


def reverse_scan(static, params, gamma, consts, last_states, packed, cotangents, probe=None):
    """Rebuilds x_{K-1} .. x_0 and accumulates cotangents on the way.

    With u the cotangent of x_{k+1}: x_{k-1} gets gamma_k u; x_k gets
    (1 - gamma_k) u + J_h^T (1 + gamma_k) u; params_k and consts get their vjp under
    (1 + gamma_k) u. The block is evaluated once, for the rebuild and for the vjp.

    `probe` is (look, inputs [K, ...]): `look(inputs_k, n_prev, correction, pre_round)` lets
    `audit` see every rebuild as training compiles it; its results come back stacked.
    """
    ct_x, (ct_aux, _) = cotangents
    look, all_probe_inputs = probe or (None, None)

    def body(carry, block_inputs):
        n, n_next, u_here, u, ct_consts = carry
        params_k, gamma_k, packed_k, ct_aux_k, probe_inputs = block_inputs
        operands = (params_k, consts, ct_aux_k)
        undo = _undo if static.blocks.batch_chunks == 1 else _undo_in_parts
        undone, ct_params_k, ct_consts, seen = undo(
            static, operands, (gamma_k, packed_k, n), (n_next, u_here, u), ct_consts
        )
        n_prev, u_here, u_prev = undone
        seen = look and look(probe_inputs, n_prev, *seen)
        return (n_prev, n, u_prev, u_here, ct_consts), (ct_params_k, seen)

    n_prev, n_last = last_states
    init = (n_prev, n_last, jnp.zeros_like(ct_x), ct_x, jax.tree.map(jnp.zeros_like, consts.diff))
    (_, n0, _, ct_x0, ct_consts), (ct_params, seen) = jax.lax.scan(
        body, init, (params, gamma, packed, ct_aux, all_probe_inputs), reverse=True
    )
    return (ct_params, ct_x0, ct_consts), (n0, seen)


def _undo(static, operands, known, states, ct_consts):
    """One block undone.

    Args:
        operands: (params_k, consts, ct_aux_k).
        known: (gamma_k, packed_k, n_k).
        states: (n_{k+1}, cotangent of x_k so far, that of x_{k+1}).
        ct_consts: so far.

    Returns:
        (n_{k-1}, cotangent of x_k, that of x_{k-1} so far), shaped like `states`; the cotangent
        of params_k; ct_consts; (correction, pre_round) as `inverse_step` returns them.
    """
    params_k, consts, ct_aux_k = operands
    gamma_k, packed_k, n = known
    n_next, u_here, u = states
    fixed_point = static.fixed_point
    gamma_x = per_sample(gamma_k, n)
    h, (ct_params_k, ct_x_block, ct_consts_k) = value_and_vjp(
        *(static.blocks.branches, params_k, dequantize(n, fixed_point), consts),
        *((1.0 + gamma_x) * u, ct_aux_k),
    )
    side = unpack_bits(packed_k, fixed_point.side_bits, n.shape)
    n_prev, correction, pre_round = inverse_step(n_next, n, h, gamma_x, side, fixed_point)
    u_here = u_here + (1.0 - gamma_x) * u + ct_x_block
    ct_consts = jax.tree.map(jnp.add, ct_consts, ct_consts_k)
    return (n_prev, u_here, gamma_x * u), ct_params_k, ct_consts, (correction, pre_round)


def _undo_in_parts(static, operands, known, states, ct_consts):
    """`_undo`, one part of the batch after the other, each overwriting its part of `states`."""
    params_k, consts, ct_aux_k = operands
    gamma_k, packed_k, n = known
    count, batch = static.blocks.batch_chunks, len(n)
    known = (jnp.broadcast_to(gamma_k, batch), packed_k, n)

    def body(index, carry):
        states, ct_params_k, ct_consts, seen = carry
        known_i, states_i = jax.tree.map(lambda a: cut(a, index, count, BATCH), (known, states))
        consts_i = cut_consts(consts, index, count, batch)
        operands_i = (fold(params_k, index), consts_i, ct_aux_k)
        zeros = jax.tree.map(jnp.zeros_like, consts_i.diff)
        states_i, ct_params_i, ct_consts_i, seen_i = _undo(
            static, operands_i, known_i, states_i, zeros
        )
        states, seen = jax.tree.map(
            lambda whole, part: put(whole, part, index, BATCH), (states, seen), (states_i, seen_i)
        )
        ct_params_k = jax.tree.map(jnp.add, ct_params_k, ct_params_i)
        ct_consts = add_consts(ct_consts, ct_consts_i, index, count, batch)
        return states, ct_params_k, ct_consts, seen

    ct_params_k = jax.tree.map(jnp.zeros_like, params_k.diff)
    seen = (jnp.zeros_like(n), jnp.zeros(n.shape, jnp.float32))  # dropped unless probed
    return loop(count, body, (states, ct_params_k, ct_consts, seen))
