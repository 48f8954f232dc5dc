"""Transformer layers in the parametrisation of open_clip: pre-LN residual blocks, fused qkv."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

Activation = Callable[[jax.Array], jax.Array]


def quick_gelu(x: jax.Array) -> jax.Array:
    """x * sigmoid(1.702 x), the activation of OpenAI's CLIP weights."""
    return x * jax.nn.sigmoid(1.702 * x)


gelu: Activation = functools.partial(jax.nn.gelu, approximate=False)


def normal(std: float) -> nnx.initializers.Initializer:
    return nnx.initializers.normal(std)


class Attention(nnx.Module):
    """Multi-head self-attention with one fused projection to queries, keys and values."""

    def __init__(self, width: int, heads: int, out_std: float, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.heads = heads
        self.in_proj = nnx.Linear(
            width, 3 * width, kernel_init=normal(width**-0.5), dtype=dtype, rngs=rngs
        )
        self.out_proj = nnx.Linear(
            width, width, kernel_init=normal(out_std), dtype=dtype, rngs=rngs
        )

    def __call__(self, x: Float[Array, "b t d"], *, is_causal: bool) -> Float[Array, "b t d"]:
        b, t, d = x.shape
        q, k, v = jnp.split(self.in_proj(x).reshape(b, t, 3 * self.heads, -1), 3, axis=2)
        attended = jax.nn.dot_product_attention(q, k, v, is_causal=is_causal)
        return self.out_proj(attended.reshape(b, t, d))


class Mlp(nnx.Module):
    """Two linear layers around the activation."""

    def __init__(
        self, width: int, hidden: int, out_std: float, act: Activation, *, dtype, rngs: nnx.Rngs
    ):
        self.act = act
        self.c_fc = nnx.Linear(
            width, hidden, kernel_init=normal((2 * width) ** -0.5), dtype=dtype, rngs=rngs
        )
        self.c_proj = nnx.Linear(hidden, width, kernel_init=normal(out_std), dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        return self.c_proj(self.act(self.c_fc(x)))


class ResidualBlock(nnx.Module):
    """x + attention(ln_1(x)), then x + mlp(ln_2(x))."""

    def __init__(
        self,
        width: int,
        heads: int,
        layers: int,
        mlp_ratio: float,
        act: Activation,
        *,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        out_std = (2 * layers * width) ** -0.5
        self.ln_1 = nnx.LayerNorm(width, epsilon=1e-5, dtype=dtype, rngs=rngs)
        self.attn = Attention(width, heads, out_std, dtype=dtype, rngs=rngs)
        self.ln_2 = nnx.LayerNorm(width, epsilon=1e-5, dtype=dtype, rngs=rngs)
        self.mlp = Mlp(width, int(width * mlp_ratio), out_std, act, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b t d"], *, is_causal: bool) -> Float[Array, "b t d"]:
        x = x + self.attn(self.ln_1(x), is_causal=is_causal)
        return x + self.mlp(self.ln_2(x))


class Transformer(nnx.Module):
    """`layers` residual blocks whose parameters are stacked on axis 0 and scanned: compile time and
    program size do not grow with depth."""

    def __init__(
        self,
        width: int,
        heads: int,
        layers: int,
        mlp_ratio: float,
        act: Activation,
        *,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        @nnx.split_rngs(splits=layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def make_blocks(rngs: nnx.Rngs) -> ResidualBlock:
            return ResidualBlock(width, heads, layers, mlp_ratio, act, dtype=dtype, rngs=rngs)

        self.blocks = make_blocks(rngs)

    def __call__(self, x: Float[Array, "b t d"], *, is_causal: bool) -> Float[Array, "b t d"]:
        graphdef, stacked = nnx.split(self.blocks)

        def layer(x, params):
            return nnx.merge(graphdef, params)(x, is_causal=is_causal), None

        return jax.lax.scan(layer, x, stacked)[0]
