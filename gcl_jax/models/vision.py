"""The image tower: a vision transformer as open_clip builds it."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from gcl_jax.config import VisionConfig
from gcl_jax.models.layers import Activation, Transformer, normal


class VisionTower(nnx.Module):
    """Patches, class token, learned positions, ln_pre, transformer, ln_post, projection."""

    def __init__(
        self,
        cfg: VisionConfig,
        embed_dim: int,
        act: Activation,
        *,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        width, self.patch_size, self.dtype = cfg.width, cfg.patch_size, dtype
        tokens = (cfg.image_size // cfg.patch_size) ** 2 + 1
        pixels = 3 * cfg.patch_size**2
        init = normal(width**-0.5)
        self.patch_embedding = nnx.Param(normal(pixels**-0.5)(rngs.params(), (pixels, width)))
        self.class_embedding = nnx.Param(init(rngs.params(), (width,)))
        self.positional_embedding = nnx.Param(init(rngs.params(), (tokens, width)))
        self.ln_pre = nnx.LayerNorm(width, epsilon=1e-5, dtype=dtype, rngs=rngs)
        self.transformer = Transformer(
            width, width // cfg.head_width, cfg.layers, cfg.mlp_ratio, act, dtype=dtype, rngs=rngs
        )
        self.ln_post = nnx.LayerNorm(width, epsilon=1e-5, dtype=dtype, rngs=rngs)
        self.proj = nnx.Param(init(rngs.params(), (width, embed_dim)))

    def __call__(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b e"]:
        """Normalised images to unnormalised embeddings."""
        b, h, w, _ = images.shape
        p = self.patch_size
        # The convolution of stride = kernel size, as one matmul over (row, column, channel).
        patches = (
            images.reshape(b, h // p, p, w // p, p, 3).swapaxes(2, 3).reshape(b, -1, p * p * 3)
        )
        x = patches.astype(self.dtype) @ self.patch_embedding[...].astype(self.dtype)
        token = jnp.broadcast_to(self.class_embedding[...].astype(self.dtype), (b, 1, x.shape[-1]))
        x = jnp.concatenate([token, x], axis=1)
        x = self.ln_pre(x + self.positional_embedding[...].astype(self.dtype))
        x = self.transformer(x, is_causal=False)
        return self.ln_post(x[:, 0]) @ self.proj[...].astype(self.dtype)
