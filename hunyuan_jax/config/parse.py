"""Config to and from plain dicts and the ConfigDict of a recipe; ml_collections ends here."""

import dataclasses
import difflib
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from hunyuan_jax.config.run import Config
from hunyuan_jax.config.section import as_type, field_types
from hunyuan_jax.errors import ConfigError

if TYPE_CHECKING:
    from ml_collections import ConfigDict


def to_config_dict(config: Config) -> "ConfigDict":
    """The locked ConfigDict of a recipe; every field can be overridden, none can be added."""
    from ml_collections import ConfigDict  # only recipes need it, `import hunyuan_jax` does not

    return ConfigDict(to_dict(config)).lock()


def weights_recipe(model: Mapping[str, Any], **sections: Any) -> "ConfigDict":
    """The locked ConfigDict of a recipe that takes its model from the weights of train.init_from.

    All fields of the model that are not named, data.tokenizer and train.seq_len are None, which
    `from_config_dict` has filled in.  The command line can set any of them.

    Args:
      model: fields that the recipe sets, by dotted name, such as "moe.dispatch".
      sections: the other sections of a Config.
    """
    from ml_collections import ConfigDict, config_dict

    def unset(cls: type, prefix: str) -> dict[str, Any]:
        found = {}
        for name, hint in field_types(cls).items():
            if dataclasses.is_dataclass(hint):
                found[name] = unset(hint, f"{prefix}{name}.")
            else:
                found[name] = config_dict.placeholder(_plain_type(hint))
                if prefix + name in model:
                    found[name].set(model[prefix + name])
        return found

    types = field_types(Config)
    values = {
        name: to_dict(sections.get(name, hint()))
        for name, hint in types.items()
        if name != "model"
    }
    values["data"]["tokenizer"] = config_dict.placeholder(str)
    values["train"]["seq_len"] = config_dict.placeholder(int)
    return ConfigDict({"model": unset(types["model"], ""), **values}).lock()


def _plain_type(hint: Any) -> type:
    """The type of a field's values, as a command line reads them."""
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        return type(typing.get_args(hint)[0])
    return origin or getattr(hint, "__supertype__", hint)


def to_dict(config: Any) -> dict[str, Any]:
    """Plain nested dict of any config dataclass, as written to config.json."""
    return dataclasses.asdict(config)


def defaults(cls: type = Config, prefix: str = "") -> dict[str, Any]:
    """Dotted name -> default of every leaf field that has one."""
    found = {}
    for field in dataclasses.fields(cls):
        kind = field_types(cls)[field.name]
        if dataclasses.is_dataclass(kind):
            found |= defaults(kind, f"{prefix}{field.name}.")
        elif field.default is not dataclasses.MISSING:
            found[prefix + field.name] = field.default
    return found


def from_config_dict(
    config: "ConfigDict | Mapping[str, Any]",
    complete: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
) -> Config:
    """The frozen Config of a recipe's ConfigDict or of a plain dict.

    Args:
      config: of a recipe, or as written to config.json.
      complete: fills in what a `weights_recipe` leaves None: `train.start.complete`.

    Raises:
      ConfigError: unknown key (naming the nearest), wrong type, or a broken rule.
    """
    values = config if isinstance(config, Mapping) else config.to_dict()
    if complete and any(value is None for _, value in flat_fields(values)):
        values = complete(dict(values))
    return from_dict(Config, values)


def from_dict(cls: type, values: Mapping[str, Any], prefix: str = "") -> Any:
    """Builds the config dataclass `cls` from a nested mapping.

    Args:
      prefix: what stands before a field's name in messages, such as "model.moe.".

    Raises:
      ConfigError: unknown key, missing field, wrong type, or a broken rule.
    """
    types = field_types(cls)
    kwargs = {}
    for key, value in values.items():
        if key not in types:
            known = [prefix + name for name in types]
            raise ConfigError(unknown_key_message(prefix + key, known))
        kwargs[key] = _read(prefix + key, value, types[key])
    for field in dataclasses.fields(cls):
        if field.name not in kwargs and field.default is dataclasses.MISSING:
            raise ConfigError(
                f"config.{prefix}{field.name} is missing; it has no default. Set it in the recipe."
            )
    return cls(**kwargs)


def _read(name: str, value: Any, hint: Any) -> Any:
    """A field's value, with mappings turned into sections; `name` counts items of lists."""
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return from_dict(hint, value, f"{name}.")
    if typing.get_origin(hint) is tuple and isinstance(value, tuple | list):
        item = typing.get_args(hint)[0]
        return tuple(_read(f"{name}[{i}]", v, item) for i, v in enumerate(value))
    return as_type(name, value, hint)


def unknown_key_message(key: str, known: list[str]) -> str:
    """One line for an unknown config key, with the nearest known one."""
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
    return f"config.{key} does not exist. Did you mean config.{nearest[0]}?"


def field_names(cls: type = Config, prefix: str = "") -> list[str]:
    """All leaf field paths, such as 'model.moe.top_k'."""
    names = []
    for name, hint in field_types(cls).items():
        is_section = dataclasses.is_dataclass(hint)
        names += field_names(hint, f"{prefix}{name}.") if is_section else [prefix + name]
    return names


def flat_fields(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every leaf of a nested dict, such as that of `to_dict`."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from flat_fields(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
