"""Settings of a generation, and those that a model folder recommends.

Imports no jax, so that a wrong setting is answered at once.
"""

import dataclasses
import math
import numbers
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Self

from hunyuan_jax.errors import ConfigError
from hunyuan_jax.files import json_object

if TYPE_CHECKING:
    from hunyuan_jax.weights.storage import Place

# Field -> its value where neither the caller nor the model folder states one.
DEFAULTS = {"temperature": 0.8, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.0}

# Most likely tokens of which log-probabilities can be had.
MAX_LOGPROBS = 20

_FILE = "generation_config.json"
# Field -> (its type, whether a value keeps the rule, the rule and the value that turns it off).
_RULES: dict[str, tuple[type, Callable[[Any], bool], str]] = {
    "max_new_tokens": (numbers.Integral, lambda x: x >= 1, "an integer of at least 1"),
    "min_new_tokens": (numbers.Integral, lambda x: x >= 0, "an integer that is not negative"),
    "temperature": (
        numbers.Real,
        lambda x: x >= 0,
        "a number that is not negative; 0 is greedy",
    ),
    "top_k": (numbers.Integral, lambda x: x >= 0, "an integer that is not negative; 0 is off"),
    "top_p": (numbers.Real, lambda x: 0 < x <= 1, "in (0, 1]; 1 is off"),
    "min_p": (numbers.Real, lambda x: 0 <= x <= 1, "in [0, 1]; 0 is off"),
    "repetition_penalty": (numbers.Real, lambda x: x > 0, "a positive number; 1 is off"),
    "presence_penalty": (numbers.Real, lambda x: True, "a number; 0 is off"),
    "frequency_penalty": (numbers.Real, lambda x: True, "a number; 0 is off"),
    "logprobs": (numbers.Integral, lambda x: 0 <= x <= MAX_LOGPROBS, f"0 to {MAX_LOGPROBS}"),
    "prompt_logprobs": (
        numbers.Integral,
        lambda x: 0 <= x <= MAX_LOGPROBS,
        f"0 to {MAX_LOGPROBS}",
    ),
    "seed": (
        numbers.Integral,
        lambda x: -(2**63) <= x < 2**63,
        "an integer of at most 64 bits; 0 is the default",
    ),
}


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Settings of a generation, checked when they are built.

    None takes the value of the model folder's generation_config.json, or that of DEFAULTS if it
    states none.

    Raises:
      ConfigError: a value that breaks its rule.
    """

    max_new_tokens: int = 256
    """Tokens to generate, at most; a row also ends where the model's positions end."""
    temperature: float | None = None
    """Divides the logits; 0 is greedy, and top_k and top_p then have no effect."""
    top_k: int | None = None
    """Draws from the k most likely tokens; 0 is off."""
    top_p: float | None = None
    """Draws from the fewest most likely tokens whose probability reaches top_p; 1 is off."""
    repetition_penalty: float | None = None
    """Divides positive logits of tokens seen before, multiplies negative ones; 1 is off."""
    seed: int = 0
    """Random seed for sampling."""
    stop_ids: tuple[int, ...] | None = None
    """Token ids that end a row; () ends none.  None takes those of the tokenizer and the model."""
    min_new_tokens: int = 0
    """No stop id is drawn before this many tokens."""
    min_p: float = 0.0
    """Excludes tokens less likely than this share of the most likely one; 0 is off."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens drawn before; 0 is off."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit for each time that it was drawn before; 0 is off."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Added to the logits of token ids: a mapping, or pairs of an id and a number."""
    logprobs: int | None = None
    """With each new token its log-probability and those of this many most likely ones."""
    prompt_logprobs: int | None = None
    """As logprobs, for the tokens of the prompt."""

    def __post_init__(self) -> None:
        for name, rule in _RULES.items():
            value = getattr(self, name)
            if value is not None or name not in (*DEFAULTS, "logprobs", "prompt_logprobs"):
                object.__setattr__(self, name, _checked(name, value, rule))
        if self.stop_ids is not None:
            object.__setattr__(self, "stop_ids", _checked_stop_ids(self.stop_ids))
        object.__setattr__(self, "logit_bias", _checked_bias(self.logit_bias))

    def resolved(self, recommended: Mapping[str, float | int]) -> Self:
        """The same with every None of DEFAULTS replaced: by `recommended`, else by the default."""
        values = DEFAULTS | dict(recommended)
        missing = {name for name in DEFAULTS if getattr(self, name) is None}
        return dataclasses.replace(self, **{name: values[name] for name in missing})


def read_sampling(folder: "Place") -> dict[str, float | int]:
    """temperature, top_k, top_p and repetition_penalty of the folder, those that it states.

    `do_sample: false` is temperature 0 (greedy).  A top_k of 0 or below turns top-k off.  Returns
    {} without the file, as in a run's workdir.

    Raises:
      ConfigError: a file that is not JSON, or a value outside its range.
    """
    if not folder.is_file(_FILE):
        return {}
    path = f"{folder}/{_FILE}"
    stated = json_object(path, folder.read(_FILE))
    found: dict[str, float | int] = {}
    for name in DEFAULTS:
        value = stated.get(name)
        if name == "top_k" and type(value) is int:
            value = max(value, 0)
        if value is not None:
            found[name] = _checked(f"{path}: {name}", value, _RULES[name])
    return found | ({"temperature": 0.0} if stated.get("do_sample") is False else {})


def _checked(name: str, value: Any, rule: tuple[type, Callable[[Any], bool], str]) -> float | int:
    kind, is_ok, words = rule
    if isinstance(value, bool) or not isinstance(value, kind) or not is_ok(value):
        raise ConfigError(f"{name} = {value!r} must be {words}.")
    if not math.isfinite(value):
        raise ConfigError(f"{name} = {value!r} must be finite.")
    return int(value) if kind is numbers.Integral else float(value)


def _checked_stop_ids(value: Any) -> tuple[int, ...]:
    ids = (value,) if isinstance(value, numbers.Integral) else value
    if not isinstance(ids, tuple | list) or any(
        isinstance(i, bool) or not isinstance(i, numbers.Integral) or i < 0 for i in ids
    ):
        raise ConfigError(
            f"stop_ids = {value!r} must be token ids, none of them negative; () ends no row early."
        )
    return tuple(map(int, ids))


def _checked_bias(value: Any) -> tuple[tuple[int, float], ...]:
    rule = (numbers.Real, lambda x: True, "a number")
    try:
        pairs = [(token, bias) for token, bias in dict(value).items()]
        ids = _checked_stop_ids([token for token, _ in pairs])
    except (TypeError, ValueError) as e:
        raise ConfigError(
            f"logit_bias = {value!r} must map token ids, none of them negative, to numbers."
        ) from e
    return tuple(
        (token, _checked(f"logit_bias of {token}", bias, rule))
        for token, (_, bias) in zip(ids, pairs, strict=True)
    )
