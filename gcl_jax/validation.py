"""Checks a configuration before anything is built, and sets its options from texts. An error is one
line that names the key and says what to write."""

import ast
import dataclasses
import difflib
import functools
import math
import re
import types
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from gcl_jax import registry
from gcl_jax.config import (
    RENAMED,
    Described,
    ModelConfig,
    ObjectivesConfig,
    TrainConfig,
    described,
    nested,
)
from gcl_jax.data.score_weights import score_to_weight
from gcl_jax.errors import ConfigError
from gcl_jax.models.presets import preset

LARGEST = 2**31 - 1  # whole number: what a device counts with
NUMERICS = ("dtype", "param_dtype", "attention", "remat", "lora_rank", "lora_alpha")


def require(condition: bool, message: str) -> None:
    """Raises `ConfigError` with `message`, which starts with the key, unless `condition` holds."""
    if not condition:
        raise ConfigError(f"config.{message}")


def validate(cfg: TrainConfig) -> None:
    """Raises `ConfigError`, one line that names the key, when `cfg` cannot work."""
    _check_parts(cfg, TrainConfig)
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
        require(value in option.choices, f"{key}={value!r} must be one of {tuple(option.choices)}")
    require(
        _is_of(value, one.type),
        f"{key}={value!r} must be {in_words(one.type)}, such as {one.default!r}",
    )
    weights = isinstance(value, dict)
    for name, x in _numbers(key, value):
        must = f"{name}={x} must be " + ("a weight of " if weights else "")
        require(math.isfinite(x), f"{must}{option.bounds or 'a finite number'}")
        require(option.at_least is None or x >= option.at_least, must + option.bounds)
        require(option.above is None or x > option.above, must + option.bounds)
        require(option.at_most is None or x <= option.at_most, must + option.bounds)
        require(option.below is None or x < option.below, must + option.bounds)
        require(not isinstance(x, int) or x <= LARGEST, f"{must}at most {LARGEST}")


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


def _is_of(value: Any, hint: Any) -> bool:
    """Whether `value` is of the type `hint` of an option; a whole number is a float, too."""
    args = typing.get_args(hint)
    match typing.get_origin(hint) or hint:
        case types.UnionType | typing.Union:
            return any(_is_of(value, arg) for arg in args)
        case kind if kind is tuple:
            items = isinstance(value, tuple | list)
            if items and args[-1] is not ...:
                return len(value) == len(args) and all(map(_is_of, value, args))
            return items and all(_is_of(x, args[0]) for x in value)
        case kind if kind is dict or kind is ObjectivesConfig:
            inner = args[1] if args else float
            return isinstance(value, dict) and all(
                isinstance(name, str) and _is_of(x, inner) for name, x in value.items()
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


def override(cfg: TrainConfig, key: str, text: str) -> None:
    """Sets one option from a text, as the command line gives it.

    A tuple is written as in Python or with commas; an entry of a dict has a key of its own
    (data.document_fields.image). `model` takes the name of a preset or an open_clip JSON file, and
    so do `model.vision`, `model.text` and `model.preprocess`, which take that part of it;
    `model.vision` also takes "none".

    Raises:
        ConfigError: no such key, or a text that is no value of it.
    """
    for old, new in RENAMED.items():
        if key == old or key.startswith(f"{old}."):
            key = new + key.removeprefix(old)
    part, names = cfg, key.split(".")
    for i, name in enumerate(names):
        hints = typing.get_type_hints(type(part))
        if name not in hints:
            _refuse_key(cfg, key)
        inner = nested(hints[name])
        if inner is None:
            _set_option(part, name, hints[name], key, names[i + 1 :], text)
            return
        if i == len(names) - 1:
            setattr(part, name, _of_preset(cfg, key, text))
            return
        if getattr(part, name) is None:
            setattr(part, name, inner())
        part = getattr(part, name)


def _refuse_key(cfg: TrainConfig, key: str) -> typing.NoReturn:
    keys = [one.key for one in described()]
    parts = {key.rpartition(".")[0] for key in keys} - {""}
    near = difflib.get_close_matches(key, keys, 1, 0.5)
    if key in parts:
        hint = f"set its options one by one: `python -m gcl_jax config {key}` lists them"
    elif near:
        hint = f"did you mean config.{near[0]}? `python -m gcl_jax config` lists all keys"
    else:
        hint = "`python -m gcl_jax config` lists all keys"
    raise ConfigError(f"config.{key}: there is no such key; {hint}")


def _of_preset(cfg: TrainConfig, key: str, text: str) -> Any:
    if not key.startswith("model"):
        _refuse_key(cfg, key)
    if key == "model.vision" and text.lower() == "none":
        return None
    try:
        found = preset(text)
    except ConfigError as error:
        raise ConfigError(f"config.{key}={text}: {error}") from None
    if key != "model":
        return getattr(found, key.removeprefix("model."))
    # How a model computes is not a matter of which model it is.
    return dataclasses.replace(found, **{name: getattr(cfg.model, name) for name in NUMERICS})


def _set_option(part: Any, name: str, hint: Any, key: str, rest: list[str], text: str) -> None:
    args = typing.get_args(hint)
    is_dict = (typing.get_origin(hint) or hint) in (dict, ObjectivesConfig)
    if rest and not is_dict:
        raise ConfigError(f"config.{key}: there is no such key; {name} has no parts")
    hint = (args[1] if args else float) if rest else hint
    value = _parsed(text, hint)
    if not _is_of(value, hint):
        default = next(one.default for one in described() if f"{key}.".startswith(f"{one.key}."))
        example = "1.0" if rest else _as_text(default) or "a,b"
        raise ConfigError(
            f"config.{key}={text!r} must be {in_words(hint)}; write for example "
            f"--config.{key}={example}"
        )
    if rest:
        getattr(part, name)[".".join(rest)] = value
    else:
        setattr(part, name, ObjectivesConfig(value) if hint is ObjectivesConfig else value)


def _as_text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _parsed(text: str, hint: Any) -> Any:
    """What `text` says, as a value of the type `hint` if it can be one."""
    args = typing.get_args(hint)
    kind = typing.get_origin(hint) or hint
    if kind in (types.UnionType, typing.Union):
        if text.lower() == "none":
            return None
        return _parsed(text, args[0])
    if kind is str:
        return text
    if kind is bool:
        return {"true": True, "1": True, "false": False, "0": False}.get(text.lower(), text)
    try:
        value = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        try:
            value = float(text)  # 3e-4 is a literal, nan and inf are not
        except ValueError:
            value = text
    if kind is tuple:
        if isinstance(value, str):
            value = tuple(filter(None, (x.strip() for x in text.strip("()[]").split(","))))
        elif not isinstance(value, tuple | list):
            value = (text if args[0] is str else value,)
        return tuple(value)
    return value


def take_overrides(argv: Iterable[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """(the other arguments, the (key, text) of `override`) of a command line: --config.KEY=TEXT or
    --config.KEY TEXT; of a yes-or-no option also --config.KEY and --noconfig.KEY.

    Raises:
        ConfigError: a key without a text.
    """
    rest: list[str] = []
    found: list[tuple[str, str]] = []
    yes_or_no = {one.key for one in described() if one.type is bool}
    words = iter(argv)
    for word in words:
        match = re.fullmatch(r"--?(no)?config\.([^=]+)(?:=(.*))?", word, re.DOTALL)
        if not match:
            rest.append(word)
            continue
        no, key, text = match.groups()
        if text is None:
            text = str(not no) if key in yes_or_no else next(words, None)
        if text is None:
            raise ConfigError(f"{word}: write {word}=VALUE")
        found.append((key, text))
    return rest, found


def read_config(file: str, overrides: Iterable[tuple[str, str]] = ()) -> TrainConfig:
    """The configuration that a Python file makes, with options set from texts; sub-configurations
    by preset first, then in their order.

    Args:
        file: path of a file with `get_config()`; what follows a colon is its argument.
        overrides: (key, text) of `override`.

    Raises:
        ConfigError: no such file, one that fails, or what `override` raises.
    """
    path, colon, argument = file.partition(":")
    if not Path(path).is_file():
        raise ConfigError(f"--config={file}: no such file")
    try:
        made = registry.load_file(Path(path)).get_config(*[argument] if colon else [])
    except (Exception, SystemExit) as error:
        reason = str(error).strip().splitlines()[:1] or [""]
        raise ConfigError(f"--config={file}: {type(error).__name__}: {reason[0]}") from None
    if not isinstance(made, TrainConfig):
        raise ConfigError(f"--config={file}: get_config() must return a gcl_jax.TrainConfig")
    overrides = list(overrides)
    whole = {key for key, _ in overrides if key in ("model", *_parts_of_model())}
    for key, text in sorted(overrides, key=lambda one: one[0] not in whole):
        override(made, key, text)
    registry.load_extensions(made.extensions)
    return made


def _parts_of_model() -> list[str]:
    hints = typing.get_type_hints(ModelConfig)
    return [f"model.{name}" for name, hint in hints.items() if nested(hint)]


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
        text.width % text.heads == 0,
        f"model.text.width={text.width} is no multiple of heads={text.heads}",
    )
    require(
        text.proj != "none" or text.width == model.embed_dim,
        f"model.text.proj='none' needs width={text.width} to be embed_dim={model.embed_dim}",
    )
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
        require(not weights or sum(weights.values()) > 0, f"data.{side}: all weights are 0")
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
            dim <= cfg.model.embed_dim,
            f"loss.matryoshka_dims: {dim} is more than model.embed_dim={cfg.model.embed_dim}",
        )


def _validate_objectives(cfg: TrainConfig) -> None:
    loss, weights = cfg.loss, cfg.loss.objectives
    for name in weights:
        require(
            name in registry.OBJECTIVES,
            f"loss.objectives.{name}: there is no such objective; choose from "
            f"{', '.join(registry.OBJECTIVES)}",
        )
    require(any(weights.values()), "loss.objectives: all weights are 0")
    for name in ("sigmoid", "bixse"):
        require(
            not weights.get(name) or cfg.model.init_logit_bias is not None,
            f"model.init_logit_bias must be set for loss.objectives.{name}, which learns a bias; "
            "-10 is SigLIP's, -log(batch size) fits smaller batches",
        )
    for name in ("listnet", "listmle", "rince"):
        require(
            not weights.get(name) or loss.targets == "known",
            f"loss.targets must be 'known' for loss.objectives.{name}, which ranks all scored "
            "documents of a query in the batch (data.pairs_per_query brings them together)",
        )
    require(
        loss.weight_norm == "none" or weights.get("gcl", 0.0) > 0,
        f"loss.weight_norm={loss.weight_norm!r} is of loss.objectives.gcl alone, whose weight is 0",
    )


def _validate_optim(cfg: TrainConfig) -> None:
    optim = cfg.optim
    require(optim.batch_size >= 2, "optim.batch_size must be 2 or more: one pair has no negatives")
    asked = max(optim.steps, optim.examples, optim.epochs)
    require(asked > 0, "optim: set epochs, examples or steps above 0")
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
