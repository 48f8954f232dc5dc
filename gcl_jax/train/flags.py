"""--config=FILE, every leaf of it a flag, for the commands that take a configuration."""

from pathlib import Path

from absl import flags
from ml_collections import config_flags

from gcl_jax.errors import ConfigError, reported_in_one_line

CONFIG = config_flags.DEFINE_config_file("config", None, "Python file with get_config().")


def parse_flags(argv: list[str]) -> list[str]:
    """absl's parser, with one line for whatever it or a config file raises."""
    with reported_in_one_line():
        # `config_flags` prints a traceback for a missing file, and fails only later.
        for value in (arg.partition("=")[2] for arg in argv if arg.startswith("--config=")):
            path = value.partition(":")[0]  # an argument of get_config() may follow
            if not Path(path).is_file():
                raise ConfigError(f"--config={path}: no such file")
        try:
            return flags.FLAGS(argv)
        except KeyError as error:
            raise ConfigError(f"--config has no such key: {error.args[0]}") from None
        except flags.Error as error:
            raise ConfigError(str(error).strip().splitlines()[-1]) from None
        except Exception as error:
            raise ConfigError(f"--config: {error}") from None
