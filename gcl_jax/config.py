"""Typed configuration of a run: every option with its default, meaning, choices and bounds.

A config file has a `get_config()` that returns a `TrainConfig`; every option can be overridden on
the command line, e.g. `--config.optim.lr=3e-4`. `python -m gcl_jax config` prints what stands here.
No jax: a wrong flag is answered before it loads.
"""

import copy
import dataclasses
import functools
import json
import math
import typing
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from gcl_jax import paths, registry
from gcl_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Option:
    """What an option means, and which values it takes. Bounds of a tuple or a dict hold for each of
    its numbers; choices of a dict are its names; `path`: it may name a file or a folder."""

    meaning: str
    choices: Collection[str] = ()
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    path: bool = False

    @property
    def allowed(self) -> str:
        """The choices and the bounds in words; empty if any value of the type will do."""
        choices = "one of " + ", ".join(self.choices) if self.choices else ""
        return "; ".join(filter(None, (choices, self.bounds)))

    @property
    def bounds(self) -> str:
        """Such as "0 or more, below 1"; empty if there are none."""
        if self.at_least is not None and self.at_most is not None:
            return f"from {self.at_least:.12g} to {self.at_most:.12g}"
        ends = [(self.at_least, "{:.12g} or more"), (self.above, "above {:.12g}")]
        ends += [(self.at_most, "at most {:.12g}"), (self.below, "below {:.12g}")]
        return ", ".join(words.format(end) for end, words in ends if end is not None)


def option(default: Any, meaning: str, choices: Collection[str] = (), **bounds: Any) -> Any:
    """A field of a configuration that describes itself; arguments as those of `Option`."""
    made: dict[str, Any] = {"metadata": {"option": Option(meaning, choices, **bounds)}}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: copy.copy(default), **made)
    return dataclasses.field(default=default, **made)


DTYPES = ("float32", "bfloat16")
ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu")


@dataclasses.dataclass(slots=True)
class PreprocessConfig:
    """How images reach the model's size and range, named as in open_clip's `preprocess_cfg`."""

    mean: tuple[float, float, float] = option(
        (0.48145466, 0.4578275, 0.40821073), "subtracted from each channel of pixels in [0, 1]"
    )
    std: tuple[float, float, float] = option(
        (0.26862954, 0.26130258, 0.27577711), "divides each channel after that", above=0
    )
    interpolation: str = option("bicubic", "of resizing", ("bicubic", "bilinear"))
    resize_mode: str = option(
        "shortest",
        "which side becomes the model's image size: the shortest and the rest is cropped, both "
        "(squash), the longest and the rest is filled",
        ("shortest", "squash", "longest"),
    )
    fill_color: int = option(0, "grey value of what is filled", at_least=0, at_most=255)


@dataclasses.dataclass(slots=True)
class VisionConfig:
    """The image tower, named as in open_clip's `vision_cfg`."""

    family: str = option(
        "vit",
        "the kind of tower: a vision transformer, or a small residual network of convolutions "
        "(convnet), which learns more of few pictures in few minutes",
        registry.VISION_TOWERS,
    )
    image_size: int = option(
        224, "width and height of the input in pixels", at_least=1, at_most=2**13
    )
    patch_size: int = option(
        32,
        "width and height of a patch in pixels; of a convnet's last cells, a power of 2",
        at_least=1,
        at_most=2**13,
    )
    width: int = option(768, "channels of a token", at_least=1, at_most=2**16)
    layers: int = option(
        12, "residual blocks; of a convnet, in each of its stages", at_least=1, at_most=2**10
    )
    head_width: int = option(64, "channels of an attention head", at_least=1, at_most=2**16)
    mlp_ratio: float = option(
        4.0, "hidden channels of a block's MLP, in widths", above=0, at_most=64
    )
    act: str = option("gelu", "activation of the MLPs", ACTIVATIONS)
    norm_eps: float = option(1e-5, "added to the variance in layer norms", above=0)
    pool: str = option(
        "tok",
        "what becomes the embedding: the projected class token (tok: CLIP's tower), the projected "
        "mean of the patches (avg), or attention over the patches from a learned query (map: "
        "SigLIP's, its width is the embedding's)",
        ("tok", "avg", "map"),
    )
    pos_embed_type: str = option(
        "learnable",
        "where positions start: drawn by chance, or sines and cosines of row and column "
        "(sin_cos_2d), which optim.freeze=visual.positional_embedding keeps",
        ("learnable", "sin_cos_2d"),
    )
    patch_dropout: float = option(
        0.0, "share of the patches that a training step leaves out", at_least=0, below=1
    )
    options: dict[str, Any] = option({}, "what a tower family of your own takes, by name")


@dataclasses.dataclass(slots=True)
class TextConfig:
    """The text tower of queries and documents, named as in open_clip's `text_cfg`."""

    family: str = option(
        "clip",
        "the kind of tower: pre-norm blocks (clip: CLIP, SigLIP), or post-norm blocks with token "
        "types and masked padding (bert: BERT, RoBERTa, XLM-RoBERTa)",
        registry.TEXT_TOWERS,
    )
    context_length: int = option(
        77, "the most tokens of a text; more are cut off", at_least=3, at_most=2**16
    )
    vocab_size: int = option(49408, "rows of the token table", at_least=1, at_most=2**24)
    width: int = option(512, "channels of a token", at_least=1, at_most=2**16)
    heads: int = option(8, "attention heads", at_least=1, at_most=2**16)
    layers: int = option(12, "residual blocks", at_least=1, at_most=2**10)
    mlp_ratio: float = option(
        4.0, "hidden channels of a block's MLP, in widths", above=0, at_most=64
    )
    act: str = option("gelu", "activation of the MLPs", ACTIVATIONS)
    norm_eps: float = option(1e-5, "added to the variance in layer norms", above=0)
    causal: bool = option(True, "a token attends to itself and the tokens before it alone")
    pool: str = option(
        "argmax",
        "which token becomes the embedding: that of the highest id (argmax: CLIP's end token), the "
        "last, the first, or the mean of all that are not padding",
        ("argmax", "last", "first", "mean"),
    )
    proj: str = option(
        "linear",
        "projection to the embedding (mlp: open_clip's for Hugging Face towers)",
        ("linear", "linear_bias", "mlp", "none"),
    )
    max_positions: int = option(512, "rows of a BERT's position table", at_least=1, at_most=2**20)
    first_position: int = option(0, "the first of them that a text uses", at_least=0, at_most=2**20)
    token_types: int = option(
        2, "rows of a BERT's type table; texts use the first", at_least=1, at_most=2**16
    )
    pad_id: int = option(0, "token id of a BERT's padding", at_least=0, at_most=2**24)
    tokenizer: str = option(
        "clip", "clip, or a folder or hub id with a Hugging Face tokenizer", path=True
    )
    clean: str = option(
        "", "cleaning before the tokenizer, named as in open_clip, or none; empty: the tokenizer's"
    )
    query_prefix: str = option("", "goes before every text of a query ('query: ' for E5)")
    document_prefix: str = option("", "goes before every text of a document ('passage: ' for E5)")
    options: dict[str, Any] = option({}, "what a tower family of your own takes, by name")


@dataclasses.dataclass(slots=True)
class ModelConfig:
    """Two towers into one embedding space; `vision` None is a text-only model."""

    embed_dim: int = option(512, "dimensions of an embedding", at_least=1, at_most=2**16)
    vision: VisionConfig | None = dataclasses.field(default_factory=VisionConfig)
    text: TextConfig = dataclasses.field(default_factory=TextConfig)
    preprocess: PreprocessConfig = dataclasses.field(default_factory=PreprocessConfig)
    init_logit_scale: float = option(math.log(1 / 0.07), "log of the scale that training starts at")
    max_logit_scale: float | None = option(
        None,
        "log of the largest scale; None: of 100, or of the scale that the run starts from, if that "
        "is larger",
    )
    init_logit_bias: float | None = option(
        None, "learned bias of the logits, as SigLIP has it, starts here; none: no bias"
    )
    gates: bool = option(
        False,
        "how much a field counts in a merged embedding is learned, record by record; the weights "
        "of data.query_fields and data.document_fields are where it starts",
    )
    dtype: str = option("float32", "of what the towers compute", DTYPES)
    param_dtype: str = option("float32", "of the parameters", DTYPES)
    attention: str = option(
        "auto",
        "what computes attention: XLA, the fused kernel of NVIDIA GPUs (cudnn, in bfloat16), or "
        "that kernel where it can and XLA elsewhere (auto)",
        ("auto", "xla", "cudnn"),
    )
    remat: str = option(
        "dots",
        "what of a layer the backward pass computes again, to save memory: nothing, all (full), or "
        "all but the matrix products and attention (dots)",
        ("none", "full", "dots"),
    )
    lora_rank: int = option(
        0,
        "above 0, every linear map of the blocks gets a low-rank update, and only these and the "
        "logit scale are trained",
        at_least=0,
        at_most=2**16,
    )
    lora_alpha: float = option(16.0, "the updates are multiplied by lora_alpha / lora_rank")


@dataclasses.dataclass(slots=True)
class DataConfig:
    """Which store to train on, which of its fields to embed, and with which weights."""

    store: str = option(
        "emoji", "folder of a store, or the name of a bundled or registered source", path=True
    )
    stores: dict[str, float] = option(
        {},
        "several stores in place of it, each by its folder or source, and its weight: the share of "
        "the pairs that come from there",
        above=0,
        path=True,
    )
    batch_of: str = option(
        "one_store",
        "of several stores: one gives a whole batch, and then another, so that a pair's negatives "
        "are of its own store; or every batch has rows of all",
        ("one_store", "all_stores"),
    )
    digest: str = option(
        "", "of the store's contents: a run notes it, and then takes no other store; empty: any"
    )
    train_split: str = option("", "split to train on; empty: train, or else the first")
    query_fields: dict[str, float] = option(
        {},
        "weight of each query field in the merged embedding; empty: all of the store, alike",
        at_least=0,
    )
    document_fields: dict[str, float] = option({}, "the same of the documents' fields", at_least=0)
    augmentation: str = option(
        "none", "of images in training: a random crop, and a flip", ("none", "crop", "crop_flip")
    )
    min_crop_area: float = option(0.9, "smallest share of an image in a crop", above=0, at_most=1)
    max_score: float = option(100.0, "the best score that a pair can have", at_least=1)
    num_workers: int = option(
        0, "processes that read data; 0: threads of this one", at_least=0, at_most=2**10
    )
    cached_records: int = option(
        0, "documents, and queries, that stay decoded in memory", at_least=0
    )
    sampler: str = option(
        "uniform",
        "every pair once an epoch in random order, or each row of a batch drawn anew in proportion "
        "to its score",
        ("uniform", "score"),
    )
    unique_queries: bool = option(
        False, "no two rows of a batch have the same query, nor the same text"
    )
    pairs_per_query: int = option(
        1, "pairs of a query that come together in a batch; each still once an epoch", at_least=1
    )
    negatives: str = option(
        "",
        "hard negatives: 'store' (given with the data), a folder that gcl_jax.mine wrote, or "
        "'refresh' (documents that the model itself ranks high, mined anew while it trains)",
        path=True,
    )
    refresh_start: int | None = option(
        None,
        "steps before negatives='refresh' mines for the first time; None: half of all",
        at_least=0,
    )
    refresh_every: int | None = option(
        None, "steps until it mines again; None: half of all", at_least=1
    )
    refresh_batches: int = option(
        3, "of so many batches one has what negatives='refresh' mined", at_least=1
    )
    refresh_margin: float = option(
        0.05,
        "what it mines has a cosine below that of the pair by this share, as gcl_jax.mine's "
        "--relative_margin",
        at_least=0,
        below=1,
    )
    num_negatives: int = option(1, "hard negatives of a pair in a batch", at_least=1, at_most=2**10)
    text_negatives: str = option(
        "none",
        "hard negatives made of a query's words: two swap places, or one is another query's, or an "
        "object, an attribute or a relation is another (English: docs/data.md)",
        ("none", "swap", "replace", "by_kind"),
    )

    @property
    def named(self) -> str:
        """The store, or the stores, as messages name them."""
        return " + ".join(self.stores) or self.store

    @property
    def weights(self) -> dict[str, dict[str, float]]:
        """The fields and their weights by side, "query" and "document"."""
        return {"query": self.query_fields, "document": self.document_fields}


@dataclasses.dataclass(slots=True)
class OptimConfig:
    """How parameters follow gradients, and for how long: as `steps` say, or if that is 0 as many
    `examples`, or if that is 0 too as many `epochs`; if these are None, as the data's size says."""

    lr: float = option(2e-5, "peak learning rate", above=0)
    schedule: str = option(
        "cosine",
        "of the learning rate after the warm-up: falls to 0 at the last step (cosine, linear), "
        "stays (constant), or stays and falls at the end (wsd)",
        registry.SCHEDULES,
    )
    warmup_steps: int | None = option(
        None,
        "steps in which the learning rate rises to it; None: a tenth of all, at most 2000",
        at_least=0,
    )
    decay_fraction: float = option(
        0.2,
        "share of the steps after the warm-up in which the schedule wsd falls",
        at_least=0,
        at_most=1,
    )
    epochs: float | None = option(
        None,
        "times that training visits each pair; None: 5, or as many more as make 1000 steps, but no "
        "more than 50",
        at_least=0,
    )
    examples: int = option(0, "pairs to train on, in place of epochs", at_least=0)
    steps: int = option(0, "steps to train, in place of both", at_least=0)
    batch_size: int = option(
        0,
        "pairs of a step, on all devices together; 0: 256, or of fewer than 2048 pairs (of the "
        "smallest store) the largest power of 2 that leaves an epoch 8 steps, but 32 if there are "
        "as many",
        at_least=0,
        at_most=2**24,
    )
    optimizer: str = option(
        "adamw", "adamw, or another of optax by its name there: lion, muon, adafactor, sgd, ..."
    )
    options: dict[str, Any] = option({}, "what else the optimizer takes, by name (nesterov)")
    weight_decay: float = option(0.02, "of matrices, decoupled", at_least=0)
    betas: tuple[float, float] = option(
        (0.9, 0.98), "decay of the first and second moment", at_least=0, below=1
    )
    eps: float = option(1e-6, "added to the root of the second moment", above=0)
    momentum_dtype: str = option("float32", "of the first moment", DTYPES)
    second_moment: str = option(
        "full",
        "one number a parameter, or means of a matrix's rows and columns (factored: Adafactor's, "
        "arXiv 1804.04235, next to no memory; betas[1] and eps then mean nothing)",
        ("full", "factored"),
    )
    clip_norm: float = option(1.0, "largest global norm of the gradients; 0: any", at_least=0)
    grad_cache_chunks: int = option(
        1,
        "parts in which the towers embed a batch that does not fit into memory, for a second "
        "forward pass (gradient caching)",
        at_least=1,
    )
    freeze: tuple[str, ...] = option(
        (),
        "patterns; a parameter whose dotted path starts with a match is not trained ('visual' is "
        "the image tower, 'text.transformer.blocks.[0-5][.]' six layers of the text tower)",
    )
    lr_multipliers: dict[str, float] = option(
        {},
        "times the learning rate, by patterns as those of freeze ('visual' is the image tower); of "
        "several that match a parameter, their product",
        at_least=0,
    )
    layer_decay: float = option(
        1.0, "times the learning rate for each layer away from the output", above=0, at_most=1
    )
    ema_decay: float = option(
        0.0,
        "above 0, evaluation, search and export use a moving average of the parameters",
        at_least=0,
        below=1,
    )


class ObjectivesConfig(dict[str, float]):
    """The weight of each objective in the loss: gcl has 1, the others 0, unless they are named."""

    def __init__(self, weights: Any = (), **named: float):
        super().__init__({"gcl": 1.0} | dict(weights, **named))

    def __getattr__(self, name: str) -> float:
        if name not in registry.OBJECTIVES:
            raise AttributeError(name)
        return self.get(name, 0.0)

    def __setattr__(self, name: str, weight: float) -> None:
        self[name] = weight


@dataclasses.dataclass(slots=True)
class ListNetConfig:
    """The objective listnet."""

    temperature: float = option(
        0.0,
        "targets in proportion to exp(weight / temperature); 0: to the weight itself",
        at_least=0,
    )


@dataclasses.dataclass(slots=True)
class ListMLEConfig:
    """The objective listmle."""

    levels: int = option(
        10,
        "loss weights in (0, 1] are cut into so many; documents of one level tie",
        at_least=1,
        at_most=100,
    )


@dataclasses.dataclass(slots=True)
class RinceConfig:
    """The objective rince."""

    levels: int = option(4, "loss weights in (0, 1] are cut into so many", at_least=1, at_most=100)
    spread: float = option(
        2.0, "temperature at the lowest level, in units of the model's own at the best", at_least=1
    )


@dataclasses.dataclass(slots=True)
class CircleConfig:
    """The objective circle."""

    levels: int = option(
        2,
        "loss weights in (0, 1] are cut into so many, whose cosines are to be evenly apart: "
        "1/levels at the lowest, 1 at the best, 0 of negatives",
        at_least=1,
        at_most=100,
    )
    margin: float = option(
        0.4,
        "how far from these a cosine may be without a loss, in steps from level to level",
        at_least=0,
        below=1,
    )
    scale: float = option(80.0, "of the cosines, in place of the learned scale", above=0)


@dataclasses.dataclass(slots=True)
class LambdaLossConfig:
    """The objective lambdaloss."""

    mu: float = option(
        10.0, "weight of NDCG-Loss2's part beside LambdaRank's; 0: LambdaRank", at_least=0
    )


@dataclasses.dataclass(slots=True)
class DistillConfig:
    """The objective distill."""

    loss: str = option(
        "kl",
        "what compares the scores of teacher and student: KL divergence of their softmax, or mean "
        "squared error of their differences",
        ("kl", "margin_mse"),
    )
    temperature: float = option(1.0, "divides the teacher's scores", above=0)


@dataclasses.dataclass(slots=True)
class OneToKConfig:
    """The objective one_to_k."""

    text_to_text: float = option(
        0.0,
        "weight of a contrast among the texts, beside that with the documents; the authors' code "
        "has none",
        at_least=0,
    )


@dataclasses.dataclass(slots=True)
class HardNegativesConfig:
    """The objective hard_negatives."""

    rank: float = option(0.2, "weight of the cross-modal rank term beside the contrast", at_least=0)
    intra: float = option(0.2, "weight of the intra-modal term", at_least=0)
    max_margin: float = option(10.0, "largest margin of the rank term, in logits", at_least=0)
    hardness: float = option(
        0.0,
        "of the contrast, a negative of cosine c counts exp(hardness * c) times (LLaVE); 0: once",
        at_least=0,
    )


@dataclasses.dataclass(slots=True)
class MixedConfig:
    """The objective mixed."""

    temperature: float = option(0.2, "of its softmax; it is not learned", above=0)
    beta: float = option(0.5, "mixing coefficients are drawn from Beta(beta, beta)", above=0)
    simplex: int = option(
        0,
        "so many neighbouring pairs are mixed instead, by numbers from [0, 1) over their sum, as "
        "the authors mix layers of a graph; 0: two, by beta",
        at_least=0,
        at_most=64,
    )


@dataclasses.dataclass(slots=True)
class UnimodalConfig:
    """The objective unimodal."""

    fields: tuple[str, ...] = option(
        ("image",), "image and text fields that a step sees twice, the second time changed"
    )
    temperature: float = option(0.1, "of its softmax; it is not learned", above=0)
    min_crop_area: float = option(
        0.3, "smallest share of an image that its second view shows", above=0, at_most=1
    )
    color: float = option(
        0.4,
        "brightness, contrast and saturation of a second view differ by up to this share; mirrored "
        "it is if data.augmentation mirrors, too",
        at_least=0,
        at_most=1,
    )
    token_cutoff: float = option(
        0.15, "share of a text's tokens that its second view lacks", at_least=0, below=1
    )


@dataclasses.dataclass(slots=True)
class LossConfig:
    """What is learned from the global batch: a weighted sum of objectives (docs/objectives.md), by
    default the score-weighted contrastive loss alone (arXiv 2404.08535)."""

    objectives: ObjectivesConfig = option(
        ObjectivesConfig(),
        "weight of each objective, by name; 0 leaves it out",
        registry.OBJECTIVES,
        at_least=0,
    )
    score_to_weight: str = option(
        "inverse",
        "from a pair's score to its loss weight",
        ("constant", "linear", "inverse", "inverse_sqrt", "log", "sqrt", "piecewise"),
    )
    thresholds: tuple[float, ...] = option((), "of scores, for score_to_weight='piecewise'")
    values: tuple[float, ...] = option((), "weights below, between and above the thresholds")
    targets: str = option(
        "known",
        "what attracts: every query and document of the batch that the training split has a score "
        "for (known), or each row's own pair (diagonal: the paper's)",
        ("known", "diagonal"),
    )
    weight_norm: str = option(
        "none",
        "divides the weights by their mean or their sum over the batch",
        ("none", "mean", "sum"),
    )
    merged: float = option(1.0, "weight of the term of merged embeddings", at_least=0)
    field_pairs: float = option(
        1.0, "weight that the terms of single fields share, a query's by a document's", at_least=0
    )
    pair_weights: dict[str, float] = option(
        {}, "weight of one such term, by its name QUERY_FIELD:DOCUMENT_FIELD", at_least=0
    )
    side_pairs: float = option(
        0.0,
        "weight that the terms of two fields of one side share, such as a document's image by its "
        "title",
        at_least=0,
    )
    mask_duplicates: bool = option(
        False, "another pair of the same query or document is no negative"
    )
    form: str = option(
        "auto",
        "how documents reach all queries: copied to every device, handed from device to device, or "
        "copied while the copies are small (docs/loss.md)",
        ("auto", "gather", "ring"),
    )
    dtype: str = option(
        "auto",
        "of embeddings in products, by default what the towers compute; logits and sums are float32"
        " always",
        ("auto", *DTYPES),
    )
    kernel: str = option(
        "xla",
        "what adds up a tile of logits: XLA, or two kernels of our own for GPUs, by Triton, which "
        "have not run on one yet and are compared with XLA before they are used",
        ("xla", "triton"),
    )
    matryoshka_dims: tuple[int, ...] = option(
        (), "the loss is the mean over these leading dimensions of the embeddings", at_least=1
    )
    list_size: int = option(
        32,
        "the most documents of a query in a batch, the best of them, that roar, lambdaloss and "
        "distill compare with each other",
        at_least=2,
        at_most=1024,
    )
    distill_from: str = option(
        "",
        "folder that gcl_jax.embed --side=both wrote for another run, the teacher of distill: the "
        "cosines of its embeddings are the scores; empty: the store's teacher scores",
        path=True,
    )
    listnet: ListNetConfig = dataclasses.field(default_factory=ListNetConfig)
    listmle: ListMLEConfig = dataclasses.field(default_factory=ListMLEConfig)
    rince: RinceConfig = dataclasses.field(default_factory=RinceConfig)
    circle: CircleConfig = dataclasses.field(default_factory=CircleConfig)
    lambdaloss: LambdaLossConfig = dataclasses.field(default_factory=LambdaLossConfig)
    distill: DistillConfig = dataclasses.field(default_factory=DistillConfig)
    one_to_k: OneToKConfig = dataclasses.field(default_factory=OneToKConfig)
    hard_negatives: HardNegativesConfig = dataclasses.field(default_factory=HardNegativesConfig)
    mixed: MixedConfig = dataclasses.field(default_factory=MixedConfig)
    unimodal: UnimodalConfig = dataclasses.field(default_factory=UnimodalConfig)
    options: dict[str, Any] = option({}, "what an objective of your own takes, by name")

    @property
    def viewed(self) -> tuple[str, ...]:
        """The fields that a training step embeds twice."""
        return self.unimodal.fields if self.objectives.get("unimodal") else ()


@dataclasses.dataclass(slots=True)
class MeshConfig:
    """Devices along the mesh axes; the batch is split over all of them."""

    data: int = option(
        -1,
        "devices of a slice that hold the same parameters; -1: all that fsdp leaves",
        at_least=-1,
    )
    fsdp: int = option(1, "devices of a slice among which the parameters are split", at_least=1)
    slices: int = option(
        0,
        "slices, between which the data-centre network lies; 0: as many as the devices are of",
        at_least=0,
    )


@dataclasses.dataclass(slots=True)
class EvalConfig:
    """Ranked evaluation, in training and by `gcl_jax.evaluate`."""

    splits: tuple[str, ...] = option((), "splits to evaluate; empty: all of the store")
    query_fields: tuple[str, ...] = option(
        (),
        "query fields that are evaluated each alone, too; others than those trained on may be "
        "named. Empty: those of data.query_fields",
    )
    ground_truth: str = option(
        "test",
        "the judgements that came with the data, or, where there are none, sampled from the pairs",
        ("test", "dev", "sampled"),
    )
    every: int | None = option(
        None,
        "steps between evaluations in training; 0: none; None: about ten in a run, if there is a "
        "split val, validation or dev to evaluate that is not trained on, else none",
        at_least=0,
    )
    patience: int = option(
        0,
        "training ends after so many evaluations in a row without a larger checkpoint.best; 0: "
        "never early",
        at_least=0,
    )
    max_queries: int = option(2000, "the most queries that are sampled", at_least=1)
    max_queries_in_training: int = option(500, "the same, in training", at_least=1)
    top_k: int = option(1000, "documents that are ranked for a query", at_least=1, at_most=2**20)
    batch_size: int = option(256, "records that are embedded at once", at_least=1, at_most=2**20)
    embed_dim: int = option(
        0, "leading dimensions of the embeddings to use, in search too; 0: all", at_least=0
    )


@dataclasses.dataclass(slots=True)
class CheckpointConfig:
    """Which checkpoints a run writes and keeps; there is always one of the end."""

    every: int | None = option(
        None,
        "steps between checkpoints; None: 200, or what divides eval.every where checkpoints are "
        "compared",
        at_least=1,
    )
    keep: int = option(3, "newest checkpoints that stay", at_least=1)
    keep_every: int = option(0, "those of every so many steps stay, too; 0: none", at_least=0)
    best: str | None = option(
        None,
        "a metric of the evaluation in training, such as in_domain/NDCG@10; empty: none; None: "
        "NDCG@10 of the split val, validation or dev, if it is evaluated",
    )
    keep_best: int = option(1, "checkpoints with the largest of it that stay", at_least=1)


@dataclasses.dataclass(slots=True)
class NonFiniteConfig:
    """What to do about steps whose loss or gradients are not finite: they change nothing, and are
    counted."""

    patience: int = option(
        10, "so many in a row, and the run goes back to its newest checkpoint", at_least=1
    )
    rollbacks: int = option(2, "times that it goes back before it gives up", at_least=0)
    spike: float = option(
        8.0,
        "a loss so many standard deviations above its running mean is reported; 0: never",
        at_least=0,
    )


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
    nonfinite: NonFiniteConfig = dataclasses.field(default_factory=NonFiniteConfig)
    init_from: str = option(
        "",
        "what a new run starts from: pretrained weights (a file, a Hugging Face or open_clip "
        "folder, a hub id), or the workdir of another run, or WORKDIR@STEP",
        path=True,
    )
    seed: int = option(0, "of parameters, data order and augmentation", at_least=0)
    log_every: int = option(10, "steps between lines of metrics", at_least=1)
    wandb: str = option("", "project of Weights & Biases to log to; empty: none")
    hang_seconds: int = option(
        1800,
        "a process that ends neither a step nor an evaluation for so long ends itself; 0: never",
        at_least=0,
    )
    extensions: tuple[str, ...] = option(
        (), "modules, or paths of Python files, that register what this run uses", path=True
    )


# Keys that had another name before version 0.2, still understood everywhere.
RENAMED = {"sick": "nonfinite", "optim.chunks": "optim.grad_cache_chunks"}


def _renamed(old: str) -> property:
    new = RENAMED[old].rpartition(".")[2]
    return property(
        lambda self: getattr(self, new),
        lambda self, value: setattr(self, new, value),
        doc=f"The name of `{new}` before version 0.2.",
    )


TrainConfig.sick = _renamed("sick")  # type: ignore[attr-defined]
OptimConfig.chunks = _renamed("optim.chunks")  # type: ignore[attr-defined]


class Described(NamedTuple):
    """An option with its dotted `key`, the `type` of its values and its `default`."""

    key: str
    type: Any
    default: Any
    option: Option


def nested(hint: Any) -> type | None:
    """The configuration class that the type `hint` of a field names, if it does."""
    found = [x for x in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(x)]
    return typing.cast(type, found[0]) if found else None


def described(kind: type = TrainConfig, prefix: str = "") -> Iterator[Described]:
    """All options of a configuration class, in its order, nested ones too."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        key, inner = f"{prefix}{field.name}", nested(hints[field.name])
        if inner is not None:
            yield from described(inner, f"{key}.")
        else:
            made = field.default_factory
            default = field.default if made is dataclasses.MISSING else made()
            yield Described(key, hints[field.name], default, field.metadata["option"])


def value(cfg: Any, key: str) -> Any:
    """The option of `cfg` with the dotted `key`; None where it, or a part of it, is None."""
    return functools.reduce(lambda part, name: getattr(part, name, None), key.split("."), cfg)


def choices(key: str) -> tuple[str, ...]:
    """What an option may be, by its dotted key."""
    return tuple(next(one.option.choices for one in described() if one.key == key))


def from_dict(kind: type, values: Any, key: str = "") -> Any:
    """Builds the dataclass `kind` from nested dicts (`dataclasses.asdict` undone).

    Raises:
        ConfigError: a key that `kind` does not have.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"config{key} must hold the keys of {kind.__name__}, not {values!r}")
    hints = typing.get_type_hints(kind)
    old = {f".{name}": new.rpartition(".")[2] for name, new in RENAMED.items()}
    values = {old.get(f"{key}.{name}", name): value for name, value in values.items()}
    if unknown := sorted(set(values) - set(hints)):
        raise ConfigError(f"{kind.__name__} has no key {', '.join(unknown)}")
    made = {}
    for name, value in values.items():
        inner, args = nested(hints[name]), typing.get_args(hints[name])
        if inner is not None and (value is not None or type(None) not in args):
            value = from_dict(inner, value, f"{key}.{name}")
        elif hints[name] is ObjectivesConfig and isinstance(value, dict):
            value = ObjectivesConfig(value)
        elif typing.get_origin(hints[name]) is tuple and isinstance(value, list):
            value = tuple(value)
        made[name] = value
    return kind(**made)


def save(cfg: TrainConfig, path: Path) -> None:
    """Writes `cfg` as JSON; the file is complete or as it was."""
    paths.write_json(path, dataclasses.asdict(cfg))


def load(path: Path) -> TrainConfig:
    """Reads what `save` wrote, and imports the run's extensions.

    Raises:
        ConfigError: it is missing or malformed, or an extension cannot be imported.
    """
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{path} not found: is this the --workdir of a training run?") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from None
    try:
        return of_values(values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def of_values(values: dict) -> TrainConfig:
    """What `save` has written, read from JSON; imports the run's extensions.

    Raises:
        ConfigError: the values are malformed, or an extension cannot be imported.
    """
    cfg = from_dict(TrainConfig, values)
    registry.load_extensions(cfg.extensions)
    return cfg
