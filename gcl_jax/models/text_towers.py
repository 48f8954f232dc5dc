"""The text tower: CLIP's causal transformer, pooled at the end token."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from gcl_jax.config import TextConfig
from gcl_jax.models.layers import Activation, Transformer, normal


class TextTower(nnx.Module):
    """Token and position embeddings, causal transformer, ln_final, projection at the end token."""

    def __init__(
        self, cfg: TextConfig, embed_dim: int, act: Activation, *, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        width, self.dtype = cfg.width, dtype
        self.token_embedding = nnx.Param(normal(0.02)(rngs.params(), (cfg.vocab_size, width)))
        self.positional_embedding = nnx.Param(
            normal(0.01)(rngs.params(), (cfg.context_length, width))
        )
        self.transformer = Transformer(
            width, cfg.heads, cfg.layers, cfg.mlp_ratio, act, dtype=dtype, rngs=rngs
        )
        self.ln_final = nnx.LayerNorm(width, epsilon=1e-5, dtype=dtype, rngs=rngs)
        self.text_projection = nnx.Param(normal(width**-0.5)(rngs.params(), (width, embed_dim)))

    def __call__(self, tokens: Int[Array, "b t"]) -> Float[Array, "b e"]:
        """CLIP token ids, zero-padded, to unnormalised embeddings. The end token has the highest
        id, so argmax finds it (OpenAI's CLIP); what follows it is out of a causal model's sight."""
        x = self.token_embedding[...][tokens] + self.positional_embedding[...][: tokens.shape[1]]
        x = self.transformer(x.astype(self.dtype), is_causal=True)
        end = jnp.argmax(tokens, axis=-1)
        pooled = jnp.take_along_axis(x, end[:, None, None], axis=1)[:, 0]
        return self.ln_final(pooled) @ self.text_projection[...].astype(self.dtype)
