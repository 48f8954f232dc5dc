"""Checks a configuration before anything is built; an error is one line that names the key."""

import dataclasses
import functools
import math
import re

from gcl_jax.config import TrainConfig
from gcl_jax.data.score_weights import score_to_weight
from gcl_jax.errors import ConfigError

CHOICES = {
    "model.dtype": ("float32", "bfloat16"),
    "model.param_dtype": ("float32", "bfloat16"),
    "model.attention": ("xla", "cudnn"),
    "model.remat": ("none", "full", "dots"),
    "model.preprocess.interpolation": ("bicubic", "bilinear"),
    "model.preprocess.resize_mode": ("shortest", "squash", "longest"),
    "model.vision.act": ("gelu", "gelu_tanh", "quick_gelu"),
    "model.vision.pool": ("tok", "map"),
    "model.text.act": ("gelu", "gelu_tanh", "quick_gelu"),
    "model.text.family": ("clip", "bert"),
    "model.text.pool": ("argmax", "last", "first", "mean"),
    "model.text.proj": ("linear", "linear_bias", "mlp", "none"),
    "data.augmentation": ("none", "crop", "crop_flip"),
    "data.text_negatives": ("none", "swap", "replace"),
    "data.sampler": ("uniform", "score"),
    "optim.momentum_dtype": ("float32", "bfloat16"),
    "optim.second_moment": ("full", "factored"),
    "loss.targets": ("diagonal", "known"),
    "loss.weight_norm": ("none", "mean", "sum"),
    "loss.dtype": ("float32", "bfloat16"),
    "loss.form": ("auto", "gather", "ring"),
    "eval.ground_truth": ("test", "dev", "sampled"),
}
AT_LEAST_ONE = {
    "model": ("embed_dim",),
    "model.vision": ("image_size", "patch_size", "width", "layers", "head_width"),
    "model.text": ("vocab_size", "width", "heads", "layers"),
    "data": ("pairs_per_query", "num_negatives"),
    "optim": ("chunks",),
    "loss.listmle": ("levels",),
    "loss.rince": ("levels",),
    "mesh": ("fsdp",),
    "eval": ("max_queries", "max_queries_in_training", "top_k", "batch_size"),
    "checkpoint": ("every", "keep", "keep_best"),
    "sick": ("patience",),
}
AT_LEAST_ZERO = {
    "model": ("lora_rank",),
    "data": ("num_workers", "cached_records"),
    "eval": ("every", "embed_dim"),
    "checkpoint": ("keep_every",),
    "loss.listnet": ("temperature",),
    "loss.one_to_k": ("text_to_text",),
    "loss.hard_negatives": ("rank", "intra", "max_margin"),
    "optim": ("steps", "examples", "warmup_steps", "clip_norm"),
    "sick": ("rollbacks", "spike"),
}


def require(condition: bool, message: str) -> None:
    """Raises `ConfigError` with `message`, which starts with the key, unless `condition` holds."""
    if not condition:
        raise ConfigError(f"config.{message}")


def validate(cfg: TrainConfig) -> None:
    """Raises `ConfigError`, one line that names the key, when `cfg` cannot work."""
    for path, choices in CHOICES.items():
        if _exists(cfg, path):
            value = _get(cfg, path)
            require(value in choices, f"{path}={value!r} must be one of {choices}")
    for least, table in ((1, AT_LEAST_ONE), (0, AT_LEAST_ZERO)):
        for path, names in table.items():
            for name in names if _exists(cfg, f"{path}.{names[0]}") else ():
                value = _get(cfg, f"{path}.{name}")
                require(value >= least, f"{path}.{name}={value} must be {least} or more")
    _validate_model(cfg)
    _validate_data(cfg)
    _validate_loss(cfg)
    _validate_optim(cfg)
    _validate_checkpoint(cfg)
    require(cfg.mesh.data == -1 or cfg.mesh.data >= 1, "mesh.data must be -1 or 1 or more")
    require(cfg.log_every >= 1, "log_every must be 1 or more")
    require(cfg.hang_seconds >= 0, "hang_seconds must be 0 or more")
    require(
        cfg.eval.embed_dim <= cfg.model.embed_dim,
        f"eval.embed_dim={cfg.eval.embed_dim} is more than model.embed_dim={cfg.model.embed_dim}",
    )


def _get(cfg: TrainConfig, path: str):
    return functools.reduce(getattr, path.split("."), cfg)


def _exists(cfg: TrainConfig, path: str) -> bool:
    """False for the keys of a tower that the model does not have."""
    return cfg.model.vision is not None or not path.startswith("model.vision")


def _validate_model(cfg: TrainConfig) -> None:
    model, vision, text = cfg.model, cfg.model.vision, cfg.model.text
    if vision is not None:
        require(
            vision.patch_size <= vision.image_size,
            f"model.vision.patch_size={vision.patch_size} is larger than the image",
        )
        require(
            vision.width % vision.head_width == 0,
            f"model.vision.width={vision.width} is no multiple of head_width={vision.head_width}",
        )
        require(
            vision.pool == "tok" or vision.width == model.embed_dim,
            f"model.vision.width={vision.width} must be embed_dim={model.embed_dim}: with "
            "pool='map' there is no projection",
        )
        require(
            0 <= vision.patch_dropout < 1,
            f"model.vision.patch_dropout={vision.patch_dropout} must lie in [0, 1)",
        )
    require(
        text.width % text.heads == 0,
        f"model.text.width={text.width} is no multiple of heads={text.heads}",
    )
    require(
        text.proj != "none" or text.width == model.embed_dim,
        f"model.text.proj='none' needs width={text.width} to be embed_dim={model.embed_dim}",
    )
    fill = model.preprocess.fill_color
    require(0 <= fill <= 255, f"model.preprocess.fill_color={fill} must lie in 0..255")
    require(text.context_length >= 3, "model.text.context_length must be 3 or more")
    if text.family == "bert":
        require(
            text.tokenizer != "clip",
            "model.text.tokenizer must name the folder or hub id of the BERT's own tokenizer",
        )
        require(
            text.pool in ("mean", "first"),
            f"model.text.pool={text.pool!r} must be 'mean' or 'first' for family='bert'",
        )
        longest = text.max_positions - text.first_position
        require(
            text.context_length <= longest,
            f"model.text.context_length={text.context_length} is more than the {longest} positions "
            "of this BERT",
        )
    else:
        require(
            text.pool != "argmax" or text.tokenizer == "clip",
            f"model.text.tokenizer={text.tokenizer!r} must be 'clip': pool='argmax' reads the end "
            "token of CLIP's vocabulary",
        )
        require(
            text.pool in ("argmax", "last"),
            f"model.text.pool={text.pool!r} must be 'argmax' or 'last' for family='clip'",
        )
    require(
        model.attention == "xla" or model.dtype == "bfloat16",
        "model.attention='cudnn' needs model.dtype='bfloat16'",
    )


def _validate_data(cfg: TrainConfig) -> None:
    for side in ("query_fields", "document_fields"):
        weights = getattr(cfg.data, side)
        for field, weight in weights.items():
            require(
                math.isfinite(weight) and weight >= 0,
                f"data.{side}[{field!r}]={weight} must be a weight of 0 or more",
            )
        require(not weights or sum(weights.values()) > 0, f"data.{side}: all weights are 0")
    require(0 < cfg.data.min_crop_area <= 1, "data.min_crop_area must lie in (0, 1]")
    if cfg.data.pairs_per_query > 1:
        together = (
            f"data.pairs_per_query={cfg.data.pairs_per_query} brings a query's pairs together"
        )
        require(not cfg.data.unique_queries, f"{together}, and unique_queries forbids that")
        require(
            cfg.data.sampler == "uniform",
            f"{together}, which sampler={cfg.data.sampler!r} cannot; leave one at its default",
        )


def _validate_loss(cfg: TrainConfig) -> None:
    loss = cfg.loss
    _validate_objectives(cfg)
    try:
        score_to_weight(loss.score_to_weight, cfg.data.max_score, loss.thresholds, loss.values)
    except ConfigError as error:
        raise ConfigError(f"config.loss.score_to_weight: {error}") from None
    require(
        loss.targets == "diagonal" or loss.weight_norm == "none",
        f"loss.weight_norm={loss.weight_norm!r} has no effect with targets='known', which divide "
        "by the sum of the weights; leave it at 'none'",
    )
    for dim in loss.matryoshka_dims:
        require(
            1 <= dim <= cfg.model.embed_dim,
            f"loss.matryoshka_dims: {dim} is not from 1 to model.embed_dim={cfg.model.embed_dim}",
        )


def _validate_objectives(cfg: TrainConfig) -> None:
    loss = cfg.loss
    weights = dataclasses.asdict(loss.objectives)
    for name, weight in weights.items():
        require(
            math.isfinite(weight) and weight >= 0,
            f"loss.objectives.{name}={weight} must be a weight of 0 or more",
        )
    require(any(weights.values()), "loss.objectives: all weights are 0")
    for name in ("sigmoid", "bixse"):
        require(
            not weights[name] or cfg.model.init_logit_bias is not None,
            f"model.init_logit_bias must be set for loss.objectives.{name}, which learns a bias; "
            "-10 is SigLIP's, -log(batch size) fits smaller batches",
        )
    for name in ("listnet", "listmle", "rince"):
        require(
            not weights[name] or loss.targets == "known",
            f"loss.targets must be 'known' for loss.objectives.{name}, which ranks all scored "
            "documents of a query in the batch (data.pairs_per_query brings them together)",
        )
    require(
        loss.weight_norm == "none" or weights["gcl"] > 0,
        f"loss.weight_norm={loss.weight_norm!r} is of loss.objectives.gcl alone, whose weight is 0",
    )
    require(loss.rince.spread >= 1, f"loss.rince.spread={loss.rince.spread} must be 1 or more")
    for name, positive in (("temperature", loss.mixed.temperature), ("beta", loss.mixed.beta)):
        require(positive > 0, f"loss.mixed.{name}={positive} must be above 0")


def _validate_optim(cfg: TrainConfig) -> None:
    optim = cfg.optim
    require(optim.batch_size >= 2, "optim.batch_size must be 2 or more: one pair has no negatives")
    require(optim.lr > 0, f"optim.lr={optim.lr} must be above 0")
    asked = max(optim.steps, optim.examples, optim.epochs)
    require(asked > 0, "optim: set epochs, examples or steps above 0")
    require(0 < optim.layer_decay <= 1, f"optim.layer_decay={optim.layer_decay} must lie in (0, 1]")
    require(0 <= optim.ema_decay < 1, f"optim.ema_decay={optim.ema_decay} must lie in [0, 1)")
    for pattern in optim.freeze:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigError(f"config.optim.freeze: {pattern!r} is no pattern: {error}") from None


def _validate_checkpoint(cfg: TrainConfig) -> None:
    every, keep_every = cfg.checkpoint.every, cfg.checkpoint.keep_every
    require(
        keep_every % every == 0,
        f"checkpoint.keep_every={keep_every} is no multiple of checkpoint.every={every}: there is "
        "no checkpoint of such a step to keep",
    )
    require(
        not cfg.checkpoint.best or (cfg.eval.every > 0 and cfg.eval.every % every == 0),
        f"eval.every={cfg.eval.every} must be a multiple of checkpoint.every={every} for "
        f"checkpoint.best={cfg.checkpoint.best!r}: only a step that is evaluated and saved can be "
        "the best",
    )
