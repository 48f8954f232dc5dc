"""The commands, and what can be configured.

python -m gcl_jax                     lists the commands
python -m gcl_jax COMMAND ...         runs one, as `python -m gcl_jax.COMMAND ...` does
python -m gcl_jax config [PREFIX ...] lists the options of a configuration: all of them, or those
                                      whose key starts with PREFIX, such as optim or model.text
"""

import runpy
import sys
import textwrap
from collections.abc import Iterable

from gcl_jax import config
from gcl_jax.errors import ConfigError, reported_in_one_line
from gcl_jax.validation import in_words

COMMANDS = {
    "prepare": "make a store, which training reads, from your tables, folders or Marqo-GS",
    "data": "look at a store; verify that it is whole",
    "plan": "what a training step needs on other devices: does it fit?",
    "train": "train a model",
    "evaluate": "evaluate a run, or the results of any system; compare two",
    "compare": "what training gains on your data, over BM25 and by which loss",
    "report": "a page about one run or several",
    "search": "search with a run, in the terminal or on a page",
    "serve": "embed and search for other programs: a JSON API",
    "embed": "embeddings of a store, for FAISS, USearch and others",
    "mine": "hard negatives that a run finds",
    "port": "pretrained models in, trained ones out",
    "config": "list the options of a configuration",
}


def lines(prefix: str = "") -> Iterable[str]:
    """The options whose key starts with `prefix`: key, default, meaning, type, what is allowed.

    Raises:
        ConfigError: there are none.
    """
    prefix = prefix.removeprefix("--").removeprefix("config.").rstrip(".")
    found = [one for one in config.described() if f"{one.key}.".startswith(f"{prefix}.")]
    found = found or [one for one in config.described() if one.key.startswith(prefix)]
    if not found:
        raise ConfigError(f"config: no key starts with {prefix!r}; `python -m gcl_jax config`")
    for one in found:
        yield f"{one.key} = {one.default!r}"
        takes = "; ".join(filter(None, (in_words(one.type), one.option.allowed)))
        meaning = f"{one.option.meaning} ({takes})"
        yield textwrap.fill(meaning, 92, initial_indent="    ", subsequent_indent="    ")


def main() -> None:
    command, *rest = sys.argv[1:] or ["--help"]
    with reported_in_one_line():
        if command in ("--help", "-h", "help"):
            print(__doc__)
            print("\n".join(f"  {name:<10}{what}" for name, what in COMMANDS.items()))
        elif command == "--version":
            import gcl_jax

            print(gcl_jax.__version__)
        elif command == "config" and {"--help", "-h"} & set(rest):
            print(__doc__)
        elif command == "config":
            print("\n".join(line for prefix in rest or [""] for line in lines(prefix)))
        elif command in COMMANDS:
            # As `python -m` has it: your own modules are found beside you.
            sys.path.insert(0, "")
            sys.argv = [f"gcl_jax.{command}", *rest]
            runpy.run_module(f"gcl_jax.{command}", run_name="__main__", alter_sys=True)
        else:
            raise ConfigError(f"{command!r} is no command; one of {', '.join(COMMANDS)}")


if __name__ == "__main__":
    main()
