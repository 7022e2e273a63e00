"""The fields of a request: one table for each endpoint, with type, range and default.

A field that is null has its default, and fields that are in no table are ignored, as OpenAI's
clients expect.  What would change the answer and cannot be done is refused.
"""

import json
import reprlib
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple, NoReturn

from hunyuan_jax.infer.settings import MAX_LOGPROBS
from hunyuan_jax.serve.errors import Refused

MAX_CHOICES = 128
MAX_MESSAGES = 4096
MAX_PROMPTS = 2048
_MAX_STOPS = 16
_MAX_STOP_LENGTH = 1024
_MAX_BIASES = 1024
_MAX_NAME = 256


class Field(NamedTuple):
    """read: returns the value, or raises ValueError; rule: what it must be, in words."""

    read: Callable[[Any], Any]
    rule: str
    default: Any = None


def parse_json(body: bytes) -> dict[str, Any]:
    """The object that a body holds.

    Raises:
      Refused: not JSON, or not an object.
    """
    try:
        value = json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError) as e:
        reason = "it is nested too deeply" if isinstance(e, RecursionError) else str(e)
        raise Refused(f"the body is not valid JSON: {reason}.") from None
    if not isinstance(value, dict):
        raise Refused(f"the body is a JSON {type(value).__name__}; it must be an object.")
    return value


def read_fields(table: Mapping[str, Field], body: Mapping[str, Any]) -> SimpleNamespace:
    """Every field of the table, from the body or by default.

    Raises:
      Refused: a value that breaks its rule.
    """
    values = {}
    for name, field in table.items():
        value = body.get(name)
        if value is None:
            values[name] = field.default
            continue
        try:
            values[name] = field.read(value)
        except (ValueError, OverflowError):
            raise Refused(
                f"{name} = {reprlib.repr(value)} must be {field.rule}.", param=name
            ) from None
    return SimpleNamespace(**values)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _check(is_ok: bool) -> None:
    if not is_ok:
        raise ValueError


def _integer(low: int, high: int) -> Callable[[Any], int]:
    def read(value: Any) -> int:
        _check(isinstance(value, int | float) and not isinstance(value, bool))
        _check(low <= value <= high and value == int(value))
        return int(value)

    return read


def _number(low: float, high: float) -> Callable[[Any], float]:
    def read(value: Any) -> float:
        _check(isinstance(value, int | float) and not isinstance(value, bool))
        _check(low <= value <= high)
        return float(value)

    return read


def _positive(high: float) -> Callable[[Any], float]:
    def read(value: Any) -> float:
        number = _number(0, high)(value)
        _check(number > 0)
        return number

    return read


def _boolean(value: Any) -> bool:
    _check(isinstance(value, bool))
    return value


def _text(longest: int) -> Callable[[Any], str]:
    def read(value: Any) -> str:
        _check(isinstance(value, str) and len(value) <= longest)
        return value

    return read


def _stops(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    _check(isinstance(stops, list) and len(stops) <= _MAX_STOPS)
    _check(all(isinstance(stop, str) and 0 < len(stop) <= _MAX_STOP_LENGTH for stop in stops))
    return tuple(stops)


def ids(value: Any) -> tuple[int, ...]:
    """A list of token ids.

    Raises:
      ValueError: anything else.
    """
    _check(isinstance(value, list) and all(type(item) is int and item >= 0 for item in value))
    return tuple(value)


def _few_ids(value: Any) -> tuple[int, ...]:
    found = ids(value)
    _check(len(found) <= _MAX_STOPS)
    return found


def _biases(value: Any) -> dict[int, float]:
    _check(isinstance(value, dict) and len(value) <= _MAX_BIASES)
    _check(all(key.isascii() and key.isdecimal() and len(key) < 12 for key in value))
    read = _number(-100, 100)
    return {int(key): read(bias) for key, bias in value.items()}


def _prompt(value: Any) -> list[str | tuple[int, ...]]:
    if isinstance(value, str):
        return [value]
    _check(isinstance(value, list) and len(value) > 0)
    if type(value[0]) is int:
        return [ids(value)]
    _check(len(value) <= MAX_PROMPTS)
    if isinstance(value[0], str):
        _check(all(isinstance(item, str) for item in value))
        return value
    return [ids(item) for item in value]


def _messages(value: Any) -> list[dict[str, Any]]:
    _check(isinstance(value, list) and 0 < len(value) <= MAX_MESSAGES)
    _check(all(isinstance(message, dict) for message in value))
    return value


def _stream_options(value: Any) -> SimpleNamespace:
    _check(isinstance(value, dict))
    names = ("include_usage", "continuous_usage_stats")
    return SimpleNamespace(
        **{name: value.get(name) is not None and _boolean(value[name]) for name in names}
    )


def _template_values(value: Any) -> dict[str, Any]:
    _check(isinstance(value, dict) and len(value) <= 32)
    scalars = str | int | float | bool
    _check(all(name.isidentifier() and isinstance(item, scalars) for name, item in value.items()))
    return value


def _only(*allowed: Any) -> Callable[[Any], None]:
    """For a field whose default is the only value that is accepted."""

    def read(value: Any) -> None:
        _check(any(value == item and type(value) is type(item) for item in allowed))

    return read


_SEED = 2**63
_BIGGEST = 2**31 - 1
_NO_TOOLS = "absent: this server has no tool calling"

_MODEL = {"model": Field(_text(_MAX_NAME), "the name of the model")}

_SHARED = {
    **_MODEL,
    "n": Field(_integer(1, MAX_CHOICES), f"an integer of 1 to {MAX_CHOICES}", 1),
    "stream": Field(_boolean, "true or false", False),
    "stream_options": Field(
        _stream_options,
        "an object of include_usage and continuous_usage_stats, each true or false",
        SimpleNamespace(include_usage=False, continuous_usage_stats=False),
    ),
    "temperature": Field(_number(0, 100), "a number of 0 to 100; 0 is greedy"),
    "top_p": Field(_number(0, 1), "a number of 0 to 1; 1 is off"),
    "top_k": Field(_integer(-1, _BIGGEST), "an integer of at least -1; -1 and 0 are off"),
    "min_p": Field(_number(0, 1), "a number of 0 to 1; 0 is off"),
    "repetition_penalty": Field(_positive(100), "a number above 0, up to 100; 1 is off"),
    "presence_penalty": Field(_number(-2, 2), "a number of -2 to 2; 0 is off", 0.0),
    "frequency_penalty": Field(_number(-2, 2), "a number of -2 to 2; 0 is off", 0.0),
    "logit_bias": Field(
        _biases, f"an object of at most {_MAX_BIASES} token ids with numbers of -100 to 100", {}
    ),
    "seed": Field(_integer(-_SEED, _SEED - 1), "an integer of 64 bits"),
    "min_tokens": Field(_integer(0, _BIGGEST), "an integer that is not negative"),
    "stop": Field(
        _stops,
        f"a text or at most {_MAX_STOPS} texts, each of 1 to {_MAX_STOP_LENGTH} characters",
        (),
    ),
    "stop_token_ids": Field(_few_ids, f"a list of at most {_MAX_STOPS} token ids", ()),
    "ignore_eos": Field(_boolean, "true or false", False),
    "include_stop_str_in_output": Field(_boolean, "true or false", False),
    "skip_special_tokens": Field(_boolean, "true or false", True),
    "prompt_logprobs": Field(_integer(0, MAX_LOGPROBS), f"an integer of 0 to {MAX_LOGPROBS}"),
    "return_token_ids": Field(_boolean, "true or false", False),
    "return_tokens_as_token_ids": Field(_boolean, "true or false", False),
    "truncate_prompt_tokens": Field(
        _integer(-1, _BIGGEST), "an integer of at least 1, or -1 for what fits"
    ),
    "cache_salt": Field(_text(_MAX_NAME), f"a text of at most {_MAX_NAME} characters", ""),
    "user": Field(_text(_MAX_NAME * 4), "a text", ""),
}

COMPLETION = {
    **_SHARED,
    "prompt": Field(
        _prompt,
        f"a text, a list of token ids, or a list of either, at most {MAX_PROMPTS} of them",
    ),
    "max_tokens": Field(_integer(0, _BIGGEST), "an integer that is not negative", 16),
    "echo": Field(_boolean, "true or false", False),
    "logprobs": Field(_integer(0, MAX_LOGPROBS), f"an integer of 0 to {MAX_LOGPROBS}"),
    "best_of": Field(_integer(1, MAX_CHOICES), "absent or equal to n"),
    "suffix": Field(_only(""), "absent: this model cannot fill in the middle"),
}

CHAT = {
    **_SHARED,
    "messages": Field(
        _messages, f"a list of 1 to {MAX_MESSAGES} objects with a role and a content"
    ),
    "max_completion_tokens": Field(_integer(1, _BIGGEST), "an integer of at least 1"),
    "max_tokens": Field(_integer(1, _BIGGEST), "an integer of at least 1"),
    "logprobs": Field(_boolean, "true or false", False),
    "top_logprobs": Field(_integer(0, MAX_LOGPROBS), f"an integer of 0 to {MAX_LOGPROBS}", 0),
    "add_generation_prompt": Field(_boolean, "true or false"),
    "continue_final_message": Field(_boolean, "true or false", False),
    "chat_template_kwargs": Field(
        _template_values, "an object of at most 32 names with texts, numbers or booleans", {}
    ),
    "include_reasoning": Field(_boolean, "true or false", True),
    "reasoning_effort": Field(_text(_MAX_NAME), "a word that the chat template knows"),
    "response_format": Field(_only({"type": "text"}), 'absent or {"type": "text"}'),
    "tools": Field(_only([]), _NO_TOOLS),
    "functions": Field(_only([]), _NO_TOOLS),
    "tool_choice": Field(_only("none", "auto"), _NO_TOOLS),
    "chat_template": Field(_only(""), "absent: the server renders the model's own template only"),
    "modalities": Field(_only(["text"]), 'absent or ["text"]'),
}

TOKENIZE = {
    **_MODEL,
    "prompt": Field(_text(2**31), "a text"),
    "messages": CHAT["messages"],
    "add_generation_prompt": CHAT["add_generation_prompt"],
    "continue_final_message": CHAT["continue_final_message"],
    "chat_template_kwargs": CHAT["chat_template_kwargs"],
    "reasoning_effort": CHAT["reasoning_effort"],
    "chat_template": CHAT["chat_template"],
    "return_token_strs": Field(_boolean, "true or false", False),
}

DETOKENIZE = {**_MODEL, "tokens": Field(ids, "a list of token ids")}
