"""Typed configuration of a run: what may be set, and its defaults.

A config file has a `get_config()` that returns a `TrainConfig`; every leaf can be overridden on the
command line, e.g. `--config.optim.lr=3e-4`. No jax here: a wrong flag is answered before it loads.
"""

import dataclasses
import json
import math
import typing
from pathlib import Path
from typing import Any

from gcl_jax.errors import ConfigError
from gcl_jax.loss_config import LossConfig


@dataclasses.dataclass(slots=True)
class PreprocessConfig:
    """How images reach the model's size and range, named as in open_clip's `preprocess_cfg`."""

    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"
    fill_color: int = 0


@dataclasses.dataclass(slots=True)
class VisionConfig:
    """Image tower, named as in open_clip's `vision_cfg`.

    `family`: "vit" is the pre-LN vision transformer that the other keys describe; another one is
    registered in `gcl_jax.registry.VISION_TOWERS`, and what it needs besides stands in `options`.
    `pool`: "tok" is CLIP's tower (class token, ln_pre, projection of the class token); "map" is
    SigLIP's (patches alone, pooled by attention from a learned query, no projection, so `width` is
    the embedding's). `patch_dropout` is the share of patches left out of a training step.
    """

    family: str = "vit"
    image_size: int = 224
    patch_size: int = 32
    width: int = 768
    layers: int = 12
    head_width: int = 64
    mlp_ratio: float = 4.0
    act: str = "gelu"
    norm_eps: float = 1e-5
    pool: str = "tok"
    patch_dropout: float = 0.0
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(slots=True)
class TextConfig:
    """Text tower, named as in open_clip's `text_cfg`.

    `family`: "clip" has pre-LN blocks (CLIP, SigLIP), "bert" post-LN blocks, token types and masked
    padding (BERT, XLM-RoBERTa); another one is registered in `gcl_jax.registry.TEXT_TOWERS`, and
    what it needs besides stands in `options`. `pool`: "argmax" is the token of the highest id,
    CLIP's end token; "last", "first" and "mean" what they say, the mean over real tokens. `proj` to
    the embedding: "linear", "linear_bias", "mlp" (open_clip's for Hugging Face towers) or "none".
    BERT family alone: `max_positions` rows of the position table, of which a text uses those from
    `first_position` on; `token_types` rows of the type table, of which it uses the first; `pad_id`.
    The prefixes go before every text of a side ("query: " and "passage: " for E5).
    """

    family: str = "clip"
    context_length: int = 77
    vocab_size: int = 49408
    width: int = 512
    heads: int = 8
    layers: int = 12
    mlp_ratio: float = 4.0
    act: str = "gelu"
    norm_eps: float = 1e-5
    causal: bool = True
    pool: str = "argmax"
    proj: str = "linear"
    max_positions: int = 512
    first_position: int = 0
    token_types: int = 2
    pad_id: int = 0
    tokenizer: str = "clip"
    clean: str = ""
    query_prefix: str = ""
    document_prefix: str = ""
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(slots=True)
class ModelConfig:
    """Two towers into one embedding space of `embed_dim`; `vision` None is a text-only model.

    Compute is in `dtype`, parameters in `param_dtype`. `attention` is the implementation of
    `jax.nn.dot_product_attention`. `remat` saves memory by recomputing each layer in the backward
    pass: "full" all of it, "dots" all but its matrix products. `lora_rank` above 0 adds low-rank
    updates (times `lora_alpha` / rank) to every linear map of the blocks and trains nothing else
    but the temperature.
    """

    embed_dim: int = 512
    vision: VisionConfig | None = dataclasses.field(default_factory=VisionConfig)
    text: TextConfig = dataclasses.field(default_factory=TextConfig)
    preprocess: PreprocessConfig = dataclasses.field(default_factory=PreprocessConfig)
    init_logit_scale: float = math.log(1 / 0.07)
    max_logit_scale: float = math.log(100.0)
    init_logit_bias: float | None = None
    dtype: str = "float32"
    param_dtype: str = "float32"
    attention: str = "xla"
    remat: str = "none"
    lora_rank: int = 0
    lora_alpha: float = 16.0


@dataclasses.dataclass(slots=True)
class DataConfig:
    """Which store to train on, which fields to embed, and with which weights.

    `query_fields` and `document_fields` map a field of the store to its weight in the merged
    embedding (alpha and beta of the method); a field that is not named is not used. Left empty,
    they name all fields of the store with equal weights, and `train_split` its first split.
    `cached_records` documents (and queries) stay decoded in memory, before augmentation.
    `sampler`: "uniform" visits every pair once an epoch in random order; "score" draws every row of
    a batch anew, in proportion to the pair's score, and an epoch is as many draws as there are
    pairs. `unique_queries` lets no two rows of a batch have the same query: "uniform" leaves out
    what then has no place (others each epoch), "score" does not draw a query again.
    `pairs_per_query` above 1 brings that many pairs of a query together in a batch, which gives
    `loss.targets="known"` more than chance meetings; every epoch still visits each pair once.
    `negatives`: where hard negatives of the pairs lie, "store" (given with the data) or a folder
    that `gcl_jax.mine` wrote; a batch takes `num_negatives` a pair. `text_negatives` makes them of
    the query's words: "swap" has two change places, "replace" takes one from another query.
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
    sampler: str = "uniform"
    unique_queries: bool = False
    pairs_per_query: int = 1
    negatives: str = ""
    num_negatives: int = 1
    text_negatives: str = "none"


@dataclasses.dataclass(slots=True)
class OptimConfig:
    """Optimizer and schedule of the learning rate, as long as `steps` say, or if that is 0 as many
    `examples` (pairs), or if that is 0 too as many `epochs`.

    `schedule`: after a linear warm-up of `warmup_steps` to `lr`, "cosine" and "linear" fall to 0 at
    the last step, "constant" stays, and "wsd" stays until the last `decay_fraction` of the steps,
    in which it falls linearly to 0. `optimizer`: "adamw", or another of optax by its name there
    ("lion", "muon", "adafactor", "lamb", "sgd", ...); it takes those of `betas`, `eps` and
    `momentum_dtype` that it knows, and from `options` whatever else, such as {"nesterov": True}.

    `freeze`: regular expressions; a parameter whose dotted path one of them matches from its start
    is not trained ("visual" is the image tower, "text.transformer.blocks.[0-5][.]" the text
    tower's first six layers). `layer_decay` below 1 multiplies the learning rate once more with
    every layer away from a tower's output. `ema_decay` above 0 keeps an exponential moving average
    of the parameters, which evaluation, search and export then use.
    Two ways to need less memory: `momentum_dtype="bfloat16"`, 2 instead of 4 bytes a parameter, and
    `second_moment="factored"`, Adafactor's (arXiv 1804.04235), which keeps the means of rows and
    columns of a matrix, so next to nothing; it does without `betas[1]` and `eps`.
    The towers embed a batch in `chunks` parts, one after the other: batches that do not fit into
    memory, for the price of a second forward pass.
    """

    lr: float = 2e-5
    schedule: str = "cosine"
    warmup_steps: int = 100
    decay_fraction: float = 0.2
    epochs: float = 5.0
    examples: int = 0
    steps: int = 0
    batch_size: int = 256
    optimizer: str = "adamw"
    options: dict = dataclasses.field(default_factory=dict)
    weight_decay: float = 0.02
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    momentum_dtype: str = "float32"
    second_moment: str = "full"
    clip_norm: float = 1.0
    chunks: int = 1
    freeze: tuple[str, ...] = ()
    layer_decay: float = 1.0
    ema_decay: float = 0.0


@dataclasses.dataclass(slots=True)
class MeshConfig:
    """Devices along the axes ("data", "fsdp"); -1 takes all that the other axis leaves."""

    data: int = -1
    fsdp: int = 1


@dataclasses.dataclass(slots=True)
class EvalConfig:
    """Ranked evaluation: `every` counts steps during training (0: only `gcl_jax.evaluate`); no
    `splits` means all that the store has. `query_fields` are evaluated each alone, too: by default
    those of `data.query_fields`; others of the store, such as languages that training leaves out,
    may be named. `embed_dim` above 0 cuts the embeddings to that many leading dimensions, here and
    in search (see `loss.matryoshka_dims`). `ground_truth`: "test" or "dev" are the judgements that
    came with the data, used whole; of a split without "test", and with "sampled", `max_queries` are
    sampled from its pairs."""

    splits: tuple[str, ...] = ()
    query_fields: tuple[str, ...] = ()
    ground_truth: str = "test"
    every: int = 0
    max_queries: int = 2000
    max_queries_in_training: int = 500
    top_k: int = 1000
    batch_size: int = 256
    embed_dim: int = 0


@dataclasses.dataclass(slots=True)
class CheckpointConfig:
    """A checkpoint every `every` steps, and at the end. The last `keep` stay, and those of every
    `keep_every`-th step (0: none), and the `keep_best` with the largest `best`: a metric of the
    evaluation during training, such as "in_domain/NDCG@10" (empty: none)."""

    every: int = 200
    keep: int = 3
    keep_every: int = 0
    best: str = ""
    keep_best: int = 1


@dataclasses.dataclass(slots=True)
class SickConfig:
    """A step whose loss or gradients are not finite is skipped and counted. After `patience` of
    them in a row the run goes back to its newest checkpoint, and on with the data that follow, at
    most `rollbacks` times; then it stops. A loss more than `spike` standard deviations above its
    running mean is reported (0: never)."""

    patience: int = 10
    rollbacks: int = 2
    spike: float = 8.0


@dataclasses.dataclass(slots=True)
class TrainConfig:
    """One run, whole. A run without a checkpoint of its own starts from `init_from`: pretrained
    weights (a file, a Hugging Face or open_clip folder, a hub id) or the workdir of another run.

    Metrics are logged every `log_every` steps, also to Weights & Biases if `wandb` names a project.
    A process that ends neither a step nor an evaluation within `hang_seconds` is stuck: it ends
    itself (0: never).
    """

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    sick: SickConfig = dataclasses.field(default_factory=SickConfig)
    init_from: str = ""
    seed: int = 0
    log_every: int = 10
    wandb: str = ""
    hang_seconds: int = 1800


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
        options = typing.get_args(hints[name])
        nested = [hint for hint in (hints[name], *options) if dataclasses.is_dataclass(hint)]
        if isinstance(value, dict):
            for part in nested:
                value = from_dict(typing.cast(type, part), value)
        elif typing.get_origin(hints[name]) is tuple:
            value = tuple(value)
        made[name] = value
    return kind(**made)


def save(cfg: TrainConfig, path: Path) -> None:
    """Writes `cfg` as JSON; the file is complete or as it was."""
    unfinished = path.with_name(f"{path.name}.incomplete")
    unfinished.write_text(json.dumps(dataclasses.asdict(cfg), indent=2) + "\n")
    unfinished.replace(path)


def load(path: Path) -> TrainConfig:
    """Reads what `save` wrote. Raises `ConfigError` if it is missing or malformed."""
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{path} not found: is this the --workdir of a training run?") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from None
    return from_dict(TrainConfig, values)
