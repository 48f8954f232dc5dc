"""Checks a configuration before anything is built; an error is one line that names the key."""

import dataclasses
import functools
import math
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gcl_jax import config, registry
from gcl_jax.config import (
    DataConfig,
    Described,
    ObjectivesConfig,
    TrainConfig,
    described,
    nested,
)
from gcl_jax.errors import ConfigError, UserError, require
from gcl_jax.paths import address, path_of, remote
from gcl_jax.registry import TEXT_TOWERS, VISION_TOWERS

LARGEST = 2**31 - 1  # whole number: what a device counts with
CHECKPOINT_EVERY = 200


def validate(cfg: TrainConfig) -> None:
    """Imports the extensions of `cfg`, and raises `ConfigError`, one line that names the key, when
    it cannot work."""
    _check_parts(cfg, TrainConfig)
    check("extensions", cfg.extensions, next(x for x in described() if x.key == "extensions"))
    registry.load_extensions(cfg.extensions)
    for one in described():
        if cfg.model.vision is not None or not one.key.startswith("model.vision."):
            check(one.key, functools.reduce(getattr, one.key.split("."), cfg), one)
    _validate_model(cfg)
    _validate_data(cfg)
    _validate_loss(cfg)
    _validate_optim(cfg)
    _validate_checkpoint(cfg)
    require(cfg.mesh.data != 0, "mesh.data=0 must be -1 or 1 or more")
    require(
        cfg.eval.embed_dim <= cfg.model.embed_dim,
        f"eval.embed_dim={cfg.eval.embed_dim} is more than model.embed_dim={cfg.model.embed_dim}",
    )


def _check_parts(part: Any, kind: type, key: str = "") -> None:
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        hint, value = hints[field.name], getattr(part, field.name)
        inner = nested(hint)
        if inner is not None and (value is not None or type(None) not in typing.get_args(hint)):
            name = f"{key}{field.name}"
            require(isinstance(value, inner), f"{name}={value!r} must be a {inner.__name__}")
            _check_parts(value, inner, f"{name}.")


def check(key: str, value: Any, one: Described) -> None:
    """Raises `ConfigError` unless `value` has the type, the choices and the bounds of an option."""
    option = one.option
    if option.choices and isinstance(value, str):
        require(
            value in option.choices,
            f"{key}={value!r} must be one of {tuple(option.choices)}"
            + registry.hint(value, option.choices),
        )
    require(
        is_of(value, one.type),
        f"{key}={value!r} must be {in_words(one.type)}, such as {example(one)!r}",
    )
    if option.path:
        for path in filter(None, [value] if isinstance(value, str) else value):
            try:
                path_of(path)
            except UserError as error:
                raise ConfigError(f"config.{key}: {error}") from None
    weights = isinstance(value, dict)
    for name, x in _numbers(key, value):
        must = f"{name}={x} must be " + ("a weight of " if weights else "")
        require(math.isfinite(x), f"{must}{option.bounds or 'a number'}, and finite")
        require(option.at_least is None or x >= option.at_least, must + option.bounds)
        require(option.above is None or x > option.above, must + option.bounds)
        require(option.at_most is None or x <= option.at_most, must + option.bounds)
        require(option.below is None or x < option.below, must + option.bounds)
        require(not isinstance(x, int) or x <= LARGEST, f"{must}at most {LARGEST}")


def example(one: Described) -> Any:
    """A value of an option, where its default shows none."""
    if one.default or not (isinstance(one.default, tuple | dict)):
        return one.default
    if isinstance(one.default, dict):
        return {"emoji": 1.0} if one.option.path else {"image": 0.9}
    return {str: ("a", "b"), int: (64, 128), float: (0.5, 1.0)}[typing.get_args(one.type)[0]]


def _numbers(key: str, value: Any) -> Iterator[tuple[str, float]]:
    """The numbers in the value of an option, with the names to call them by."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        yield key, value
    elif isinstance(value, tuple | list):
        for i, x in enumerate(value):
            yield from _numbers(f"{key}[{i}]", x)
    elif isinstance(value, dict):
        for name, x in value.items():
            yield from _numbers(f"{key}.{name}", x)


def is_of(value: Any, hint: Any) -> bool:
    """Whether `value` is of the type `hint` of an option; a whole number is a float, too."""
    args = typing.get_args(hint)
    match typing.get_origin(hint) or hint:
        case types.UnionType | typing.Union:
            return any(is_of(value, arg) for arg in args)
        case kind if kind is tuple:
            items = isinstance(value, tuple | list)
            if items and args[-1] is not ...:
                return len(value) == len(args) and all(map(is_of, value, args))
            return items and all(is_of(x, args[0]) for x in value)
        case kind if kind is dict or kind is ObjectivesConfig:
            inner = args[1] if args else float
            return isinstance(value, dict) and all(
                isinstance(name, str) and is_of(x, inner) for name, x in value.items()
            )
        case kind if kind is Any:
            return True
        case kind if kind is float:
            return isinstance(value, int | float) and not isinstance(value, bool)
        case kind if kind is int:
            return isinstance(value, int) and not isinstance(value, bool)
        case kind:
            return isinstance(value, kind)


_WORDS = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "True or False",
    type(None): "None",
    Any: "a value",
}
_MANY = {int: "whole numbers", float: "numbers", str: "texts"}


def in_words(hint: Any) -> str:
    """The type of an option, such as "a number" or "a tuple of 2 numbers"."""
    args = typing.get_args(hint)
    kind = typing.get_origin(hint) or hint
    if kind in (types.UnionType, typing.Union):
        return " or ".join(map(in_words, args))
    if kind is tuple:
        return f"a tuple of {'' if args[-1] is ... else f'{len(args)} '}{_MANY[args[0]]}"
    if kind in (dict, ObjectivesConfig):
        return f"a dict of {'names and values' if Any in args else 'names and weights'}"
    return _WORDS[kind]


def _validate_model(cfg: TrainConfig) -> None:
    model, vision, text = cfg.model, cfg.model.vision, cfg.model.text
    if vision is not None:
        VISION_TOWERS[vision.family].validate(vision, model.embed_dim)
    TEXT_TOWERS[text.family].validate(text, model.embed_dim)
    require(
        model.attention != "cudnn" or model.dtype == "bfloat16",
        "model.attention='cudnn' needs model.dtype='bfloat16'",
    )


def _validate_data(cfg: TrainConfig) -> None:
    require(
        not (cfg.data.stores and cfg.data.negatives),
        f"data.negatives={cfg.data.negatives!r} are those of one store, and data.stores names "
        "several; leave one out (data.text_negatives goes with both)",
    )
    for side in ("query_fields", "document_fields"):
        weights = getattr(cfg.data, side)
        require(not weights or sum(weights.values()) > 0, f"data.{side}: all weights are 0")
    require(
        not cfg.data.stores or cfg.data.store in ("", DataConfig().store),
        f"data.store={cfg.data.store!r} and data.stores, which stand in its place: leave one out "
        "(--config.data.store= or --config.data.stores={})",
    )
    require(bool(cfg.data.named), "data.store is empty: name a folder of a store, or a source")
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
    from gcl_jax.data.sampling import score_to_weight  # loads grain

    loss = cfg.loss
    _validate_objectives(cfg)
    try:
        score_to_weight(loss.score_to_weight, cfg.data.max_score, loss.thresholds, loss.values)
    except ConfigError as error:
        raise ConfigError(f"config.loss.score_to_weight: {error}") from None
    require(
        loss.targets == "diagonal" or loss.weight_norm == "none",
        f"loss.weight_norm={loss.weight_norm!r} has no effect with targets='known', which divide "
        "by the sum of the weights; leave it at 'none', or set loss.targets=diagonal",
    )
    for dim in loss.matryoshka_dims:
        require(
            dim <= cfg.model.embed_dim,
            f"loss.matryoshka_dims: {dim} is more than model.embed_dim={cfg.model.embed_dim}",
        )


def _validate_objectives(cfg: TrainConfig) -> None:
    loss, weights = cfg.loss, cfg.loss.objectives
    for name in weights:
        require(
            name in registry.OBJECTIVES,
            f"loss.objectives.{name}: there is no such objective; choose from "
            f"{', '.join(registry.OBJECTIVES)}{registry.hint(name, registry.OBJECTIVES)}",
        )
    require(any(weights.values()), "loss.objectives: all weights are 0")
    require(
        loss.weight_norm == "none" or weights.get("gcl", 0.0) > 0,
        f"loss.weight_norm={loss.weight_norm!r} is of loss.objectives.gcl alone, whose weight is 0",
    )


def unused(cfg: TrainConfig) -> dict[str, str]:
    """{key: a line that says so} of options that are set and yet have no effect, since `cfg` does
    not have what they belong to. As a flag such a one is a mistake; in a file, of which a flag may
    have switched that off, it is not."""
    data, weights = cfg.data, cfg.loss.objectives
    idle = {} if data.stores else {"data.batch_of": "data.stores, which names none"}
    if data.negatives != "refresh":
        idle["data.refresh_"] = f"data.negatives='refresh', which is {data.negatives!r}"
    if not data.negatives and data.text_negatives == "none":
        idle["data.num_negatives"] = "data.negatives and data.text_negatives, and there are none"
    zero = [name for name in registry.OBJECTIVES if not weights.get(name)]
    idle |= {f"loss.{x}.": f"loss.objectives.{x}, whose weight is 0" for x in zero}
    if "distill" in zero:
        idle["loss.distill_from"] = "loss.objectives.distill, whose weight is 0"
    if {"roar", "lambdaloss", "distill"}.issubset(zero):
        idle["loss.list_size"] = "loss.objectives roar, lambdaloss and distill, whose weights are 0"
    return {
        one.key: f"config.{one.key} is of {owner}: it has no effect"
        for key, owner in idle.items()
        for one in described()
        if one.key.startswith(key) and config.value(cfg, one.key) != one.default
    }


def _validate_optim(cfg: TrainConfig) -> None:
    optim = cfg.optim
    require(optim.batch_size != 1, "optim.batch_size must be 2 or more: one pair has no negatives")
    asked = optim.epochs is None or max(optim.steps, optim.examples, optim.epochs) > 0
    require(asked, "optim: set epochs, examples or steps above 0")
    for key in ("freeze", "lr_multipliers"):
        for pattern in getattr(optim, key):
            try:
                re.compile(pattern)
            except re.error as error:
                message = f"config.optim.{key}: {pattern!r} is no pattern: {error}"
                raise ConfigError(message) from None


def _validate_checkpoint(cfg: TrainConfig) -> None:
    evaluated, best = cfg.eval.every, cfg.checkpoint.best
    every, keep_every = checkpoint_every(cfg), cfg.checkpoint.keep_every
    require(
        keep_every % every == 0,
        f"checkpoint.keep_every={keep_every} is no multiple of checkpoint.every={every}: there is "
        "no checkpoint of such a step to keep",
    )
    require(
        not best or evaluated is None or (evaluated > 0 and evaluated % every == 0),
        f"eval.every={evaluated} must be a multiple of checkpoint.every={every} for "
        f"checkpoint.best={best!r}: only a step that is evaluated and saved can be the best",
    )
    require(
        not cfg.eval.patience or (evaluated != 0 and best != ""),
        f"eval.patience={cfg.eval.patience} counts evaluations by checkpoint.best: set that, such "
        "as in_domain/NDCG@10, and eval.every",
    )


def checkpoint_every(cfg: TrainConfig) -> int:
    """`cfg.checkpoint.every`, or if that is None 200, or what divides `cfg.eval.every` where
    checkpoints are compared."""
    evaluated, compared = cfg.eval.every, cfg.checkpoint.best
    if cfg.checkpoint.every is not None or not (evaluated and compared):
        return cfg.checkpoint.every or CHECKPOINT_EVERY
    shared = math.gcd(evaluated, CHECKPOINT_EVERY)
    return shared if 4 * shared >= CHECKPOINT_EVERY else evaluated


def check_workdir(workdir: Path) -> None:
    """Raises `UserError` unless a run can be written to `workdir`: orbax takes its path for a
    pattern when it puts the parts of a checkpoint together, and then finds none."""
    remote(workdir)
    if workdir.is_file():
        raise ConfigError(f"{workdir} is a file; a run needs a directory")
    path = address(workdir) or str(workdir.absolute())
    if found := "".join(dict.fromkeys(c for c in path if c in "[]*?\\")):
        raise ConfigError(
            f"{path}: checkpoints under a path with any of {' '.join(found)} could not be read "
            "back; choose another name for the run's directory"
        )
