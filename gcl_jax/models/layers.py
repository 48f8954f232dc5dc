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


def normal(std: float) -> nnx.initializers.Initializer:
    return nnx.initializers.normal(std)


@dataclasses.dataclass(frozen=True)
class Numerics:
    """How a tower computes, whatever its shape: see `ModelConfig`."""

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

    def __init__(self, inputs: int, outputs: int, std: float, how: Numerics, rngs: nnx.Rngs):
        super().__init__(
            inputs,
            outputs,
            kernel_init=normal(std),
            dtype=how.dtype,
            param_dtype=how.param_dtype,
            rngs=rngs,
        )
        self.lora_scale = 0.0
        if how.lora_rank:
            self.lora_scale = how.lora_alpha / how.lora_rank
            self.lora_a = how.param(inputs**-0.5, (inputs, how.lora_rank), rngs)
            self.lora_b = how.param(0.0, (how.lora_rank, outputs), rngs)

    def __call__(self, x: Float[Array, "... i"], *_) -> Float[Array, "... o"]:
        y = super().__call__(x)
        if self.lora_scale:
            a, b = self.lora_a[...].astype(x.dtype), self.lora_b[...].astype(x.dtype)
            y += (x @ a) @ b * self.lora_scale
        return y


class Attention(nnx.Module):
    """Multi-head self-attention with one fused projection to queries, keys and values."""

    def __init__(self, width: int, heads: int, out_std: float, how: Numerics, rngs: nnx.Rngs):
        self.heads, self.implementation = heads, how.attention
        self.in_proj = Linear(width, 3 * width, width**-0.5, how, rngs)
        self.out_proj = Linear(width, width, out_std, how, rngs)

    def __call__(
        self, x: Float[Array, "b t d"], *, is_causal: bool, lengths: Int[Array, " b"] | None
    ) -> Float[Array, "b t d"]:
        b, t, d = x.shape
        q, k, v = jnp.split(self.in_proj(x).reshape(b, t, 3 * self.heads, -1), 3, axis=2)
        attended = jax.nn.dot_product_attention(
            q,
            k,
            v,
            is_causal=is_causal,
            key_value_seq_lengths=lengths,
            implementation=self.implementation,
        )
        return self.out_proj(attended.reshape(b, t, d))


class Mlp(nnx.Module):
    """Two linear layers around the activation."""

    def __init__(
        self, width: int, hidden: int, out_std: float, act: str, how: Numerics, rngs: nnx.Rngs
    ):
        self.act = ACTIVATIONS[act]
        self.c_fc = Linear(width, hidden, (2 * width) ** -0.5, how, rngs)
        self.c_proj = Linear(hidden, width, out_std, how, rngs)

    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        return self.c_proj(self.act(self.c_fc(x)))


class ResidualBlock(nnx.Module):
    """Attention, then MLP, each with a residual: x + f(norm(x)) or, `post_norm`, norm(x + f(x))."""

    def __init__(
        self,
        cfg: VisionConfig | TextConfig,
        heads: int,
        how: Numerics,
        rngs: nnx.Rngs,
        *,
        post_norm: bool,
    ):
        width, out_std = cfg.width, (2 * cfg.layers * cfg.width) ** -0.5
        self.post_norm = post_norm
        self.ln_1 = how.layer_norm(width, cfg.norm_eps, rngs)
        self.attn = Attention(width, heads, out_std, how, rngs)
        self.ln_2 = how.layer_norm(width, cfg.norm_eps, rngs)
        self.mlp = Mlp(width, int(width * cfg.mlp_ratio), out_std, cfg.act, how, rngs)

    def __call__(
        self, x: Float[Array, "b t d"], *, is_causal: bool, lengths: Int[Array, " b"] | None
    ) -> Float[Array, "b t d"]:
        attend = functools.partial(self.attn, is_causal=is_causal, lengths=lengths)
        if self.post_norm:
            x = self.ln_1(x + attend(x))
            return self.ln_2(x + self.mlp(x))
        x = x + attend(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Transformer(nnx.Module):
    """`cfg.layers` residual blocks whose parameters are stacked on axis 0 and scanned: compile time
    and program size do not grow with depth."""

    def __init__(
        self,
        cfg: VisionConfig | TextConfig,
        heads: int,
        how: Numerics,
        rngs: nnx.Rngs,
        *,
        post_norm: bool = False,
    ):
        @nnx.split_rngs(splits=cfg.layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def make_blocks(rngs: nnx.Rngs) -> ResidualBlock:
            return ResidualBlock(cfg, heads, how, rngs, post_norm=post_norm)

        self.blocks = make_blocks(rngs)
        self.remat, self.dtype = how.remat, how.dtype

    def __call__(
        self,
        x: Float[Array, "b t d"],
        *,
        is_causal: bool,
        lengths: Int[Array, " b"] | None = None,
    ) -> Float[Array, "b t d"]:
        """`lengths`: how many tokens of each row are real; the padding behind is never attended."""
        graphdef, stacked = nnx.split(self.blocks)

        def layer(x, params):
            block = nnx.merge(graphdef, gathered(params, self.dtype))
            return block(rows_split(x), is_causal=is_causal, lengths=lengths), None

        if self.remat != "none" or is_split(jax.sharding.get_abstract_mesh()):
            layer = jax.checkpoint(layer, policy=REMAT_POLICIES[self.remat])
        return jax.lax.scan(layer, x, stacked)[0]
