"""Towers as a user may write them, in a module of their own: see `test_families`."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from gcl_jax.config import TextConfig, VisionConfig
from gcl_jax.errors import ConfigError
from gcl_jax.models.families import TextTower, VisionTower
from gcl_jax.models.layers import Numerics
from gcl_jax.registry import TEXT_TOWERS, VISION_TOWERS
from gcl_jax.sharding import looked_up


@VISION_TOWERS.register("pixels")
class Pixels(VisionTower, nnx.Module):
    """Two linear maps of all pixels."""

    embedding_names = ("first",)

    def __init__(self, cfg: VisionConfig, embed_dim: int, numerics: Numerics, rngs: nnx.Rngs):
        hidden = cfg.options["hidden"]
        self.first = numerics.param(0.02, (3 * cfg.image_size**2, hidden), rngs)
        self.second = numerics.param(0.1, (hidden, embed_dim), rngs)

    def __call__(
        self, images: Float[Array, "b h w 3"], key: PRNGKeyArray | None = None
    ) -> Float[Array, "b e"]:
        return jax.nn.relu(images.reshape(len(images), -1) @ self.first[...]) @ self.second[...]

    @staticmethod
    def validate(cfg: VisionConfig, embed_dim: int) -> None:
        if "hidden" not in cfg.options:
            raise ConfigError("config.model.vision.options must say how many channels are hidden")

    @staticmethod
    def flops(cfg: VisionConfig, embed_dim: int, training: bool) -> float:
        return 2.0 * cfg.options["hidden"] * (3 * cfg.image_size**2 + embed_dim)


@TEXT_TOWERS.register("bag")
class BagOfTokens(TextTower, nnx.Module):
    """The projected mean of the embeddings of tokens."""

    embedding_names = token_tables = ("words",)

    def __init__(self, cfg: TextConfig, embed_dim: int, numerics: Numerics, rngs: nnx.Rngs):
        self.dtype = numerics.dtype
        self.words = numerics.param(0.1, (cfg.vocab_size, cfg.width), rngs)
        self.proj = numerics.param(0.1, (cfg.width, embed_dim), rngs)

    def __call__(self, tokens: Int[Array, "b t"]) -> Float[Array, "b e"]:
        words = looked_up(self.words[...], tokens, self.dtype)
        real = (tokens != 0)[:, :, None]
        return jnp.sum(words * real, axis=1) / jnp.sum(real, axis=1) @ self.proj[...]

    @staticmethod
    def flops(cfg: TextConfig, embed_dim: int, tokens: int) -> float:
        return 2.0 * cfg.width * (tokens + embed_dim)

    @staticmethod
    def pad_id(cfg: TextConfig) -> int | None:
        return 0

    @staticmethod
    def ignores_padding(cfg: TextConfig) -> bool:
        return True
