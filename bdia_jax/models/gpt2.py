"""GPT-2: the causal language model of the paper's OpenWebText experiment, as a BDIA stack."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from bdia_jax._stack import Stack
from bdia_jax.models.attention import Attention
from bdia_jax.models.blocks import MLP, PreNormBlock
from bdia_jax.models.language_model import LanguageModel, initializers, make_stack, take_rows
from bdia_jax.nnx import BDIAStack


class GPT2(LanguageModel):
    """Causal transformer over tokens; the token embedding is also the output projection.

    The defaults are the 124M model; biases everywhere, GELU by tanh.
    Weights start as N(0, 0.02), those of the projections that end a residual branch as
    N(0, 0.02 / sqrt(2 depth)).

    Args:
        vocab_size: V.
        max_len: most positions, learned ones.
        width, depth, num_heads, mlp_dim: the architecture.
        epsilon: of the LayerNorms.
        dropout_rate: of the embeddings, the attention's output and in the MLP.
        dtype: of the matrix products (float32 or bfloat16). Parameters, residual stream
            and logits are float32.
        stack: (make_block, depth, rngs=) -> the stack; `functools.partial(BDIAStack, ...)` sets
            its options, magnitude=0, fixed_point=None, backprop="store" for the plain GPT-2.
            Its output must be as wide as its input.
        rngs: initializes parameters; seeds dropout and gamma.

    Raises:
        ValueError: heads that do not divide width; a stack whose output is wider.

    Example:
        >>> model = GPT2(50, 16, width=8, depth=2, num_heads=2, mlp_dim=32, rngs=nnx.Rngs(0))
        >>> model(jnp.zeros((3, 5), jnp.int32)).shape
        (3, 5, 50)
    """

    def __init__(
        self,
        vocab_size: int = 50257,
        max_len: int = 1024,
        *,
        width: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_dim: int = 3072,
        epsilon: float = 1e-5,
        dropout_rate: float = 0.0,
        dtype=jnp.float32,
        stack: Callable[..., Stack] = BDIAStack,
        rngs: nnx.Rngs,
    ):
        self.max_len = max_len
        self.dtype = dtype
        init = initializers(depth)
        normal = init["kernel_init"]
        self.embedding = nnx.Param(normal(rngs.params(), (vocab_size, width), jnp.float32))
        self.positions = nnx.Param(normal(rngs.params(), (max_len, width), jnp.float32))
        self.dropout = nnx.Dropout(dropout_rate, rngs=rngs)
        norm = partial(nnx.LayerNorm, epsilon=epsilon)

        def make_block(rngs):
            return PreNormBlock(
                width,
                num_heads,
                mlp_dim,
                dropout_rate=dropout_rate,
                dtype=dtype,
                attention=partial(Attention, qkv_bias=True, is_causal=True, **init),
                mlp=partial(MLP, activation=jax.nn.gelu, **init),
                norm=norm,
                rngs=rngs,
            )

        self.stack = make_stack(stack, make_block, depth, width, rngs)
        self.norm = norm(width, rngs=rngs)

    def features(
        self,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        mask: jax.Array | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> jax.Array:
        """As `LanguageModel.features`."""
        if positions is None:
            positions = jnp.arange(tokens.shape[1])[None]
        x = self._embed(tokens) + take_rows(self.positions[...], positions)
        return self.norm(self.stack(self.dropout(x, rngs=rngs), mask, rngs=rngs))
