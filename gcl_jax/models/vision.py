"""The image towers: vision transformers as open_clip (CLIP) and timm (SigLIP) build them."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from gcl_jax.config import VisionConfig
from gcl_jax.models.layers import Linear, Mlp, Numerics, Transformer


class VisionTower(nnx.Module):
    """Patches, learned positions, transformer, ln_post, pooling.

    CLIP adds a class token, `ln_pre` and a projection of the class token; SigLIP a bias to the
    patches and a pooling by attention over them.
    """

    def __init__(self, cfg: VisionConfig, embed_dim: int, how: Numerics, rngs: nnx.Rngs):
        width, heads = cfg.width, cfg.width // cfg.head_width
        self.patch_size, self.patch_dropout = cfg.patch_size, cfg.patch_dropout
        self.dtype, self.has_class_token = how.dtype, cfg.pool == "tok"
        patches, pixels = (cfg.image_size // cfg.patch_size) ** 2, 3 * cfg.patch_size**2
        std = width**-0.5
        self.patch_embedding = how.param(pixels**-0.5, (pixels, width), rngs)
        self.positional_embedding = how.param(std, (patches + self.has_class_token, width), rngs)
        if self.has_class_token:
            self.class_embedding = how.param(std, (width,), rngs)
            self.ln_pre = how.layer_norm(width, cfg.norm_eps, rngs)
            self.proj = how.param(std, (width, embed_dim), rngs)
        else:
            self.patch_bias = how.param(0.0, (width,), rngs)
            self.pool = AttentionPool(cfg, heads, how, rngs)
        self.transformer = Transformer(cfg, heads, how, rngs)
        self.ln_post = how.layer_norm(width, cfg.norm_eps, rngs)

    def __call__(
        self, images: Float[Array, "b h w 3"], key: PRNGKeyArray | None = None
    ) -> Float[Array, "b e"]:
        """Normalised images to unnormalised embeddings; with `key`, patches are dropped."""
        x = self._patches(images).astype(self.dtype) @ self.patch_embedding[...].astype(self.dtype)
        positions = self.positional_embedding[...].astype(self.dtype)
        if not self.has_class_token:
            x = x + self.patch_bias[...].astype(self.dtype) + positions
            x = _drop_patches(x, self.patch_dropout, key)
            return self.pool(self.ln_post(self.transformer(x, is_causal=False)))
        x = _drop_patches(x + positions[1:], self.patch_dropout, key)
        token = self.class_embedding[...].astype(self.dtype) + positions[0]
        x = jnp.concatenate([jnp.broadcast_to(token, (len(x), 1, x.shape[-1])), x], axis=1)
        x = self.transformer(self.ln_pre(x), is_causal=False, read=0)
        return self.ln_post(x[:, 0]) @ self.proj[...].astype(self.dtype)

    def _patches(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b n p"]:
        """Pixels of each patch: the convolution of stride = kernel size becomes one matmul over
        (row, column, channel). As in a convolution, what no whole patch covers is left out."""
        b, p = len(images), self.patch_size
        rows, columns = images.shape[1] // p, images.shape[2] // p
        images = images[:, : rows * p, : columns * p]
        return images.reshape(b, rows, p, columns, p, 3).swapaxes(2, 3).reshape(b, -1, p * p * 3)


def _drop_patches(
    x: Float[Array, "b n d"], rate: float, key: PRNGKeyArray | None
) -> Float[Array, "b m d"]:
    """A random choice of the patches of each row (patch dropout, arXiv 2212.00794)."""
    if key is None or not rate:
        return x
    b, n, _ = x.shape
    kept = max(1, int(n * (1 - rate)))
    chosen = jnp.argsort(jax.random.uniform(key, (b, n)), axis=1)[:, :kept]
    return jnp.take_along_axis(x, chosen[:, :, None], axis=1)


class AttentionPool(nnx.Module):
    """SigLIP's head: a learned query attends to all patches; then a residual MLP."""

    def __init__(self, cfg: VisionConfig, heads: int, how: Numerics, rngs: nnx.Rngs):
        width, std = cfg.width, cfg.width**-0.5
        self.heads, self.dtype = heads, how.dtype
        self.probe = how.param(std, (width,), rngs)
        self.q_proj = Linear(width, width, std, how, rngs)
        self.kv_proj = Linear(width, 2 * width, std, how, rngs)
        self.out_proj = Linear(width, width, std, how, rngs)
        self.ln = how.layer_norm(width, cfg.norm_eps, rngs)
        self.mlp = Mlp(width, int(width * cfg.mlp_ratio), std, cfg.act, how, rngs)

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b d"]:
        b, n, d = x.shape
        q = self.q_proj(self.probe[...].astype(self.dtype)).reshape(1, 1, self.heads, -1)
        q = jnp.broadcast_to(q, (b, *q.shape[1:]))
        k, v = jnp.split(self.kv_proj(x).reshape(b, n, 2 * self.heads, -1), 2, axis=2)
        pooled = self.out_proj(jax.nn.dot_product_attention(q, k, v).reshape(b, d))
        return pooled + self.mlp(self.ln(pooled))
