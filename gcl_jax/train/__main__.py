"""Trains a model: `python -m gcl_jax.train --config=configs/emoji_tiny.py --workdir=runs/demo`.

The same command continues a run that was interrupted. On several hosts it is the same command on
each (docs/pods.md). Every leaf of the config is a flag, e.g.
--config.optim.lr=3e-4 or --config.data.store=stores/mine.
"""

import sys
from collections.abc import Callable

from absl import app, flags

from gcl_jax import distributed
from gcl_jax.errors import ConfigError, reported_in_one_line
from gcl_jax.train.flags import CONFIG, parse_flags
from gcl_jax.validation import validate

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run: all it writes goes there.")
_PROFILE = flags.DEFINE_string(
    "profile", "", "FIRST:LAST steps to write a trace of, for TensorBoard's profiler or Perfetto."
)
_DEFINE: dict[type, Callable] = {str: flags.DEFINE_string, int: flags.DEFINE_integer}
flags.declare_key_flag("config")
_PROCESSES = [_DEFINE[kind](name, None, text) for name, (kind, text) in distributed.FLAGS.items()]


def main(_argv: list[str]) -> None:
    with reported_in_one_line():
        validate(CONFIG.value)
        profile = _steps(_PROFILE.value)
        distributed.keep_compiled()
        with distributed.joined(*(flag.value for flag in _PROCESSES), graceful=True):
            from gcl_jax.train.loop import Interrupted, train

            try:
                train(CONFIG.value, str(_WORKDIR.value), profile)
            except Interrupted as stop:
                distributed.announce(str(stop))
                sys.exit(stop.exit_code)


def _steps(text: str) -> range:
    first, _, last = text.partition(":")
    if not text:
        return range(0)
    if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise ConfigError(f"--profile={text}: write FIRST:LAST, two steps from 1 on")
    return range(int(first), int(last) + 1)


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main, flags_parser=parse_flags)
