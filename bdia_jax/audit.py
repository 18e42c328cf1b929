"""audit: is the rebuild exact for this block, on this device, as compiled here?"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from bdia_jax._call import BlockFn, Operands, Static, prepare
from bdia_jax.fixed_point import INVALID, FixedPoint, quantize
from bdia_jax.recurrence import Rounding
from bdia_jax.scan import Seen, forward_scan, reverse_scan

# A drift seen once may be larger on other data: suggest room for twice as much.
_SAFETY = 2.0


@dataclasses.dataclass(frozen=True)
class Audit:
    """What `audit` found. Entry i of an array is the undoing of block i + 1, which rebuilds x_i.

    Attributes:
        fixed_point: the format that was audited.
        elements: elements of one state.
        mismatches: int [K-1], rebuilt elements whose bits differ from the forward's.
        errors: float [K-1], the largest |rebuilt - forward| of those elements, in quanta.
        corrections: int [K-1], roundings that came out different and the guard set right.
        drift: float [K-1], the largest difference between the forward's and the rebuild's
            value before rounding, in quanta (2^-frac_bits). After a mismatch in a later
            block it measures the damage rather than the block.
        x0_mismatches: elements of x_0 that came out wrong when the same backward pass was
            compiled without any of the above being looked at.
        invalid: elements of the states x_0 .. x_{K-2} that are NaN or left the int32 range.
        largest: the largest |x| of those states that is a number; `fixed_point.limit` is
            what they cannot reach.
        max_drift: largest drift of a sound rebuild: `drift.max()`, measured again with
            as many guard bits as fit if the audited format was not exact; infinite if even that
            rebuild failed.
        h_spacing: quanta between h and the next number of its dtype, where |h| is largest: what
            one rounding of h that comes out different moves it by.
        suggested_guard_bits: fewest guard bits with room for twice `max_drift`, and for one such
            rounding if anything drifted; 0 if nothing did, None if no number fits in 8 bits.
    """

    fixed_point: FixedPoint
    elements: int
    mismatches: np.ndarray
    errors: np.ndarray
    corrections: np.ndarray
    drift: np.ndarray
    x0_mismatches: int
    invalid: int
    max_drift: float
    h_spacing: float
    suggested_guard_bits: int | None
    largest: float = 0.0

    @property
    def exact(self) -> bool:
        """Whether every rebuilt bit was right and every state a number."""
        return not (self.mismatches.any() or self.x0_mismatches or self.invalid)

    @property
    def margin(self) -> np.ndarray:
        """float [K-1]: quanta of drift the guard could still have absorbed; negative means luck."""
        return self.fixed_point.drift_bound - self.drift

    def __str__(self) -> str:
        states = len(self.mismatches)
        wrong = int(self.mismatches.sum())
        suggestion = f"{self.suggested_guard_bits}"
        if self.suggested_guard_bits is None:
            remedy = "" if self.invalid else ": return h in float32, or lower frac_bits"
            suggestion = f"none fits{remedy}"
        return (
            f"{'exact' if self.exact else 'NOT EXACT'} with {self.fixed_point}: "
            f"{wrong} of {states * self.elements} rebuilt elements differ over {states} states "
            f"({self.x0_mismatches} in x_0 end to end, {self.invalid} invalid); "
            f"guard corrected {int(self.corrections.sum())} roundings; "
            f"largest drift {self.max_drift:.3g} quanta, "
            f"bound {self.fixed_point.drift_bound:g}; suggested guard_bits {suggestion}"
            f"{self.fixed_point.narrow(np.inf if self.invalid else self.largest)}"
        )


def audit(
    block_fn: BlockFn,
    params: Any,
    x0: jax.Array,
    gamma: jax.Array | None,
    *consts: Any,
    fixed_point: FixedPoint = FixedPoint(),
    has_aux: bool = False,
    batch_chunks: int = 1,
    token_chunks: int | tuple[int, ...] = 1,
    per_sample: Any = None,
) -> Audit:
    """Runs forward and backward as training compiles them, and compares every rebuilt bit.

    Exactness needs the value before rounding, with the block evaluated again in the backward pass,
    to land within `fixed_point.drift_bound` quanta of the forward's (see `inverse_step`). Whether
    it does depends on the device, the compiler and the block's dtypes, so it is measured.
    All K states are kept for the comparison: take a batch for which they fit.

    Args:
        block_fn, params, x0, gamma, consts, fixed_point, has_aux, batch_chunks, token_chunks,
            per_sample: as in `bdia_scan`. gamma must be given: without it nothing is rebuilt.

    Returns:
        An `Audit`; print it, or test `audit(...).exact`.

    Raises:
        ValueError: as `bdia_scan`, if gamma is None, or if called under a transformation.

    Example:
        >>> import bdia_jax as bdia
        >>> w = 0.1 * jax.random.normal(jax.random.key(0), (12, 16, 16))
        >>> x0 = jax.random.normal(jax.random.key(1), (4, 16))
        >>> gamma = bdia.sample_gamma(jax.random.key(2), depth=12, batch_size=4)
        >>> bdia.audit(lambda w, x: jnp.tanh(x @ w), w, x0, gamma).exact
        True
    """
    if gamma is None:
        raise ValueError("gamma is None, so nothing is rebuilt; pass gamma=sample_gamma(...)")
    static, operands = prepare(
        block_fn,
        params,
        x0,
        gamma,
        consts,
        fixed_point=fixed_point,
        backprop="reversible",
        has_aux=has_aux,
        batch_chunks=batch_chunks,
        token_chunks=token_chunks,
        per_sample=per_sample,
    )
    if not operands.x0.size:
        raise ValueError(f"x0 has shape {operands.x0.shape}, so there is nothing to audit")
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(operands)):
        raise ValueError("audit returns numbers and compiles for itself; call it outside jit")

    unprobed = jax.jit(lambda operands: forward_and_back(static, operands, probe=False))
    x0_mismatches, *_ = unprobed(operands)
    seen = _run_probed(static, operands)
    exact = not (seen["mismatches"].any() or int(x0_mismatches))
    sound = seen
    if not exact:
        widest = dataclasses.replace(fixed_point, guard_bits=8 - fixed_point.gamma_bits)
        sound = _run_probed(static._replace(fixed_point=widest), operands)
    failed = sound["mismatches"].any()
    max_drift = float("inf") if failed else float(sound["drift"].max(initial=0.0))
    h_spacing = _h_spacing(static, float(seen["largest_h"].max(initial=0.0)))
    return Audit(
        fixed_point=fixed_point,
        elements=operands.x0.size,
        mismatches=seen["mismatches"],
        errors=seen["errors"],
        corrections=seen["corrections"],
        drift=seen["drift"],
        x0_mismatches=int(x0_mismatches),
        invalid=int(seen["invalid"].sum()),
        max_drift=max_drift,
        h_spacing=h_spacing,
        suggested_guard_bits=_suggest(max_drift, h_spacing, fixed_point),
        largest=float(seen["largest"].max(initial=0.0)) * 2.0**-fixed_point.frac_bits,
    )


def _h_spacing(static: Static, largest: float) -> float:
    epsilon = max(branch.epsilon for branch in static.block.branches)
    magnitude = 2.0 ** math.floor(math.log2(largest)) if 0 < largest < math.inf else 0.0
    return magnitude * epsilon * 2.0**static.fixed_point.frac_bits


def _suggest(max_drift: float, h_spacing: float, fixed_point: FixedPoint) -> int | None:
    if max_drift == 0:
        return 0
    one_rounding = (1 + 2.0**-fixed_point.gamma_bits) * h_spacing
    for guard_bits in range(1, 9 - fixed_point.gamma_bits):
        candidate = dataclasses.replace(fixed_point, guard_bits=guard_bits)
        if candidate.drift_bound >= max(_SAFETY * max_drift, one_rounding):
            return guard_bits
    return None


def _run_probed(static: Static, operands: Operands) -> dict[str, np.ndarray]:
    probed = jax.jit(lambda operands: forward_and_back(static, operands, probe=True))
    _, looked, _ = probed(operands)
    return {name: np.asarray(values)[1:] for name, values in looked.items()}  # block 0 undoes none


def forward_and_back(static: Static, operands: Operands, probe: bool):
    """Forward and backward pass of the loss |x_K|^2 / 2 + sum of aux, as training runs them.

    Returns (wrong elements of x_0, what `compare` saw of each block, gradients). The last are
    returned so that nothing training computes is optimized away.
    """
    fixed_point = static.fixed_point

    def keep_state(n_prev, h, rounding: Rounding):
        return n_prev, jnp.max(jnp.abs(h)), rounding

    kept, states = forward_scan(static, operands, keep_state if probe else None)
    aux_like = jax.eval_shape(lambda: forward_scan(static, operands)[1])
    ct_aux = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), aux_like.diff)
    ct_x = kept.n_last.astype(jnp.float32) * 2.0**-fixed_point.frac_bits

    def compare(states_k, rebuilt, seen: Seen):
        n, largest_h, rounding = states_k
        moved = seen.rounding.q - rounding.q
        drift = jnp.abs(moved.astype(jnp.float32) + (seen.rounding.rest - rounding.rest))
        return {
            "mismatches": jnp.sum(rebuilt != n),
            "errors": jnp.max(jnp.abs(rebuilt.astype(jnp.float32) - n.astype(jnp.float32))),
            "corrections": jnp.sum(seen.correction != 0),
            "drift": jnp.max(jnp.where(jnp.isnan(drift), 0.0, drift)),
            "largest_h": largest_h,
            "invalid": jnp.sum(n == INVALID),
            "largest": jnp.max(jnp.where(n == INVALID, 0.0, jnp.abs(n.astype(jnp.float32)))),
        }

    gradients, _, n0, looked = reverse_scan(
        static, operands, kept, ct_x, ct_aux, probe=(compare, states) if probe else None
    )
    return jnp.sum(n0 != quantize(operands.x0, fixed_point)), looked, gradients
