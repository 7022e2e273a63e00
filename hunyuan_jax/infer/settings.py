"""Settings of a generation, and those that a model folder recommends.

Imports no jax, so that a wrong setting is answered at once.
"""

import dataclasses
import math
import numbers
import struct
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Self

from hunyuan_jax.errors import ConfigError

if TYPE_CHECKING:
    from hunyuan_jax.storage import Place

# Field -> its value where neither the caller nor the model folder states one.
DEFAULTS = {
    "max_new_tokens": 256,
    "min_new_tokens": 0,
    "temperature": 0.8,
    "top_k": 20,
    "top_p": 0.95,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
}

# Most likely tokens of which log-probabilities can be had.
MAX_LOGPROBS = 20

_FILE = "generation_config.json"
# Fields of that file that change what is generated and are not implemented -> the values that
# change nothing; null changes nothing either.
_NOT_IMPLEMENTED: dict[str, tuple[Any, ...]] = {
    "bad_words_ids": ([],),
    "begin_suppress_tokens": ([],),
    "constraints": ([],),
    "diversity_penalty": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "exponential_decay_length_penalty": (),
    "force_words_ids": ([],),
    "forced_bos_token_id": (),
    "forced_decoder_ids": ([],),
    "forced_eos_token_id": (),
    "guidance_scale": (1,),
    "min_length": (0,),
    "no_repeat_ngram_size": (0,),
    "num_beams": (1,),
    "penalty_alpha": (0,),
    "sequence_bias": ({}, []),
    "stop_strings": ([], ""),
    "suppress_tokens": ([],),
    "top_h": (),
    "typical_p": (1,),
    "watermarking_config": (),
}

# Logits are float32.  With these limits a logit of a thousand times the largest penalty over the
# smallest temperature is still a finite number.
_LARGEST = 1e20
_SMALLEST_PENALTY = 1e-20
# Below it the draw is that of temperature 0 but for logits that are equal to the last bits.
_SMALLEST_TEMPERATURE = 1e-6
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
    "repetition_penalty": (
        numbers.Real,
        lambda x: x >= _SMALLEST_PENALTY,
        f"a positive number of at least {_SMALLEST_PENALTY}; 1 is off",
    ),
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
    states none.  The model computes in float32: a temperature below 1e-6 is 0, and a top_p that
    rounds to 1 is 1.

    Raises:
      ConfigError: a value that breaks its rule.
    """

    max_new_tokens: int | None = None
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
    min_new_tokens: int | None = None
    """No stop id is drawn before this many tokens."""
    min_p: float | None = None
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
                object.__setattr__(self, name, _limit(name, _checked(name, value, rule)))
        if self.stop_ids is not None:
            object.__setattr__(self, "stop_ids", checked_ids("stop_ids", self.stop_ids))
        object.__setattr__(self, "logit_bias", _checked_bias(self.logit_bias))

    def resolved(self, recommended: Mapping[str, float | int]) -> Self:
        """The same with every None of DEFAULTS replaced: by `recommended`, else by the default."""
        values = DEFAULTS | dict(recommended)
        missing = {name for name in DEFAULTS if getattr(self, name) is None}
        return dataclasses.replace(self, **{name: values[name] for name in missing})


def read_sampling(folder: "Place") -> dict[str, float | int]:
    """The fields of DEFAULTS that the folder states.

    `do_sample: false` is temperature 0 (greedy).  A top_k of 0 or below turns top-k off.  Returns
    {} without the file.  Warns of fields that would change what is generated but are not
    implemented.

    Raises:
      ConfigError: a file that is not JSON, or a value outside its range.
    """
    if not folder.is_file(_FILE):
        return {}
    path = f"{folder}/{_FILE}"
    stated = folder.read_json(_FILE)
    found: dict[str, float | int] = {}
    for name in DEFAULTS:
        value = stated.get(name)
        if name == "top_k" and type(value) is int:
            value = max(value, 0)
        if value is not None:
            found[name] = _limit(name, _checked(f"{path}: {name}", value, _RULES[name]))
    is_drawn = stated.get("do_sample")
    if not isinstance(is_drawn, bool | None):
        raise ConfigError(f"{path}: do_sample = {is_drawn!r} must be true or false.")
    ignored = [
        f"{name} = {stated[name]!r}"
        for name, neutral in _NOT_IMPLEMENTED.items()
        if stated.get(name) is not None and stated[name] not in neutral
    ]
    if ignored:
        warnings.warn(
            f"{path}: {', '.join(ignored)}: not implemented, and has no effect here.", stacklevel=2
        )
    return found | ({"temperature": 0.0} if is_drawn is False else {})


def _checked(name: str, value: Any, rule: tuple[type, Callable[[Any], bool], str]) -> float | int:
    kind, is_ok, words = rule
    if isinstance(value, bool) or not isinstance(value, kind) or not is_ok(value):
        raise ConfigError(f"{name} = {value!r} must be {words}.")
    if kind is numbers.Integral:
        return int(value)
    if not math.isfinite(value):
        raise ConfigError(f"{name} = {value!r} must be finite.")
    if abs(value) > _LARGEST:
        raise ConfigError(f"{name} = {value!r} must be at most {_LARGEST} in size, for float32.")
    return float(value)


def _limit(name: str, value: float | int) -> float | int:
    """The value, or the one that 32 bits cannot tell from it."""
    if name == "temperature" and value < _SMALLEST_TEMPERATURE:
        return 0.0
    if name == "top_k":
        return min(value, 2**31 - 1)
    if name == "top_p" and struct.unpack("f", struct.pack("f", value))[0] == 1:
        return 1.0
    return value


def checked_ids(name: str, value: Any) -> tuple[int, ...]:
    """The token ids of a setting, one or several.

    Raises:
      ConfigError: not integers from 0 that fit into 32 bits.
    """
    ids = (value,) if isinstance(value, numbers.Integral) else value
    if not isinstance(ids, tuple | list) or any(
        isinstance(i, bool) or not isinstance(i, numbers.Integral) or not 0 <= i < 2**31
        for i in ids
    ):
        raise ConfigError(
            f"{name} = {value!r} must be token ids, integers from 0 to {2**31 - 1}; () is none."
        )
    return tuple(map(int, ids))


def _checked_bias(value: Any) -> tuple[tuple[int, float], ...]:
    rule = (numbers.Real, lambda x: True, "a number")
    try:
        pairs = [(token, bias) for token, bias in dict(value).items()]
        ids = checked_ids("logit_bias", [token for token, _ in pairs])
    except (TypeError, ValueError) as e:
        raise ConfigError(
            f"logit_bias = {value!r} must map token ids, none of them negative, to numbers."
        ) from e
    return tuple(
        (token, _checked(f"logit_bias of {token}", bias, rule))
        for token, (_, bias) in zip(ids, pairs, strict=True)
    )
