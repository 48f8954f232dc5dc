"""From the command line to a configuration: --config=FILE, and --config.KEY=VALUE for each option.

Options are typed by `gcl_jax.config`. ml_collections' flags are not used: they know neither entries
of a dict that the file does not name nor presets, and answer a wrong value with a traceback.
"""

import argparse
import ast
import dataclasses
import difflib
import re
import sys
import types
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from gcl_jax import registry
from gcl_jax.config import (
    RENAMED,
    ModelConfig,
    ObjectivesConfig,
    TrainConfig,
    described,
    nested,
)
from gcl_jax.errors import ConfigError, UserError
from gcl_jax.models.presets import preset
from gcl_jax.paths import local_path
from gcl_jax.validation import example, in_words, is_of, unused, validate

# How a model computes is not a matter of which model it is: a preset leaves these alone.
NUMERICS = ("dtype", "param_dtype", "attention", "remat", "lora_rank", "lora_alpha")
# Of such keys a run may be given other values when it goes on. Of others, another run is made.
RESUMABLE = ("optim.", "loss.")


def parse(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None = None
) -> tuple[argparse.Namespace, TrainConfig]:
    """(the arguments of `parser`, the configuration) of a command line, by default the program's;
    adds --config to the parser.

    Raises:
        ConfigError: the configuration cannot be read, set or used.
    """
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE[:ARGUMENT]",
        help="Python file with get_config(), and an argument of that. Every option is a flag, such "
        "as --config.optim.lr=3e-4; `python -m gcl_jax config` lists them",
    )
    rest, overrides = take_overrides(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(rest)
    cfg = read_config(args.config, overrides)
    validate(cfg)
    _refuse_unused(cfg, [key for key, _ in overrides])
    return args, cfg


def _refuse_unused(cfg: TrainConfig, given: Sequence[str]) -> None:
    for key, line in unused(cfg).items():
        if any(one == key or one.startswith(f"{key}.") for one in given):
            raise ConfigError(line)


def resume_changes(text: str) -> tuple[str, ...]:
    """The keys of --resume_changes; `ConfigError` for one that no run may change."""
    keys = tuple(key.strip().removeprefix("config.") for key in text.split(",") if key.strip())
    known = [one.key for one in described() if one.key.startswith(RESUMABLE)]
    for key in keys:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1, 0.6)
            hint = f"did you mean {near[0]}?" if near else "only keys of optim and loss can change"
            raise ConfigError(f"--resume_changes={text}: {key}: {hint}")
    return keys


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
    # The last word alone, as in --config.lr; then what is spelled alike.
    near = [one for one in keys if one.rpartition(".")[2] == key.rpartition(".")[2]]
    near += difflib.get_close_matches(key, [*parts, *keys], 1, 0.6)
    if key in parts:
        inside = next(one for one in keys if one.startswith(f"{key}."))
        hint = f"it has options of its own: set one, such as --config.{inside}=..."
    elif near:
        hint = f"there is no such key; did you mean config.{near[0]}?"
    else:
        hint = "there is no such key"
    raise ConfigError(f"config.{key}: {hint} `python -m gcl_jax config` lists all")


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
    return dataclasses.replace(found, **{name: getattr(cfg.model, name) for name in NUMERICS})


def _set_option(part: Any, name: str, hint: Any, key: str, rest: list[str], text: str) -> None:
    args = typing.get_args(hint)
    is_dict = (typing.get_origin(hint) or hint) in (dict, ObjectivesConfig)
    if rest and not is_dict:
        raise ConfigError(f"config.{key}: there is no such key; {name} has no parts")
    hint = (args[1] if args else float) if rest else hint
    value = _parsed(text, hint)
    if not is_of(value, hint):
        one = next(one for one in described() if f"{key}.".startswith(f"{one.key}."))
        found, example_key = 1.0 if rest else example(one), key
        if isinstance(found, dict):
            entry, found = next(iter(found.items()))
            example_key = f"{key}.{entry}"
        shown = _as_text(found)
        raise ConfigError(
            f"config.{key}={text!r} must be {in_words(hint)}; write for example "
            f"--config.{example_key}={shown}"
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
    if kind is float and re.fullmatch(r"\s*[+-]?[0-9]+\s*", text):
        return float(text)
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
        file: path of a file with `get_config()`; what follows a colon is its argument. The files
            in configs/ come with the package: they are found from everywhere.
        overrides: (key, text) of `override`.

    Raises:
        ConfigError: no such file, one that fails, or what `override` raises.
    """
    name, colon, argument = file.partition(":")
    package = Path(__file__).parents[1]
    try:
        given = local_path(file if "://" in file else name)
    except UserError as error:
        raise ConfigError(f"--config={error}") from None
    # In a clone, as `pip install -e` leaves it, they are beside the package.
    places = given, package / name, package.parent / name
    path = next((x for x in places if x.is_file()), None)
    if path is None:
        why = "a folder, no file" if given.is_dir() else "no such file"
        raise ConfigError(f"--config={file}: {why}")
    try:
        made = registry.load_file(path).get_config(*[argument] if colon else [])
    except ConfigError as error:
        raise ConfigError(f"--config={file}: {error}") from None
    except (Exception, SystemExit) as error:
        reason = str(error).strip().splitlines()[:1] or [""]
        raise ConfigError(f"--config={file}: {type(error).__name__}: {reason[0]}") from None
    if not isinstance(made, TrainConfig):
        raise ConfigError(f"--config={file}: get_config() must return a gcl_jax.TrainConfig")
    overrides = list(overrides)
    keys = [key for key, _ in overrides]
    # As a flag, each stands in place of what the file has of the other.
    if any(re.match(r"data\.stores\b", key) for key in keys):
        made.data.store = ""
    elif "data.store" in keys:
        made.data.stores = {}
    whole = {key for key in keys if key in ("model", *_parts_of_model())}
    for key, text in sorted(overrides, key=lambda one: one[0] not in whole):
        override(made, key, text)
    return made


def _parts_of_model() -> list[str]:
    hints = typing.get_type_hints(ModelConfig)
    return [f"model.{name}" for name, hint in hints.items() if nested(hint)]
