"""Command lines: --config=FILE with --config.section.field overrides, and one way to answer what a
user must change.

Imports no jax.
"""

import os
import re
import sys
from collections.abc import Callable
from typing import NoReturn

from absl import flags
from ml_collections import config_flags

from hunyuan_jax.config import Config, field_names, from_config_dict, unknown_key_message
from hunyuan_jax.errors import ConfigError
from pallas_kernels.select import Unsupported


def parse(argv: list[str], define: Callable[[flags.FlagValues], None]) -> flags.FlagValues:
    """Flag values of `argv` (program name first) after `define` has declared the flags.

    Raises:
      ConfigError: an unknown flag or config key, with the nearest known one, or a value of the
        wrong type.
    """
    values = flags.FlagValues()
    flags.DEFINE_boolean("help", False, "Show this text.", flag_values=values, short_name="h")
    define(values)
    path = next(
        (
            match[1]
            for match in (re.match(r"--?config=(.*)", argument) for argument in argv[1:])
            if match
        ),
        None,
    )
    if path is not None and not os.path.isfile(path):
        raise ConfigError(
            f"--config={path}: no such file; recipes are in configs/, for example "
            "--config=configs/tiny.py."
        )
    try:
        rest = values(argv)
    except (flags.Error, AttributeError, KeyError, ValueError, TypeError) as e:
        raise ConfigError(_explain(argv, e)) from e
    if values.help:
        print(values.main_module_help() or values.get_help())
        raise SystemExit(0)
    if len(rest) > 1:
        raise ConfigError(f"unexpected argument {rest[1]!r}; options are written --name=value.")
    return values


def define_config(values: flags.FlagValues) -> None:
    """Declares --config."""
    config_flags.DEFINE_config_file(
        "config",
        None,
        "Recipe, such as configs/tiny.py; override any field with --config.section.field=value.",
        flag_values=values,
    )


def config_of(values: flags.FlagValues) -> Config:
    """The validated Config of --config.

    Raises:
      ConfigError: no --config, or what `from_config_dict` refuses.
    """
    if values.config is None:
        raise ConfigError("--config is missing; pass a recipe, such as --config=configs/tiny.py.")
    return from_config_dict(values.config.to_dict())


def exit_with_message(main: Callable[[], int]) -> NoReturn:
    """Runs main and exits with its status; what the user must change becomes a message and status
    2, without a traceback.
    """
    try:
        status = main()
    except (ConfigError, Unsupported) as e:
        print(f"error: {e}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        # At once: native threads that are still at work would abort the process when the
        # interpreter ends.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(130)
    sys.exit(status)


def _explain(argv: list[str], error: Exception) -> str:
    """One line for whatever absl or ml_collections raise."""
    known = field_names()
    for argument in argv[1:]:
        match = re.match(r"--?(?:no)?config\.([\w.]+)", argument)
        if (
            match
            and match[1] not in known
            and not any(name.startswith(match[1] + ".") for name in known)
        ):
            return unknown_key_message(match[1], known)
    return " ".join(str(error).split())
