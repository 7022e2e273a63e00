"""Reads the tokenizer settings of a model folder: special tokens, chat template, stop ids."""

import pathlib
from typing import Any, NamedTuple

from hunyuan_jax.errors import ConfigError
from hunyuan_jax.files import json_object

_NAMES = (
    "bos_token",
    "eos_token",
    "pad_token",
    "unk_token",
    "sep_token",
    "cls_token",
    "mask_token",
)


class Settings(NamedTuple):
    """Tokenizer settings of a model folder.

    named_tokens: texts by name, such as "eos_token".
    chat_template: jinja text, or None.
    stop_ids: eos_token_id of generation_config.json.
    num_ids: vocab_size of config.json, or None.
    """

    named_tokens: dict[str, str]
    chat_template: str | None
    stop_ids: tuple[int, ...]
    num_ids: int | None


def read_settings(folder: pathlib.Path) -> Settings:
    """Reads those that exist of the folder's JSON configs and chat_template.jinja.

    The configs are tokenizer_config.json, generation_config.json and config.json.
    chat_template.jinja takes precedence over chat_template of tokenizer_config.json, as in
    transformers.  Of several named templates, "default" is used.

    Raises:
      ConfigError: a file is not JSON, or a field has the wrong type.
    """
    config = _read_object(folder / "tokenizer_config.json")
    named = {}
    for name in _NAMES:
        value = config.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if text is not None:
            if not isinstance(text, str):
                raise ConfigError(
                    f"{folder}/tokenizer_config.json: {name} = {value!r} must be a string or "
                    f'{{"content": string}}.'
                )
            named[name] = text
    generation = folder / "generation_config.json"
    return Settings(
        named,
        _template(folder, config),
        stop_ids(str(generation), _read_object(generation).get("eos_token_id")),
        _read_object(folder / "config.json").get("vocab_size"),
    )


def stop_ids(where: str, eos_token_id: Any) -> tuple[int, ...]:
    """Returns the eos_token_id of a JSON file as a tuple; `where` names the file.

    Raises:
      ConfigError: it is not null, an integer or a list of integers.
    """
    ids = () if eos_token_id is None else eos_token_id
    ids = tuple(ids) if isinstance(ids, list | tuple) else (ids,)
    if any(type(i) is not int for i in ids):
        raise ConfigError(
            f"{where}: eos_token_id = {eos_token_id!r} must be an integer or a list of integers."
        )
    return ids


def _template(folder: pathlib.Path, config: dict[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {
            entry.get("name"): entry.get("template")
            for entry in template
            if isinstance(entry, dict)
        }
        if "default" not in named:
            raise ConfigError(
                f"{folder}/tokenizer_config.json: chat_template has {sorted(map(str, named))} but "
                "none named 'default'."
            )
        template = named["default"]
    if template is not None and not isinstance(template, str):
        raise ConfigError(
            f"{folder}/tokenizer_config.json: chat_template is a {type(template).__name__}; it "
            "must be a string."
        )
    return template


def _read_object(path: pathlib.Path) -> dict[str, Any]:
    """Returns the object of a JSON file; {} if the file does not exist."""
    return json_object(str(path), path.read_bytes()) if path.is_file() else {}
