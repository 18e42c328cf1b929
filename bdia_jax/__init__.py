"""Exact bit-level reversible transformers in JAX (BDIA, arXiv 2407.09093)."""

from bdia_jax import linen, losses, nnx
from bdia_jax.audit import Audit, audit
from bdia_jax.fixed_point import FixedPoint
from bdia_jax.memory import MemoryReport, memory_report, residual_bytes
from bdia_jax.recurrence import sample_gamma
from bdia_jax.remat import Recomputed, RematAudit, audit_remat
from bdia_jax.rounding import pin_rounding
from bdia_jax.scan import bdia_scan

__all__ = [
    "Audit",
    "FixedPoint",
    "MemoryReport",
    "Recomputed",
    "RematAudit",
    "audit",
    "audit_remat",
    "bdia_scan",
    "linen",
    "losses",
    "memory_report",
    "nnx",
    "pin_rounding",
    "residual_bytes",
    "sample_gamma",
]
