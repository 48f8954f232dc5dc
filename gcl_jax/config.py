"""Typed configuration of a run: what may be set, its defaults, its validation.

A config file has a `get_config()` that returns a `TrainConfig`; every leaf can be overridden on the
command line, e.g. `--config.optim.lr=3e-4`. No jax here: a wrong flag is answered before it loads.
"""

import dataclasses
import functools
import json
import math
import typing
from pathlib import Path

from gcl_jax.errors import ConfigError
from gcl_jax.score_weights import score_to_weight

TARGETS = ("diagonal", "known")
FORMS = ("auto", "gather", "ring")
WEIGHT_NORMS = ("none", "mean", "sum")
AUGMENTATIONS = ("none", "crop", "crop_flip")


@dataclasses.dataclass(slots=True)
class VisionConfig:
    """Pre-LN vision transformer, named as in open_clip's `vision_cfg`."""

    image_size: int = 224
    patch_size: int = 32
    width: int = 768
    layers: int = 12
    head_width: int = 64
    mlp_ratio: float = 4.0


@dataclasses.dataclass(slots=True)
class TextConfig:
    """Causal text transformer pooled at the end token, named as in open_clip's `text_cfg`."""

    context_length: int = 77
    vocab_size: int = 49408
    width: int = 512
    heads: int = 8
    layers: int = 12
    mlp_ratio: float = 4.0
    tokenizer: str = "clip"


@dataclasses.dataclass(slots=True)
class ModelConfig:
    """Two towers into one embedding space of `embed_dim`."""

    embed_dim: int = 512
    vision: VisionConfig = dataclasses.field(default_factory=VisionConfig)
    text: TextConfig = dataclasses.field(default_factory=TextConfig)
    quick_gelu: bool = False
    init_logit_scale: float = math.log(1 / 0.07)
    max_logit_scale: float = math.log(100.0)
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    dtype: str = "float32"


@dataclasses.dataclass(slots=True)
class DataConfig:
    """Which store to train on, which fields to embed, and with which weights.

    `query_fields` and `document_fields` map a field of the store to its weight in the merged
    embedding (alpha and beta of the method); a field that is not named is not used. Left empty,
    they name all fields of the store with equal weights, and `train_split` its first split.
    `cached_records` documents (and queries) stay decoded in memory, at their stored size.
    """

    store: str = "emoji"
    train_split: str = ""
    query_fields: dict[str, float] = dataclasses.field(default_factory=dict)
    document_fields: dict[str, float] = dataclasses.field(default_factory=dict)
    augmentation: str = "none"
    min_crop_area: float = 0.9
    max_score: float = 100.0
    num_workers: int = 0
    cached_records: int = 0


@dataclasses.dataclass(slots=True)
class LossConfig:
    """Score-weighted contrastive loss over the global batch (method: Loss 1 to 5).

    `form`: how documents reach all queries, see docs/loss.md.
    `targets`: "diagonal" is the paper's, each row's own pair; "known" also attracts every other
    (query, document) of the batch that the training split has a score for.
    """

    score_to_weight: str = "inverse"
    thresholds: tuple[float, ...] = ()
    values: tuple[float, ...] = ()
    targets: str = "diagonal"
    weight_norm: str = "none"
    merged: float = 1.0
    field_pairs: float = 1.0
    pair_weights: dict[str, float] = dataclasses.field(default_factory=dict)
    mask_duplicates: bool = False
    form: str = "auto"


@dataclasses.dataclass(slots=True)
class OptimConfig:
    """AdamW with linear warm-up and cosine decay; `steps` wins over `epochs` when it is set.

    The towers embed a batch in `chunks` parts, one after the other: batches that do not fit into
    memory, for the price of a second forward pass.
    """

    lr: float = 2e-5
    warmup_steps: int = 100
    epochs: float = 5.0
    steps: int = 0
    batch_size: int = 256
    weight_decay: float = 0.02
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    clip_norm: float = 1.0
    chunks: int = 1


@dataclasses.dataclass(slots=True)
class MeshConfig:
    """Devices along the axes ("data", "fsdp"); -1 takes all that the other axis leaves."""

    data: int = -1
    fsdp: int = 1


@dataclasses.dataclass(slots=True)
class EvalConfig:
    """Ranked evaluation: `every` counts steps during training (0: only `gcl_jax.evaluate`); no
    `splits` means all that the store has."""

    splits: tuple[str, ...] = ()
    every: int = 0
    max_queries: int = 2000
    max_queries_in_training: int = 500
    top_k: int = 1000
    batch_size: int = 256


@dataclasses.dataclass(slots=True)
class CheckpointConfig:
    """A checkpoint every `every` steps, and at the end; the last `keep` stay."""

    every: int = 200
    keep: int = 3


@dataclasses.dataclass(slots=True)
class TrainConfig:
    """One run, whole."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    seed: int = 0
    log_every: int = 10


PRESETS: dict[str, ModelConfig] = {
    "ViT-B-32": ModelConfig(512, VisionConfig(224, 32, 768, 12), TextConfig()),
    "ViT-B-32-quickgelu": ModelConfig(
        512, VisionConfig(224, 32, 768, 12), TextConfig(), quick_gelu=True
    ),
    "ViT-B-16": ModelConfig(512, VisionConfig(224, 16, 768, 12), TextConfig()),
    "ViT-L-14": ModelConfig(768, VisionConfig(224, 14, 1024, 24), TextConfig(width=768, heads=12)),
}


def preset(name: str) -> ModelConfig:
    """The model under open_clip's `name`, as a copy that may be changed. Raises `ConfigError`."""
    if name not in PRESETS:
        raise ConfigError(f"model preset {name!r} is unknown; choose one of {', '.join(PRESETS)}")
    return from_dict(ModelConfig, dataclasses.asdict(PRESETS[name]))


def validate(cfg: TrainConfig) -> None:
    """Raises `ConfigError`, one line that names the key, when `cfg` cannot work."""

    def require(condition: bool, message: str) -> None:
        if not condition:
            raise ConfigError(f"config.{message}")

    model, data, loss, optim = cfg.model, cfg.data, cfg.loss, cfg.optim
    vision, text = model.vision, model.text
    positive = {
        "model": ("embed_dim",),
        "model.vision": ("image_size", "patch_size", "width", "layers", "head_width"),
        "model.text": ("vocab_size", "width", "heads", "layers"),
        "mesh": ("fsdp",),
        "optim": ("chunks",),
        "eval": ("max_queries", "max_queries_in_training", "top_k", "batch_size"),
        "checkpoint": ("every", "keep"),
    }
    for path, names in positive.items():
        holder = functools.reduce(getattr, path.split("."), cfg)
        for name in names:
            value = getattr(holder, name)
            require(value >= 1, f"{path}.{name}={value} must be 1 or more")
    for path, name in (
        ("data", "num_workers"),
        ("data", "cached_records"),
        ("eval", "every"),
        ("optim", "steps"),
        ("optim", "warmup_steps"),
        ("optim", "clip_norm"),
    ):
        value = getattr(getattr(cfg, path), name)
        require(value >= 0, f"{path}.{name}={value} must be 0 or more")
    require(
        vision.image_size % vision.patch_size == 0,
        f"model.vision.image_size={vision.image_size} is no multiple of "
        f"patch_size={vision.patch_size}",
    )
    require(
        vision.width % vision.head_width == 0,
        f"model.vision.width={vision.width} is no multiple of head_width={vision.head_width}",
    )
    require(
        text.width % text.heads == 0,
        f"model.text.width={text.width} is no multiple of heads={text.heads}",
    )
    require(
        text.tokenizer == "clip",
        f"model.text.tokenizer={text.tokenizer!r} must be 'clip': the text tower reads the end "
        "token of CLIP's vocabulary",
    )
    require(text.context_length >= 3, "model.text.context_length must be 3 or more")
    require(
        model.dtype in ("float32", "bfloat16"),
        f"model.dtype={model.dtype!r} must be 'float32' or 'bfloat16'",
    )
    for side in ("query_fields", "document_fields"):
        weights = getattr(data, side)
        for field, weight in weights.items():
            require(
                math.isfinite(weight) and weight >= 0,
                f"data.{side}[{field!r}]={weight} must be a weight of 0 or more",
            )
        require(not weights or sum(weights.values()) > 0, f"data.{side}: all weights are 0")
    require(
        data.augmentation in AUGMENTATIONS,
        f"data.augmentation={data.augmentation!r} must be one of {AUGMENTATIONS}",
    )
    require(0 < data.min_crop_area <= 1, "data.min_crop_area must lie in (0, 1]")
    try:
        score_to_weight(loss.score_to_weight, data.max_score, loss.thresholds, loss.values)
    except ConfigError as error:
        raise ConfigError(f"config.loss.score_to_weight: {error}") from None
    require(loss.targets in TARGETS, f"loss.targets={loss.targets!r} must be one of {TARGETS}")
    require(loss.form in FORMS, f"loss.form={loss.form!r} must be one of {FORMS}")
    require(
        loss.targets == "diagonal" or loss.weight_norm == "none",
        f"loss.weight_norm={loss.weight_norm!r} has no effect with targets='known', which divide "
        "by the sum of the weights; leave it at 'none'",
    )
    require(
        loss.weight_norm in WEIGHT_NORMS,
        f"loss.weight_norm={loss.weight_norm!r} must be one of {WEIGHT_NORMS}",
    )
    require(optim.batch_size >= 2, "optim.batch_size must be 2 or more: one pair has no negatives")
    require(optim.lr > 0, f"optim.lr={optim.lr} must be above 0")
    require(optim.steps > 0 or optim.epochs > 0, "optim: set epochs or steps above 0")
    require(cfg.mesh.data == -1 or cfg.mesh.data >= 1, "mesh.data must be -1 or 1 or more")
    require(cfg.log_every >= 1, "log_every must be 1 or more")


def from_dict(kind: type, values: dict):
    """Builds the dataclass `kind` from nested dicts (`dataclasses.asdict` undone).

    Raises:
        ConfigError: a key that `kind` does not have.
    """
    hints = typing.get_type_hints(kind)
    if unknown := sorted(set(values) - set(hints)):
        raise ConfigError(f"{kind.__name__} has no key {', '.join(unknown)}")
    made = {}
    for name, value in values.items():
        if dataclasses.is_dataclass(hints[name]):
            value = from_dict(hints[name], value)
        elif typing.get_origin(hints[name]) is tuple:
            value = tuple(value)
        made[name] = value
    return kind(**made)


def save(cfg: TrainConfig, path: Path) -> None:
    """Writes `cfg` as JSON."""
    path.write_text(json.dumps(dataclasses.asdict(cfg), indent=2) + "\n")


def load(path: Path) -> TrainConfig:
    """Reads what `save` wrote. Raises `ConfigError` if it is missing or malformed."""
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{path} not found: is this the --workdir of a training run?") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from None
    return from_dict(TrainConfig, values)
