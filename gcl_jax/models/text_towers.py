"""The text towers: CLIP's and SigLIP's transformer, and BERT's."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from gcl_jax.config import TextConfig
from gcl_jax.models.layers import ACTIVATIONS, Numerics, Transformer
from gcl_jax.sharding import looked_up


class TextTower(nnx.Module):
    """Token and position embeddings, pre-LN transformer, ln_final, projection of one token."""

    def __init__(self, cfg: TextConfig, embed_dim: int, how: Numerics, rngs: nnx.Rngs):
        width = cfg.width
        self.dtype, self.causal, self.pool = how.dtype, cfg.causal, cfg.pool
        self.token_embedding = how.param(0.02, (cfg.vocab_size, width), rngs)
        self.positional_embedding = how.param(0.01, (cfg.context_length, width), rngs)
        self.transformer = Transformer(cfg, cfg.heads, how, rngs)
        self.ln_final = how.layer_norm(width, cfg.norm_eps, rngs)
        self.projection = Projection(cfg, embed_dim, how, rngs)

    def __call__(self, tokens: Int[Array, "b t"]) -> Float[Array, "b e"]:
        """Token ids, padded at the end, to unnormalised embeddings.

        CLIP's end token has the highest id, so argmax finds it, and what follows is out of a causal
        model's sight; SigLIP's tower attends to its padding and reads the last token.
        """
        x = looked_up(self.token_embedding[...], tokens, self.dtype)
        x += self.positional_embedding[...][: tokens.shape[1]].astype(self.dtype)
        read = tokens.shape[1] - 1 if self.pool == "last" else jnp.argmax(tokens, axis=-1)
        x = self.transformer(x, is_causal=self.causal, read=read)
        return self.projection(self.ln_final(x[:, 0]))


class BertTower(nnx.Module):
    """BERT, RoBERTa or XLM-RoBERTa: summed embeddings, post-LN transformer, pooling, projection."""

    def __init__(self, cfg: TextConfig, embed_dim: int, how: Numerics, rngs: nnx.Rngs):
        width = cfg.width
        self.dtype, self.pool = how.dtype, cfg.pool
        self.pad_id, self.first_position = cfg.pad_id, cfg.first_position
        self.token_embedding = how.param(0.02, (cfg.vocab_size, width), rngs)
        self.positional_embedding = how.param(0.02, (cfg.max_positions, width), rngs)
        self.token_type_embedding = how.param(0.02, (cfg.token_types, width), rngs)
        self.ln_embedding = how.layer_norm(width, cfg.norm_eps, rngs)
        self.transformer = Transformer(cfg, cfg.heads, how, rngs, post_norm=True)
        self.projection = Projection(cfg, embed_dim, how, rngs)

    def __call__(self, tokens: Int[Array, "b t"]) -> Float[Array, "b e"]:
        """Token ids, padded at the end with `pad_id`, to unnormalised embeddings. Padding starts
        behind the last other token; a row of nothing else counts as one, so that it stays finite.
        """
        t = tokens.shape[1]
        lengths = jnp.max(jnp.where(tokens != self.pad_id, jnp.arange(1, t + 1), 1), axis=1)
        positions = self.positional_embedding[...][self.first_position : self.first_position + t]
        x = looked_up(self.token_embedding[...], tokens, self.dtype)
        x += (positions + self.token_type_embedding[...][0]).astype(self.dtype)
        x = self.ln_embedding(x)
        read = 0 if self.pool == "first" else None
        x = self.transformer(x, is_causal=False, lengths=lengths, read=read)
        if self.pool == "first":
            return self.projection(x[:, 0])
        real = jnp.arange(t) < lengths[:, None]
        total = jnp.sum(jnp.where(real[:, :, None], x, 0), axis=1, dtype=jnp.float32)
        return self.projection((total / lengths[:, None]).astype(self.dtype))


class Projection(nnx.Module):
    """From the tower's width to the embedding's: see `TextConfig.proj`."""

    def __init__(self, cfg: TextConfig, embed_dim: int, how: Numerics, rngs: nnx.Rngs):
        self.kind, self.dtype = cfg.proj, how.dtype
        width, std = cfg.width, cfg.width**-0.5
        if cfg.proj == "mlp":
            hidden = (width + embed_dim) // 2
            self.hidden = how.param(std, (width, hidden), rngs)
            self.kernel = how.param(hidden**-0.5, (hidden, embed_dim), rngs)
        elif cfg.proj != "none":
            self.kernel = how.param(std, (width, embed_dim), rngs)
        if cfg.proj == "linear_bias":
            self.bias = how.param(0.0, (embed_dim,), rngs)

    def __call__(self, x: Float[Array, "b d"]) -> Float[Array, "b e"]:
        if self.kind == "none":
            return x
        if self.kind == "mlp":
            x = ACTIVATIONS["gelu"](x @ self.hidden[...].astype(self.dtype))
        x = x @ self.kernel[...].astype(self.dtype)
        return x + self.bias[...].astype(self.dtype) if self.kind == "linear_bias" else x
