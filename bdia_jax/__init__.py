"""Exact bit-level reversible transformers in JAX (BDIA, arXiv 2407.09093)."""

from bdia_jax import linen, nnx
from bdia_jax.audit import Audit, audit
from bdia_jax.fixed_point import FixedPoint
from bdia_jax.recurrence import sample_gamma
from bdia_jax.scan import bdia_scan

__all__ = ["Audit", "FixedPoint", "audit", "bdia_scan", "linen", "nnx", "sample_gamma"]
