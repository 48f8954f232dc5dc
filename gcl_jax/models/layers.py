"""Transformer layers in the parametrisation of open_clip: residual blocks, fused qkv."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from gcl_jax import distributed
from gcl_jax.config import ModelConfig, TextConfig, VisionConfig
from gcl_jax.errors import first_line
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

ATTENDED = "attended"  # what XLA's attention returns, by name


def _is_product(primitive, *args, **params) -> bool:
    """Whether it multiplies by a matrix of parameters or is attention: what is dear to compute
    again. Of attention by XLA the result alone counts: its scores, by the square of the length,
    are dear to keep."""
    return (
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *args, **params)
        or jax.checkpoint_policies.save_only_these_names(ATTENDED)(primitive, *args, **params)
        or primitive.name.startswith("dot_product_attention_fwd")  # cuDNN's
    )


REMAT_POLICIES = {
    "none": jax.checkpoint_policies.save_anything_except_these_names(GATHERED),
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": _is_product,
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


def grid_sines(side: int, width: int) -> Float[np.ndarray, "n d"]:
    """Positions of a square of patches, row by row, as in MAE (arXiv 2111.06377) and open_clip: a
    quarter of the channels each are sines and cosines of the column, then of the row."""
    angles = np.arange(side)[:, None] / 10000 ** (np.arange(width // 4) / (width / 4))
    waves = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    columns, rows = np.tile(waves, (side, 1)), np.repeat(waves, side, axis=0)
    return np.concatenate([columns, rows], axis=1).astype(np.float32)


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
    def of(cls, cfg: ModelConfig, platform: str = "cpu") -> "Numerics":
        """What `cfg` asks for, on devices of `platform`: "cpu", "gpu" or "tpu"."""
        by_cudnn = platform == "gpu" and cfg.attention != "xla" and cfg.dtype == "bfloat16"
        return cls(
            jnp.dtype(cfg.dtype),
            jnp.dtype(cfg.param_dtype),
            "cudnn" if by_cudnn and cudnn_is_right() else "xla",
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
        # cuDNN has nothing to gain from a single query.
        attended = attention(
            q,
            k,
            v,
            is_causal=is_causal and read is None,
            lengths=lengths,
            implementation=self.implementation if read is None else "xla",
        )
        return self.out_proj(attended.reshape(b, -1, d))


def attention(
    q: Float[Array, "b r h c"],
    k: Float[Array, "b t h c"],
    v: Float[Array, "b t h c"],
    *,
    is_causal: bool,
    lengths: Int[Array, " b"] | None,
    implementation: Literal["xla", "cudnn"],
) -> Float[Array, "b r h c"]:
    """softmax(q k^T / sqrt(c)) v of each head, over the first `lengths` of the keys, or all.

    cuDNN takes heads of 8, 16, ... 128 channels, others go to XLA, and in training even lengths
    alone (so jax 0.10 to 0.12 say): an odd one gets a token that nobody attends to.
    """
    attend = functools.partial(jax.nn.dot_product_attention, is_causal=is_causal)
    t, channels = k.shape[1], k.shape[3]
    if implementation == "xla" or channels % 8 or channels > 128:
        attended = attend(q, k, v, key_value_seq_lengths=lengths, implementation="xla")
        return checkpoint_name(attended, ATTENDED)
    if odd := t % 2:
        q, k, v = (jnp.pad(x, ((0, 0), (0, odd), (0, 0), (0, 0))) for x in (q, k, v))
        if lengths is None and not is_causal:
            lengths = jnp.full(len(q), t, jnp.int32)
    return attend(q, k, v, key_value_seq_lengths=lengths, implementation="cudnn")[:, :t]


@functools.cache
def cudnn_is_right() -> bool:
    """Whether cuDNN's attention, its gradients too, is XLA's on this machine's GPU, in a small case
    of each mask; says so if not. True where there is none: then a program is only compiled."""
    if jax.default_backend() != "gpu":
        return True

    def summed(qkv, lengths, is_causal, implementation):
        options = {"lengths": lengths, "is_causal": is_causal, "implementation": implementation}
        attended = attention(*qkv, **options)
        return jnp.sum(jnp.sin(attended.astype(jnp.float32))), attended

    @functools.partial(jax.jit, static_argnums=1)
    def computed(qkv, implementation):
        by_qkv = jax.grad(summed, has_aux=True)
        lengths = jnp.array([5, 9])
        cases = (None, False), (lengths, False), (None, True)
        return [by_qkv(qkv, *case, implementation) for case in cases]

    qkv = list(jax.random.normal(jax.random.key(0), (3, 2, 9, 2, 64), jnp.bfloat16))
    try:
        ours, theirs = (jax.device_get(computed(qkv, one)) for one in ("cudnn", "xla"))
        # bfloat16 rounds to 1/256.
        close = functools.partial(np.allclose, rtol=0.05, atol=0.05)
        if all(jax.tree.leaves(jax.tree.map(close, *jax.tree.map(np.float32, (ours, theirs))))):
            return True
        problem = "it differs from XLA's"
    except Exception as error:  # the driver's, the library's, jax's own
        problem = first_line(error)
    distributed.announce(
        f"warning: attention is computed by XLA, cuDNN's cannot be used: {problem}"
    )
    return False


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
