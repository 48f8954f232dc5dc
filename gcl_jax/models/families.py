"""The families of towers: what the rest must know of each, without jax.

A tower of your own is one class, in a module that the config file imports:

    @gcl_jax.VISION_TOWERS.register("mine")
    class Mine(VisionTower, nnx.Module):
        embedding_names = ("patches",)

        def __init__(self, cfg: VisionConfig, embed_dim: int, numerics: Numerics, rngs: nnx.Rngs):
            ...

        def __call__(self, images, key=None):  # float (b, h, w, 3), normalised -> (b, embed_dim)
            ...

and `config.model.vision.family` names it; of a text tower (`TEXT_TOWERS`, `TextTower`), which maps
int32 token ids (b, t) to (b, embed_dim), `config.model.text.family`. What it takes beside the
options that are there stands in `options` of the same. Layers that are stacked on axis 0 and
scanned (`layers.Transformer`) are called "blocks": they are layers to `optim.layer_decay`.

Here are the families that come with gcl_jax; their modules lie in `gcl_jax.models.towers`.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from gcl_jax.config import ModelConfig, TextConfig, TrainConfig, VisionConfig
from gcl_jax.errors import require
from gcl_jax.registry import TEXT_TOWERS, VISION_TOWERS


class _Tower:
    """What both kinds declare.

    embedding_names: of its parameters and modules, those that compute what enters the first block;
        the bottom layer to `optim.layer_decay`.
    gives_tokens: whether it has a method `with_tokens`, which takes what `__call__` does and
        returns, beside the embeddings, those of its tokens (b, t, embed_dim), 0 for padding; the
        objective filip and search by tokens need it.
    """

    embedding_names: ClassVar[tuple[str, ...]] = ()
    gives_tokens: ClassVar[bool] = False

    @classmethod
    def build(cls, *args: Any) -> Any:
        """The nnx module; arguments are those of `__init__` in the example above."""
        return cls(*args)


class _BuiltIn(_Tower):
    """One whose module is the class `tower` of `gcl_jax.models.towers`, which needs jax."""

    tower: ClassVar[str]
    gives_tokens = True

    @classmethod
    def build(cls, *args: Any) -> Any:
        from gcl_jax.models import towers

        return getattr(towers, cls.tower)(*args)


def require_tokens(cfg: ModelConfig, what: str) -> None:
    """Raises `ConfigError` if a tower gives no embeddings of tokens, which `what` needs."""
    for kind, families in (("vision", VISION_TOWERS), ("text", TEXT_TOWERS)):
        tower = getattr(cfg, kind)
        require(
            tower is None or families[tower.family].gives_tokens,
            f"model.{kind}.family={tower and tower.family}: {what} needs embeddings of "
            "tokens, which this tower does not give (its class has no gives_tokens = True)",
        )


def untrained_towers(cfg: TrainConfig, kinds: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """{"image" or "text": a line} for a tower of `cfg` that stays as random as it began: it embeds
    none of the fields, whose `kinds` are by side, and has no weights to start from."""
    fields = {(x, kinds[side][x]) for side, named in cfg.data.weights.items() for x in named}
    towers = {"text"} if cfg.model.vision is None else {"text", "image"}
    shown = ", ".join(f"{name} ({kind})" for name, kind in sorted(fields))
    return {
        tower: f"the {tower} tower learns nothing from the fields {shown}: train with a field of "
        "its kind (config.data.document_fields), or from pretrained weights (config.init_from)"
        for tower in towers - {kind for _, kind in fields}
        if fields and not cfg.init_from
    }


class VisionTower(_Tower):
    """A family of image towers."""

    @staticmethod
    def validate(cfg: VisionConfig, embed_dim: int) -> None:
        """Raises `ConfigError`, one line that names the key, if `cfg` cannot work."""

    @staticmethod
    def flops(cfg: VisionConfig, embed_dim: int, training: bool) -> float:
        """Of the forward pass of one image, with patches left out if `training`; by default 0:
        utilisation and plans do without this tower."""
        return 0.0


class TextTower(_Tower):
    """A family of text towers.

    token_tables: of its parameters, those that are read by `sharding.looked_up`, which splits their
        columns over "fsdp". Others are gathered whole.
    """

    token_tables: ClassVar[tuple[str, ...]] = ()

    @staticmethod
    def validate(cfg: TextConfig, embed_dim: int) -> None:
        """Raises `ConfigError`, one line that names the key, if `cfg` cannot work."""

    @staticmethod
    def flops(cfg: TextConfig, embed_dim: int, tokens: int) -> float:
        """Of the forward pass of one text of so many tokens; by default 0, as for images."""
        return 0.0

    @staticmethod
    def pad_id(cfg: TextConfig) -> int | None:
        """The token id that it takes for padding; None, the default, if it can do with any."""
        return None

    @staticmethod
    def ignores_padding(cfg: TextConfig) -> bool:
        """Whether embeddings do not depend on the padding behind a text; then batches are cut to
        the longest text of the data. By default they are not."""
        return False


@VISION_TOWERS.register("vit")
class Vit(_BuiltIn, VisionTower):
    """CLIP's and SigLIP's."""

    tower = "VisionTransformer"
    embedding_names = (
        "patch_embedding",
        "patch_bias",
        "class_embedding",
        "positional_embedding",
        "ln_pre",
    )

    @staticmethod
    def validate(cfg: VisionConfig, embed_dim: int) -> None:
        require(
            cfg.patch_size <= cfg.image_size,
            f"model.vision.patch_size={cfg.patch_size} is larger than the image",
        )
        require(
            cfg.width % cfg.head_width == 0,
            f"model.vision.width={cfg.width} is no multiple of head_width={cfg.head_width}",
        )
        require(
            cfg.pool != "map" or cfg.width == embed_dim,
            f"model.vision.width={cfg.width} must be embed_dim={embed_dim}: with pool='map' there "
            "is no projection",
        )
        require(
            cfg.pos_embed_type == "learnable" or cfg.width % 4 == 0,
            f"model.vision.width={cfg.width} must be a multiple of 4 for pos_embed_type="
            "'sin_cos_2d'",
        )

    @staticmethod
    def flops(cfg: VisionConfig, embed_dim: int, training: bool) -> float:
        width, patches = cfg.width, (cfg.image_size // cfg.patch_size) ** 2
        embedding = 2 * patches * 3 * cfg.patch_size**2 * width
        kept = max(1, int(patches * (1 - cfg.patch_dropout))) if training else patches
        tokens = kept + (cfg.pool != "map")
        if cfg.pool != "map":
            blocks = _blocks_flops(cfg, tokens, reads_one=cfg.pool == "tok")
            return embedding + blocks + 2 * width * embed_dim
        pooling = _block_flops(cfg, tokens, queries=1)
        return embedding + _blocks_flops(cfg, tokens, reads_one=False) + pooling


@VISION_TOWERS.register("convnet")
class Convnet(_BuiltIn, VisionTower):
    """Residual convolutions, for few pictures and few minutes."""

    tower = "ConvNet"
    embedding_names = ("stem",)

    @staticmethod
    def validate(cfg: VisionConfig, embed_dim: int) -> None:
        patch = cfg.patch_size
        require(
            patch >= 2 and patch & (patch - 1) == 0 and cfg.image_size % patch == 0,
            f"model.vision.patch_size={patch} must be a power of 2 that divides "
            f"image_size={cfg.image_size}: a convnet halves the image so often",
        )
        require(
            cfg.width % (patch // 2) == 0,
            f"model.vision.width={cfg.width} must be a multiple of patch_size / 2 = {patch // 2}: "
            "a convnet halves its channels with every stage before the last",
        )
        require(
            not cfg.patch_dropout,
            f"model.vision.patch_dropout={cfg.patch_dropout:g} leaves out patches, which a convnet "
            "does not have: set it to 0",
        )

    @staticmethod
    def flops(cfg: VisionConfig, embed_dim: int, training: bool) -> float:
        cells, channels = (cfg.image_size // 2) ** 2, 2 * cfg.width // cfg.patch_size
        total = 2.0 * 9 * 3 * channels * cells
        while channels < cfg.width:
            cells, channels = cells // 4, 2 * channels
            kernels = 9 * channels**2 * (2 * cfg.layers - 0.5) + channels**2 / 2
            total += 2 * kernels * cells
        return total + 2 * cfg.width * embed_dim


class _BuiltInText(_BuiltIn, TextTower):
    """What the two families of text transformers share."""

    token_tables = ("token_embedding",)

    @staticmethod
    def validate(cfg: TextConfig, embed_dim: int) -> None:
        require(
            cfg.width % cfg.heads == 0,
            f"model.text.width={cfg.width} is no multiple of heads={cfg.heads}",
        )
        require(
            cfg.proj != "none" or cfg.width == embed_dim,
            f"model.text.proj='none' needs width={cfg.width} to be embed_dim={embed_dim}",
        )

    @staticmethod
    def flops(cfg: TextConfig, embed_dim: int, tokens: int) -> float:
        blocks = _blocks_flops(cfg, tokens, reads_one=cfg.pool != "mean")
        if cfg.proj == "none":
            return blocks
        if cfg.proj == "mlp":
            return blocks + 2 * (cfg.width + embed_dim) * ((cfg.width + embed_dim) // 2)
        return blocks + 2 * cfg.width * embed_dim


@TEXT_TOWERS.register("clip")
class ClipText(_BuiltInText):
    """CLIP's and SigLIP's."""

    tower = "TextTransformer"
    embedding_names = ("token_embedding", "positional_embedding")

    @staticmethod
    def validate(cfg: TextConfig, embed_dim: int) -> None:
        _BuiltInText.validate(cfg, embed_dim)
        require(
            cfg.pool != "argmax" or cfg.tokenizer == "clip",
            f"model.text.tokenizer={cfg.tokenizer!r} must be 'clip': pool='argmax' reads the end "
            "token of CLIP's vocabulary",
        )
        require(
            cfg.pool in ("argmax", "last"),
            f"model.text.pool={cfg.pool!r} must be 'argmax' or 'last' for family='clip'",
        )

    @staticmethod
    def ignores_padding(cfg: TextConfig) -> bool:
        """CLIP's causal tower reads the end token; SigLIP's attends to its padding."""
        return cfg.causal and cfg.pool == "argmax"


@TEXT_TOWERS.register("bert")
class BertText(_BuiltInText):
    """BERT, RoBERTa and XLM-RoBERTa, which mask their padding."""

    tower = "Bert"
    embedding_names = (
        "token_embedding",
        "token_type_embedding",
        "positional_embedding",
        "ln_embedding",
    )

    @staticmethod
    def validate(cfg: TextConfig, embed_dim: int) -> None:
        _BuiltInText.validate(cfg, embed_dim)
        require(
            cfg.tokenizer != "clip",
            "model.text.tokenizer must name the folder or hub id of the BERT's own tokenizer",
        )
        require(
            cfg.pool in ("mean", "first"),
            f"model.text.pool={cfg.pool!r} must be 'mean' or 'first' for family='bert'",
        )
        longest = cfg.max_positions - cfg.first_position
        require(
            cfg.context_length <= longest,
            f"model.text.context_length={cfg.context_length} is more than the {longest} positions "
            "of this BERT",
        )

    @staticmethod
    def pad_id(cfg: TextConfig) -> int | None:
        return cfg.pad_id

    @staticmethod
    def ignores_padding(cfg: TextConfig) -> bool:
        return True


def _blocks_flops(cfg: VisionConfig | TextConfig, tokens: int, *, reads_one: bool) -> float:
    """Of all blocks; the last has one query if the tower reads one token alone."""
    last = _block_flops(cfg, tokens, queries=1 if reads_one else tokens)
    return (cfg.layers - 1) * _block_flops(cfg, tokens, queries=tokens) + last


def _block_flops(cfg: VisionConfig | TextConfig, tokens: int, queries: int) -> float:
    """Keys and values of all tokens; the other two square projections, the MLP's two, attention's
    scores and weighted sums of the queries."""
    width = cfg.width
    of_query = 2 * width**2 + 2 * width * int(width * cfg.mlp_ratio) + 2 * tokens * width
    return 2 * (2 * tokens * width**2 + queries * of_query)
