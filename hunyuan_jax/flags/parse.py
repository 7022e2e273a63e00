"""Values of a command line, read by absl and ml_collections; their errors become one line."""

import os
import re
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

from absl import flags
from ml_collections import config_flags

from hunyuan_jax.config import field_names, from_config_dict, unknown_key_message
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.files import AnyPath, LocalPath, require_protocol, user_path
from hunyuan_jax.flags.declare import Option


def parse(
    options: Sequence[Option],
    program: str,
    arguments: Sequence[str],
    complete: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
) -> SimpleNamespace:
    """The options' values by name: paths as `files.user_path` gives them, `config` as a
    Config, with `complete` as for `from_config_dict`.

    Raises:
      ConfigError: an unknown option or config field, with the nearest known one; a missing option;
        a value of the wrong type or outside its range.
    """
    values = flags.FlagValues()
    for option in options:
        _define(option, values)
    arguments = [_with_user_path(argument) for argument in arguments]
    try:
        rest = values([program, *arguments])
    except (flags.Error, AttributeError, KeyError, ValueError, TypeError) as e:
        raise ConfigError(_explain(arguments, e)) from e
    if len(rest) > 1:
        raise ConfigError(f"unexpected argument {rest[1]!r}; options are written --name=value.")
    return SimpleNamespace(**{option.name: _value(option, values, complete) for option in options})


def _define(option: Option, values: flags.FlagValues) -> None:
    name, default, text = option.name, option.default, option.meaning
    limits = {"lower_bound": option.minimum, "upper_bound": option.maximum, "flag_values": values}
    if name == "config":
        config_flags.DEFINE_config_file(name, default, text, flag_values=values)
    elif option.choices:
        flags.DEFINE_enum(name, default, list(option.choices), text, flag_values=values)
    elif option.type is bool:
        flags.DEFINE_boolean(name, default, text, flag_values=values)
    elif option.type is int:
        flags.DEFINE_integer(name, default, text, **limits)
    elif option.type is float:
        flags.DEFINE_float(name, default, text, **limits)
    else:
        flags.DEFINE_string(name, default, text, flag_values=values)


def _value(
    option: Option, values: flags.FlagValues, complete: Callable[[dict], dict] | None
) -> Any:
    value = values[option.name].value
    if value in (None, ""):
        if option.is_required:
            raise ConfigError(
                f"--{option.name} is missing; pass --{option.name}={option.placeholder}: "
                f"{option.meaning}"
            )
        return value
    if option.name == "config":
        return from_config_dict(value, complete)
    if option.type in (LocalPath, AnyPath):
        path = user_path(value, f"--{option.name}", option.type)
        require_protocol(path, f"--{option.name}")
        return path
    return option.type(value)


def _with_user_path(argument: str) -> str:
    """`argument`, with `~` expanded if it is --config=FILE; the file must be there."""
    match = re.fullmatch(r"(--?config=)(.*)", argument)
    if not match:
        return argument
    path = user_path(match[2], "--config")
    if not os.path.isfile(path):
        raise ConfigError(
            f"--config={path}: no such file; recipes are in configs/, for example "
            "--config=configs/tiny.py."
        )
    return match[1] + path


def _explain(arguments: Sequence[str], error: Exception) -> str:
    """One line for whatever absl or ml_collections raise."""
    known = field_names()
    for argument in arguments:
        match = re.match(r"--?(?:no)?config\.([\w.]+)", argument)
        if match and not any(f"{name}.".startswith(f"{match[1]}.") for name in known):
            return unknown_key_message(match[1], known)
    return " ".join(str(error).split())
