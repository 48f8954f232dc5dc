"""Transformer layers in the parametrisation of open_clip: residual blocks, fused qkv."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from gcl_jax.config import ModelConfig, TextConfig, VisionConfig
from gcl_jax.sharding import GATHERED, gathered, is_split, rows_split

Activation = Callable[[jax.Array], jax.Array]


def quick_gelu(x: jax.Array) -> jax.Array:
    """x * sigmoid(1.702 x), the activation of OpenAI's CLIP weights."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Activation] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "quick_gelu": quick_gelu,
}

REMAT_POLICIES = {
    "none": jax.checkpoint_policies.save_anything_except_these_names(GATHERED),
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


# Of the tokens of each row: the same for all rows, or each row's own.
Position = int | Int[Array, " b"]


def tokens_at(x: Float[Array, "b t d"], position: Position | None) -> Float[Array, "b r d"]:
    """The token of each row at `position` (r = 1); all of them if that is None."""
    if position is None:
        return x
    if isinstance(position, int):
        return x[:, position : position + 1]
    return jnp.take_along_axis(x, position[:, None, None], axis=1)


def normal(std: float) -> nnx.initializers.Initializer:
    return nnx.initializers.normal(std)


@dataclasses.dataclass(frozen=True)
class Numerics:
    """Precision, attention kernel, rematerialisation and low-rank updates of a tower, whatever its
    family: see `ModelConfig`. Makes its parameters and norms."""

    dtype: jnp.dtype
    param_dtype: jnp.dtype
    attention: Literal["xla", "cudnn"]
    remat: str
    lora_rank: int
    lora_alpha: float

    @classmethod
    def of(cls, cfg: ModelConfig) -> "Numerics":
        return cls(
            jnp.dtype(cfg.dtype),
            jnp.dtype(cfg.param_dtype),
            cast(Literal["xla", "cudnn"], cfg.attention),
            cfg.remat,
            cfg.lora_rank,
            cfg.lora_alpha,
        )

    def param(self, std: float, shape: tuple[int, ...], rngs: nnx.Rngs) -> nnx.Param:
        """A parameter drawn from a normal distribution."""
        return nnx.Param(normal(std)(rngs.params(), shape, self.param_dtype))

    def layer_norm(self, width: int, epsilon: float, rngs: nnx.Rngs) -> nnx.LayerNorm:
        return nnx.LayerNorm(
            width,
            epsilon=epsilon,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            use_fast_variance=False,  # E[x^2] - E[x]^2 cancels in the outlier channels of ViTs
            rngs=rngs,
        )


class Linear(nnx.Linear):
    """A linear map; with a LoRA rank r (arXiv 2106.09685) plus x @ lora_a @ lora_b * alpha / r,
    which starts at 0."""

    def __init__(self, inputs: int, outputs: int, std: float, numerics: Numerics, rngs: nnx.Rngs):
        super().__init__(
            inputs,
            outputs,
            kernel_init=normal(std),
            dtype=numerics.dtype,
            param_dtype=numerics.param_dtype,
            rngs=rngs,
        )
        self.lora_scale = 0.0
        if numerics.lora_rank:
            self.lora_scale = numerics.lora_alpha / numerics.lora_rank
            self.lora_a = numerics.param(inputs**-0.5, (inputs, numerics.lora_rank), rngs)
            self.lora_b = numerics.param(0.0, (numerics.lora_rank, outputs), rngs)

    def __call__(
        self, x: Float[Array, "... i"], outputs: slice = slice(None), *_
    ) -> Float[Array, "... o"]:
        """Of the outputs, those of the slice."""
        assert self.bias is not None
        x = x.astype(self.dtype)
        y = x @ self.kernel[...][:, outputs].astype(x.dtype)
        y += self.bias[...][outputs].astype(x.dtype)
        if self.lora_scale:
            a, b = self.lora_a[...].astype(x.dtype), self.lora_b[...].astype(x.dtype)
            y += (x @ a) @ b[:, outputs] * self.lora_scale
        return y


class Attention(nnx.Module):
    """Multi-head self-attention with one fused projection to queries, keys and values."""

    def __init__(self, width: int, heads: int, out_std: float, numerics: Numerics, rngs: nnx.Rngs):
        self.heads, self.implementation = heads, numerics.attention
        self.in_proj = Linear(width, 3 * width, width**-0.5, numerics, rngs)
        self.out_proj = Linear(width, width, out_std, numerics, rngs)

    def __call__(
        self,
        x: Float[Array, "b t d"],
        *,
        is_causal: bool,
        lengths: Int[Array, " b"] | None,
        read: Position | None,
    ) -> Float[Array, "b r d"]:
        b, t, d = x.shape
        if read is None:
            q, k, v = jnp.split(self.in_proj(x).reshape(b, t, 3 * self.heads, -1), 3, axis=2)
        else:
            q = self.in_proj(tokens_at(x, read), slice(None, d)).reshape(b, 1, self.heads, -1)
            keys_values = self.in_proj(x, slice(d, None)).reshape(b, t, 2 * self.heads, -1)
            k, v = jnp.split(keys_values, 2, axis=2)
            if is_causal:
                lengths = jnp.broadcast_to(read + 1, (b,))
        attended = jax.nn.dot_product_attention(
            q,
            k,
            v,
            is_causal=is_causal and read is None,
            key_value_seq_lengths=lengths,
            # cuDNN has nothing to gain from a single query.
            implementation=self.implementation if read is None else "xla",
        )
        return self.out_proj(attended.reshape(b, -1, d))


class Mlp(nnx.Module):
    """Two linear layers around the activation."""

    def __init__(
        self, width: int, hidden: int, out_std: float, act: str, numerics: Numerics, rngs: nnx.Rngs
    ):
        self.act = ACTIVATIONS[act]
        self.c_fc = Linear(width, hidden, (2 * width) ** -0.5, numerics, rngs)
        self.c_proj = Linear(hidden, width, out_std, numerics, rngs)

    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        return self.c_proj(self.act(self.c_fc(x)))


class ResidualBlock(nnx.Module):
    """Attention, then MLP, each with a residual: x + f(norm(x)) or, `post_norm`, norm(x + f(x))."""

    def __init__(
        self,
        cfg: VisionConfig | TextConfig,
        heads: int,
        numerics: Numerics,
        rngs: nnx.Rngs,
        *,
        post_norm: bool,
    ):
        width, out_std = cfg.width, (2 * cfg.layers * cfg.width) ** -0.5
        self.post_norm = post_norm
        self.ln_1 = numerics.layer_norm(width, cfg.norm_eps, rngs)
        self.attn = Attention(width, heads, out_std, numerics, rngs)
        self.ln_2 = numerics.layer_norm(width, cfg.norm_eps, rngs)
        self.mlp = Mlp(width, int(width * cfg.mlp_ratio), out_std, cfg.act, numerics, rngs)

    def __call__(
        self,
        x: Float[Array, "b t d"],
        *,
        is_causal: bool,
        lengths: Int[Array, " b"] | None,
        read: Position | None = None,
    ) -> Float[Array, "b r d"]:
        """All tokens, or only those at `read` (r = 1) and what they depend on."""
        attend = functools.partial(self.attn, is_causal=is_causal, lengths=lengths, read=read)
        if self.post_norm:
            x = self.ln_1(tokens_at(x, read) + attend(x))
            return self.ln_2(x + self.mlp(x))
        x = tokens_at(x, read) + attend(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Transformer(nnx.Module):
    """`cfg.layers` residual blocks whose parameters are stacked on axis 0 and scanned: compile time
    and program size do not grow with depth."""

    def __init__(
        self,
        cfg: VisionConfig | TextConfig,
        heads: int,
        numerics: Numerics,
        rngs: nnx.Rngs,
        *,
        post_norm: bool = False,
    ):
        @nnx.split_rngs(splits=cfg.layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def make_blocks(rngs: nnx.Rngs) -> ResidualBlock:
            return ResidualBlock(cfg, heads, numerics, rngs, post_norm=post_norm)

        self.blocks = make_blocks(rngs)
        self.remat, self.dtype = numerics.remat, numerics.dtype

    def __call__(
        self,
        x: Float[Array, "b t d"],
        *,
        is_causal: bool,
        lengths: Int[Array, " b"] | None = None,
        read: Position | None = None,
    ) -> Float[Array, "b r d"]:
        """All tokens, or only those at `read` (r = 1), for which the last block computes a sixth.

        `lengths`: how many tokens of each row are real; the padding behind is never attended.
        """
        graphdef, stacked = nnx.split(self.blocks)

        def layer(x, params, read=None):
            block = nnx.merge(graphdef, gathered(params, self.dtype))
            return block(rows_split(x), is_causal=is_causal, lengths=lengths, read=read)

        def saving(layer):
            if self.remat != "none" or is_split(jax.sharding.get_abstract_mesh()):
                return jax.checkpoint(layer, policy=REMAT_POLICIES[self.remat])
            return layer

        def through(x, stacked):
            whole = saving(layer)
            return jax.lax.scan(lambda x, params: (whole(x, params), None), x, stacked)[0]

        if read is None:
            return through(x, stacked)
        before, last = (jax.tree.map(lambda x, i=i: x[i], stacked) for i in (slice(-1), -1))
        if len(jax.tree.leaves(before)[0]):
            x = through(x, before)
        return saving(functools.partial(layer, read=read))(x, last)
