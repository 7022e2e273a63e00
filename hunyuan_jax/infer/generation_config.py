"""Sampling settings that a model folder recommends in its generation_config.json."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from hunyuan_jax.errors import ConfigError
from hunyuan_jax.files import json_object

_FILE = "generation_config.json"
# Field -> (its rule in words, whether a number keeps it).
_RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "temperature": ("a number that is not negative", lambda x: x >= 0),
    "top_k": ("an integer", lambda x: type(x) is int),
    "top_p": ("in (0, 1]", lambda x: 0 < x <= 1),
    "repetition_penalty": ("a positive number", lambda x: x > 0),
}


def read_sampling(folder: str) -> dict[str, float | int]:
    """temperature, top_k, top_p and repetition_penalty of the folder, those that it states.

    `do_sample: false` is temperature 0 (greedy).  A top_k of 0 or below turns top-k off.  Returns
    {} without the file, as in a run's workdir.

    Raises:
      ConfigError: a file that is not JSON, or a value outside its range.
    """
    path = Path(folder) / _FILE
    if not path.is_file():
        return {}
    stated = json_object(str(path), path.read_bytes())
    found: dict[str, float | int] = {}
    for name, (rule, is_ok) in _RULES.items():
        value = stated.get(name)
        if value is None:
            continue
        if type(value) not in (int, float) or not is_ok(value):
            raise ConfigError(f"{path}: {name} = {value!r} must be {rule}.")
        found[name] = max(value, 0) if name == "top_k" else float(value)
    return found | ({"temperature": 0.0} if stated.get("do_sample") is False else {})
