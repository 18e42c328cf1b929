"""Other reversible stacks, to compare BDIA with: RevViT, midpoint, float BDIA."""

from bdia_jax.baselines.stacks import FloatBDIAStack, MidpointStack, RevStack

__all__ = ["FloatBDIAStack", "MidpointStack", "RevStack"]
