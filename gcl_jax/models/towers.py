"""The towers that come with gcl_jax: vision transformers as open_clip (CLIP) and timm (SigLIP)
build them, a small convolutional network, CLIP's text transformer, and BERT.
`gcl_jax.models.families` declares them."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from gcl_jax.config import TextConfig, VisionConfig
from gcl_jax.errors import DataError
from gcl_jax.models.layers import (
    ACTIVATIONS,
    Linear,
    Mlp,
    Numerics,
    Position,
    Transformer,
    grid_sines,
    tokens_at,
)
from gcl_jax.sharding import looked_up


class VisionTransformer(nnx.Module):
    """Patches, positions, transformer, ln_post, pooling.

    CLIP adds a class token, `ln_pre` and a projection of the class token, or of the mean of the
    patches; SigLIP a bias to the patches and a pooling by attention over them.
    """

    def __init__(self, cfg: VisionConfig, embed_dim: int, numerics: Numerics, rngs: nnx.Rngs):
        width, heads = cfg.width, cfg.width // cfg.head_width
        self.patch_size, self.patch_dropout = cfg.patch_size, cfg.patch_dropout
        self.dtype, self.has_class_token = numerics.dtype, cfg.pool != "map"
        self.averages = cfg.pool == "avg"
        side, pixels = cfg.image_size // cfg.patch_size, 3 * cfg.patch_size**2
        std = width**-0.5
        self.patch_embedding = numerics.param(pixels**-0.5, (pixels, width), rngs)
        self.positional_embedding = numerics.param(
            std, (side**2 + self.has_class_token, width), rngs
        )
        if cfg.pos_embed_type == "sin_cos_2d":
            table = self.positional_embedding[...]
            self.positional_embedding[...] = table.at[-(side**2) :].set(grid_sines(side, width))
        if self.has_class_token:
            self.class_embedding = numerics.param(std, (width,), rngs)
            self.ln_pre = numerics.layer_norm(width, cfg.norm_eps, rngs)
            self.proj = numerics.param(std, (width, embed_dim), rngs)
        else:
            self.patch_bias = numerics.param(0.0, (width,), rngs)
            self.pool = AttentionPool(cfg, heads, numerics, rngs)
        self.transformer = Transformer(cfg, heads, numerics, rngs)
        self.ln_post = numerics.layer_norm(width, cfg.norm_eps, rngs)

    def __call__(
        self, images: Float[Array, "b h w 3"], key: PRNGKeyArray | None = None
    ) -> Float[Array, "b e"]:
        """Normalised images to unnormalised embeddings; with `key`, patches are dropped."""
        if not self.has_class_token:
            return self.pool(self.ln_post(self._states(images, key, None)))
        if self.averages:
            x = self.ln_post(self._states(images, key, None))[:, 1:].mean(axis=1)
        else:
            x = self.ln_post(self._states(images, key, 0)[:, 0])
        return x @ self.proj[...].astype(self.dtype)

    def with_tokens(
        self, images: Float[Array, "b h w 3"], key: PRNGKeyArray | None = None
    ) -> tuple[Float[Array, "b e"], Float[Array, "b n e"]]:
        """The same, and each patch by the same projection; where attention pools, as if it saw that
        patch alone."""
        x = self.ln_post(self._states(images, key, None))
        if not self.has_class_token:
            alone = self.pool(x.reshape(-1, 1, x.shape[-1]))
            return self.pool(x), alone.reshape(x.shape)
        x = x @ self.proj[...].astype(self.dtype)
        return x[:, 1:].mean(axis=1) if self.averages else x[:, 0], x[:, 1:]

    def _states(
        self, images: Float[Array, "b h w 3"], key: PRNGKeyArray | None, read: int | None
    ) -> Float[Array, "b r d"]:
        """What the transformer returns of the tokens, or of that at `read`."""
        x = self._patches(images).astype(self.dtype) @ self.patch_embedding[...].astype(self.dtype)
        positions = self.positional_embedding[...].astype(self.dtype)
        if not self.has_class_token:
            x = x + self.patch_bias[...].astype(self.dtype) + positions
            x = _drop_patches(x, self.patch_dropout, key)
            return self.transformer(x, is_causal=False)
        x = _drop_patches(x + positions[1:], self.patch_dropout, key)
        token = self.class_embedding[...].astype(self.dtype) + positions[0]
        x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, x.shape[-1])), x], axis=1)
        return self.transformer(self.ln_pre(x), is_causal=False, read=read)

    def _patches(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b n p"]:
        """Pixels of each patch: the convolution of stride = kernel size becomes one matmul over
        (row, column, channel). As in a convolution, what no whole patch covers is left out."""
        b, p = images.shape[0], self.patch_size
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

    def __init__(self, cfg: VisionConfig, heads: int, numerics: Numerics, rngs: nnx.Rngs):
        width, std = cfg.width, cfg.width**-0.5
        self.heads, self.dtype = heads, numerics.dtype
        self.probe = numerics.param(std, (width,), rngs)
        self.q_proj = Linear(width, width, std, numerics, rngs)
        self.kv_proj = Linear(width, 2 * width, std, numerics, rngs)
        self.out_proj = Linear(width, width, std, numerics, rngs)
        self.ln = numerics.layer_norm(width, cfg.norm_eps, rngs)
        self.mlp = Mlp(width, int(width * cfg.mlp_ratio), std, cfg.act, numerics, rngs)

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b d"]:
        b, n, d = x.shape
        q = self.q_proj(self.probe[...].astype(self.dtype)).reshape(1, 1, self.heads, -1)
        q = jnp.broadcast_to(q, (b, *q.shape[1:]))
        k, v = jnp.split(self.kv_proj(x).reshape(b, n, 2 * self.heads, -1), 2, axis=2)
        pooled = self.out_proj(jax.nn.dot_product_attention(q, k, v).reshape(b, d))
        return pooled + self.mlp(self.ln(pooled))


class ConvNet(nnx.Module):
    """A residual network of 3 x 3 convolutions, norm and activation before each (arXiv 1603.05027),
    with layer norms of the channels, which need no statistics of a batch (arXiv 2201.03545).

    A convolution of stride 2, then stages of `layers` blocks whose first one halves the grid and
    doubles the channels, until a cell covers `patch_size` pixels and has `width` channels. The
    embedding is a linear map of the mean over the cells. It knows from the start that what is seen
    here may be seen there, which a transformer has to learn: better where pictures are few.
    """

    def __init__(self, cfg: VisionConfig, embed_dim: int, numerics: Numerics, rngs: nnx.Rngs):
        stages = self.stages(cfg)
        channels = cfg.width >> stages
        self.dtype = numerics.dtype
        self.stem = _kernel(3, channels, 1.0, numerics, rngs)
        blocks, share = [], (2 * max(1, stages * cfg.layers)) ** -0.5
        for stage in range(stages):
            wide = channels << stage
            for first in range(cfg.layers):
                sizes = (2 * wide, 2 * wide) if first else (wide, 2 * wide)
                blocks.append(ConvBlock(*sizes, share, cfg, numerics, rngs))
        self.layers = nnx.Dict({str(i): block for i, block in enumerate(blocks)})
        self.ln_post = numerics.layer_norm(cfg.width, cfg.norm_eps, rngs)
        self.proj = numerics.param(cfg.width**-0.5, (cfg.width, embed_dim), rngs)

    @staticmethod
    def stages(cfg: VisionConfig) -> int:
        return cfg.patch_size.bit_length() - 2

    def __call__(
        self, images: Float[Array, "b h w 3"], key: PRNGKeyArray | None = None
    ) -> Float[Array, "b e"]:
        """Normalised images to unnormalised embeddings."""
        return self._cells(images).mean((1, 2)) @ self.proj[...].astype(self.dtype)

    def with_tokens(
        self, images: Float[Array, "b h w 3"], key: PRNGKeyArray | None = None
    ) -> tuple[Float[Array, "b e"], Float[Array, "b n e"]]:
        """The same, and the projection of each cell, of which the embedding is the mean."""
        cells = self._cells(images) @ self.proj[...].astype(self.dtype)
        return cells.mean((1, 2)), cells.reshape(len(cells), -1, cells.shape[-1])

    def _cells(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b y x d"]:
        x = _convolved(images.astype(self.dtype), self.stem, stride=2)
        for i in range(len(self.layers)):
            x = self.layers[str(i)](x)
        return self.ln_post(x)


class ConvBlock(nnx.Module):
    """x + conv(act(norm(conv(act(norm(x)))))); where channels grow, the grid is halved, and x is
    the linear map of the mean of four cells. The block's own part starts at `share` of x's size."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        share: float,
        cfg: VisionConfig,
        numerics: Numerics,
        rngs: nnx.Rngs,
    ):
        self.act, self.dtype = ACTIVATIONS[cfg.act], numerics.dtype
        self.stride = 2 if inputs < outputs else 1
        self.ln_1 = numerics.layer_norm(inputs, cfg.norm_eps, rngs)
        self.conv_1 = _kernel(inputs, outputs, 1.0, numerics, rngs)
        self.ln_2 = numerics.layer_norm(outputs, cfg.norm_eps, rngs)
        self.conv_2 = _kernel(outputs, outputs, share, numerics, rngs)
        if self.stride == 2:
            self.shortcut = numerics.param(inputs**-0.5, (inputs, outputs), rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b y x d"]:
        y = _convolved(self.act(self.ln_1(x)), self.conv_1, self.stride)
        y = _convolved(self.act(self.ln_2(y)), self.conv_2)
        if self.stride == 2:
            x = nnx.avg_pool(x, (2, 2), (2, 2)) @ self.shortcut[...].astype(self.dtype)
        return x + y


def _kernel(
    inputs: int, outputs: int, share: float, numerics: Numerics, rngs: nnx.Rngs
) -> nnx.Param:
    return numerics.param(share * (2 / (9 * inputs)) ** 0.5, (3, 3, inputs, outputs), rngs)


def _convolved(
    x: Float[Array, "b h w c"], kernel: nnx.Param, stride: int = 1
) -> Float[Array, "b y x d"]:
    """3 x 3 with a border of zeros; the first output stands on the first cell, whatever the stride,
    as in torch with padding 1."""
    convolve = functools.partial(_convolve, stride=stride)
    weights = kernel[...].astype(x.dtype)
    if stride == 1:
        return convolve(x, weights)
    # XLA's gradients of strided convolutions on CPUs take two to five times as long.
    by_product = functools.partial(_convolve_by_product, stride=stride)
    return jax.lax.platform_dependent(x, weights, cpu=by_product, default=convolve)


def _convolve(x, kernel, stride: int):
    layout = ("NHWC", "HWIO", "NHWC")
    pads = [(1, 1), (1, 1)]
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), pads, dimension_numbers=layout)


def _convolve_by_product(x, kernel, stride: int):
    """The same as one product of matrices, each cell with its neighbours side by side."""
    rows, columns = (-(-size // stride) for size in x.shape[1:3])
    padded = jnp.pad(x, ((0, 0), (1, stride), (1, stride), (0, 0)))
    neighbours = [
        padded[:, i : i + stride * rows : stride, j : j + stride * columns : stride]
        for i in range(3)
        for j in range(3)
    ]
    return jnp.concatenate(neighbours, -1) @ kernel.reshape(-1, kernel.shape[-1])


class TextTransformer(nnx.Module):
    """Token and position embeddings, pre-LN transformer, ln_final, projection of one token."""

    def __init__(self, cfg: TextConfig, embed_dim: int, numerics: Numerics, rngs: nnx.Rngs):
        width = cfg.width
        self.dtype, self.causal, self.pool = numerics.dtype, cfg.causal, cfg.pool
        self.token_embedding = numerics.param(0.02, (cfg.vocab_size, width), rngs)
        self.positional_embedding = numerics.param(0.01, (cfg.context_length, width), rngs)
        self.transformer = Transformer(cfg, cfg.heads, numerics, rngs)
        self.ln_final = numerics.layer_norm(width, cfg.norm_eps, rngs)
        self.projection = Projection(cfg, embed_dim, numerics, rngs)

    def __call__(self, tokens: Int[Array, "b t"]) -> Float[Array, "b e"]:
        """Token ids, padded at the end, to unnormalised embeddings.

        CLIP's end token has the highest id, so argmax finds it, and what follows is out of a causal
        model's sight; SigLIP's tower attends to its padding and reads the last token.
        """
        read = self._pooled(tokens)
        return self.projection(self.ln_final(self._states(tokens, read)[:, 0]))

    def with_tokens(
        self, tokens: Int[Array, "b t"]
    ) -> tuple[Float[Array, "b e"], Float[Array, "b t e"]]:
        """The same, and the projection of each token, 0 behind the end of a text: behind CLIP's end
        token, or where SigLIP's padding, whatever its id, is repeated. (Padding before a text
        counts as tokens.)"""
        x, read = self.projection(self.ln_final(self._states(tokens, None))), self._pooled(tokens)
        places = jnp.arange(tokens.shape[1])
        end = jnp.broadcast_to(read, len(tokens))
        if self.pool == "last":
            end = 1 + jnp.max(jnp.where(tokens != tokens[:, -1:], places, -1), axis=1)
        real = places <= end[:, None]
        return tokens_at(x, read)[:, 0], jnp.where(real[:, :, None], x, 0)

    def _pooled(self, tokens: Int[Array, "b t"]) -> Position:
        return tokens.shape[1] - 1 if self.pool == "last" else jnp.argmax(tokens, axis=-1)

    def _states(self, tokens: Int[Array, "b t"], read: Position | None) -> Float[Array, "b r d"]:
        """What the transformer returns of the tokens, or of those at `read`."""
        x = looked_up(self.token_embedding[...], tokens, self.dtype)
        x += self.positional_embedding[...][: tokens.shape[1]].astype(self.dtype)
        return self.transformer(x, is_causal=self.causal, read=read)


class Bert(nnx.Module):
    """BERT, RoBERTa or XLM-RoBERTa: summed embeddings, post-LN transformer, pooling, projection."""

    def __init__(self, cfg: TextConfig, embed_dim: int, numerics: Numerics, rngs: nnx.Rngs):
        width = cfg.width
        self.dtype, self.pool = numerics.dtype, cfg.pool
        self.pad_id, self.first_position = cfg.pad_id, cfg.first_position
        self.token_embedding = numerics.param(0.02, (cfg.vocab_size, width), rngs)
        self.positional_embedding = numerics.param(0.02, (cfg.max_positions, width), rngs)
        self.token_type_embedding = numerics.param(0.02, (cfg.token_types, width), rngs)
        self.ln_embedding = numerics.layer_norm(width, cfg.norm_eps, rngs)
        self.transformer = Transformer(cfg, cfg.heads, numerics, rngs, post_norm=True)
        self.projection = Projection(cfg, embed_dim, numerics, rngs)

    def __call__(self, tokens: Int[Array, "b t"]) -> Float[Array, "b e"]:
        """Token ids, padded at the end with `pad_id`, to unnormalised embeddings. Padding starts
        behind the last other token; a row of nothing else counts as one, so that it stays finite.
        """
        x, real = self._states(tokens, 0 if self.pool == "first" else None)
        return self._pooled(x, real)

    def with_tokens(
        self, tokens: Int[Array, "b t"]
    ) -> tuple[Float[Array, "b e"], Float[Array, "b t e"]]:
        """The same, and the projection of each token, 0 behind the end of a text."""
        x, real = self._states(tokens, None)
        return self._pooled(x, real), jnp.where(real[:, :, None], self.projection(x), 0)

    def _states(
        self, tokens: Int[Array, "b t"], read: int | None
    ) -> tuple[Float[Array, "b r d"], Bool[Array, "b t"]]:
        """What the transformer returns of the tokens, or of that at `read`; which are real."""
        t = tokens.shape[1]
        lengths = jnp.max(jnp.where(tokens != self.pad_id, jnp.arange(1, t + 1), 1), axis=1)
        positions = self.positional_embedding[...][self.first_position : self.first_position + t]
        x = looked_up(self.token_embedding[...], tokens, self.dtype)
        x += (positions + self.token_type_embedding[...][0]).astype(self.dtype)
        x = self.transformer(self.ln_embedding(x), is_causal=False, lengths=lengths, read=read)
        return x, jnp.arange(t) < lengths[:, None]

    def _pooled(self, x: Float[Array, "b r d"], real: Bool[Array, "b t"]) -> Float[Array, "b e"]:
        if self.pool == "first":
            return self.projection(x[:, 0])
        total = jnp.sum(jnp.where(real[:, :, None], x, 0), axis=1, dtype=jnp.float32)
        return self.projection((total / real.sum(1, keepdims=True)).astype(self.dtype))


class Projection(nnx.Module):
    """From the tower's width to the embedding's: see `TextConfig.proj`."""

    def __init__(self, cfg: TextConfig, embed_dim: int, numerics: Numerics, rngs: nnx.Rngs):
        self.kind, self.dtype = cfg.proj, numerics.dtype
        width, std = cfg.width, cfg.width**-0.5
        if cfg.proj == "mlp":
            hidden = (width + embed_dim) // 2
            self.hidden = numerics.param(std, (width, hidden), rngs)
            self.kernel = numerics.param(hidden**-0.5, (hidden, embed_dim), rngs)
        elif cfg.proj != "none":
            self.kernel = numerics.param(std, (width, embed_dim), rngs)
        if cfg.proj == "linear_bias":
            self.bias = numerics.param(0.0, (embed_dim,), rngs)

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b e"]:
        if self.kind == "none":
            return x
        if self.kind == "mlp":
            x = ACTIVATIONS["gelu"](x @ self.hidden[...].astype(self.dtype))
        x = x @ self.kernel[...].astype(self.dtype)
        return x + self.bias[...].astype(self.dtype) if self.kind == "linear_bias" else x


def resize_positions(
    table: Float[np.ndarray, "n d"], rows: int, class_tokens: int
) -> Float[np.ndarray, "m d"]:
    """Position embeddings of a square grid, behind `class_tokens` rows that stay as they are,
    resized to a square grid that makes `rows` in all: bicubic, antialiased.

    Raises:
        DataError: the grid is not square.
    """
    kept, grid = table[:class_tokens], table[class_tokens:].astype(np.float32)
    old, new = math.isqrt(len(grid)), math.isqrt(rows - class_tokens)
    if old * old != len(grid) or new * new != rows - class_tokens or not old:
        raise DataError(
            f"visual.positional_embedding: {len(table)} rows are no square grid to make "
            f"{rows} rows of"
        )
    image = grid.reshape(old, old, -1)
    resized = jax.image.resize(image, (new, new, image.shape[-1]), "cubic", antialias=True)
    return np.concatenate([kept, np.asarray(resized).reshape(new * new, -1)])
