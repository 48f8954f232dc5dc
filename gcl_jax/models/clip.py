"""The two-tower model: fields of either kind into one embedding space."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt8

from gcl_jax.config import ModelConfig
from gcl_jax.models.layers import Numerics
from gcl_jax.registry import TEXT_TOWERS, VISION_TOWERS
from gcl_jax.sharding import Params, param_shardings, platform

LORA = ("lora_a", "lora_b")
AnyArray = Array | np.ndarray
Fields = Mapping[str, AnyArray]


def normalize(x: Float[Array, "... e"]) -> Float[Array, "... e"]:
    """Rows of length 1, in float32; a zero row stays zero, with finite gradients."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))


def truncated(
    embeddings: Mapping[str, jax.Array], dim: int, gated: bool = False
) -> dict[str, jax.Array]:
    """The first `dim` numbers of every field's embeddings, at length 1 again; if `gated`, at the
    length of the whole, which says how much the field counts."""
    cut = {field: normalize(x[..., :dim]) for field, x in embeddings.items()}
    if not gated:
        return cut
    lengths = {
        field: jnp.sum(x * normalize(x), axis=-1, keepdims=True) for field, x in embeddings.items()
    }
    return {field: x * lengths[field] for field, x in cut.items()}


class CLIP(nnx.Module):
    """An image tower (none in a text-only model), a text tower shared by queries and documents, a
    learned temperature and, if configured, SigLIP's learned bias of the logits."""

    def __init__(self, cfg: ModelConfig, numerics: Numerics | None = None, *, rngs: nnx.Rngs):
        numerics, vision, text = numerics or Numerics.of(cfg), cfg.vision, cfg.text
        build = VISION_TOWERS[vision.family].build if vision else lambda *_: None
        self.visual = build(vision, cfg.embed_dim, numerics, rngs)
        self.text = TEXT_TOWERS[text.family].build(text, cfg.embed_dim, numerics, rngs)
        self.logit_scale = nnx.Param(jnp.float32(cfg.init_logit_scale))
        if cfg.init_logit_bias is not None:
            self.logit_bias = nnx.Param(jnp.float32(cfg.init_logit_bias))
        kinds = ("image", "text") if vision else ("text",)
        gates = nnx.Dict({kind: Gate(cfg.embed_dim) for kind in kinds})
        self.gates = gates if cfg.gates else None
        self.mean, self.std = tuple(cfg.preprocess.mean), tuple(cfg.preprocess.std)

    def encode_image(
        self, pixels: UInt8[AnyArray, "b h w 3"], key: PRNGKeyArray | None = None
    ) -> Float[Array, "b e"]:
        """Pixels (0 to 255) to float32 embeddings of length 1; `key` turns patch dropout on."""
        return self._encoded(pixels, key, tokens=False)[0]

    def encode_text(self, tokens: Int[AnyArray, "b t"]) -> Float[Array, "b e"]:
        """Token ids to float32 embeddings of length 1."""
        return self._encoded(tokens, None, tokens=False)[0]

    def encode_fields(
        self, fields: Fields, key: PRNGKeyArray | None = None
    ) -> dict[str, Float[Array, "b e"]]:
        """Each field through its tower: rank 4 is pixels, rank 2 is token ids. `key`: see
        `encode_image`; every field draws its own patches. With gates, a row is as long as its field
        counts in `merge_fields`, else of length 1."""
        return self._encode_fields(fields, key, tokens=False)[0]

    def encode_tokens(
        self, fields: Fields, key: PRNGKeyArray | None = None
    ) -> tuple[dict[str, Float[Array, "b e"]], dict[str, Float[Array, "b t e"]]]:
        """`encode_fields`, and of each field float32 embeddings of its tokens (of an image, of its
        patches or cells), of length 1, and 0 for padding."""
        return self._encode_fields(fields, key, tokens=True)

    def _encode_fields(self, fields: Fields, key: PRNGKeyArray | None, tokens: bool):
        embeddings, of_tokens = {}, {}
        for i, (name, x) in enumerate(fields.items()):
            own = None if key is None else jax.random.fold_in(key, i)
            embedding, of_tokens[name] = self._encoded(x, own, tokens)
            kind = "image" if x.ndim == 4 else "text"
            embeddings[name] = embedding if self.gates is None else self.gates[kind](embedding)
        return embeddings, of_tokens

    def _encoded(self, x: AnyArray, key: PRNGKeyArray | None, tokens: bool):
        """(embeddings, those of the tokens or None), of length 1, of pixels or of token ids."""
        tower: Any = self.text
        inputs: tuple[Any, ...] = (jnp.asarray(x),)
        if x.ndim == 4:
            assert self.visual is not None, "a text-only model has no image tower"
            images = jnp.asarray(x).astype(jnp.float32) / 255
            images = (images - jnp.array(self.mean)) / jnp.array(self.std)
            tower, inputs = self.visual, (images, key)
        if not tokens:
            return normalize(tower(*inputs)), None
        return tuple(map(normalize, tower.with_tokens(*inputs)))


class Gate(nnx.Module):
    """How much an embedding x of length 1 counts among the fields of its record: it leaves at the
    length exp(x . direction + bias), which is 1 at the start.

    A merged embedding is then a sum weighted by a softmax over the fields that the record has: a
    blurred photograph can give way to its title, and a title that says nothing to its photograph.
    """

    def __init__(self, embed_dim: int):
        self.direction = nnx.Param(jnp.zeros(embed_dim))
        self.bias = nnx.Param(jnp.zeros(()))

    def __call__(self, x: Float[Array, "b e"]) -> Float[Array, "b e"]:
        return x * jnp.exp(x @ self.direction[...] + self.bias[...])[:, None]


def merge_fields(
    embeddings: Mapping[str, Float[Array, "*b e"]],
    present: Mapping[str, Bool[Array, "*b"]],
    weights: Mapping[str, float],
) -> Float[Array, "*b e"]:
    """normalize(sum_a alpha_a * embedding_a); a missing field has weight 0 (method: Loss 2).

    The other weights need no rescaling to sum 1: the normalisation removes their common factor.
    """
    weighted = [weights[a] * present[a][..., None] * x for a, x in embeddings.items()]
    return normalize(functools.reduce(jnp.add, weighted))


@dataclasses.dataclass(frozen=True)
class _Blueprint:
    """What a model is built from. Two are equal if they are written alike: `cfg` may change."""

    numerics: Numerics
    towers: tuple[Any, ...]
    written: str
    cfg: ModelConfig = dataclasses.field(compare=False)


def abstract_model(cfg: ModelConfig, mesh: Mesh | None = None) -> tuple[nnx.GraphDef, Params]:
    """(graphdef, params as ShapeDtypeStructs): the model without any array, as it computes on the
    devices of `mesh`, or on CPUs."""
    numerics = Numerics.of(cfg, platform(mesh) if mesh else "cpu")
    towers = (cfg.vision and VISION_TOWERS[cfg.vision.family], TEXT_TOWERS[cfg.text.family])
    graphdef, params = _abstract_model(_Blueprint(numerics, towers, repr(cfg), cfg))
    return graphdef, jax.tree.map(lambda x: x, params)


@functools.lru_cache(maxsize=32)
def _abstract_model(of: _Blueprint) -> tuple[nnx.GraphDef, Params]:
    """Once for each: a start asks for it half a dozen times, at a third of a second each."""
    model = nnx.eval_shape(lambda: CLIP(of.cfg, of.numerics, rngs=nnx.Rngs(0)))
    graphdef, params = nnx.split(model, nnx.Param)
    return graphdef, nnx.to_pure_dict(params)


def init_params(cfg: ModelConfig, key: jax.Array) -> Params:
    """Freshly drawn parameters."""
    return nnx.to_pure_dict(nnx.state(CLIP(cfg, rngs=nnx.Rngs(key)), nnx.Param))


def merge(graphdef: nnx.GraphDef, params: Params) -> CLIP:
    """The model that `params` make."""
    return nnx.merge(graphdef, nnx.State(jax.tree.map(nnx.Param, params)))


def merge_lora(params: Params, cfg: ModelConfig) -> Params:
    """The parameters of the same model without low-rank updates (`lora_rank` = 0): each kernel plus
    lora_a @ lora_b * `cfg.lora_alpha` / `cfg.lora_rank`, added in float32."""
    flat = traverse_util.flatten_dict(params, sep=".")
    merged = {path: x for path, x in flat.items() if not path.endswith(LORA)}
    for path in [path.removesuffix("lora_a") for path in flat if path.endswith("lora_a")]:
        kernel, a, b = (np.asarray(flat[path + name]) for name in ("kernel", *LORA))
        update = a.astype(np.float32) @ b.astype(np.float32) * (cfg.lora_alpha / cfg.lora_rank)
        merged[path + "kernel"] = (kernel + update).astype(kernel.dtype)
    return traverse_util.unflatten_dict(merged, sep=".")


def abstract_params(cfg: ModelConfig, mesh: Mesh) -> Params:
    """The parameters as ShapeDtypeStructs with shardings."""
    _, params = abstract_model(cfg)
    return with_shardings(params, param_shardings(params, mesh))


def with_shardings(shapes, shardings):
    """ShapeDtypeStructs that say where they live."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        shardings,
    )
