"""Chat templates in jinja, as model folders bring them: rendered in a sandbox, with the settings
and helpers of transformers.
"""

import datetime
import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from hunyuan_jax.tokenizer import Tokenizer

# Around the number of a special token whose name stands in somebody's text while the template is
# rendered: private characters.
_OPEN, _CLOSE = "\ue000", "\ue001"
_STAND_IN = re.compile(f"{_OPEN}(\\d+){_CLOSE}")


def encode_chat(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    *,
    parse_special: bool,
    add_generation_prompt: bool,
    **variables: Any,
) -> list[int]:
    """Return the ids of the chat under the tokenizer's template, a list of int.

    Names of special tokens that the template writes are tokens; those in the messages are text
    unless `parse_special`, which is what transformers does.  `variables` are further names that
    the template can use, such as enable_thinking or tools.

    Raises ValueError with one line for a template that cannot be read or fails, and with the
    template's own word where it refuses.
    """
    names = tokenizer.special_names
    shown = messages if parse_special else _map_texts(messages, lambda text: _hide(text, names))
    text = render(
        tokenizer.chat_template,
        shown,
        tokenizer.named_tokens,
        add_generation_prompt=add_generation_prompt,
        **variables,
    )
    if not _STAND_IN.search(text):
        return tokenizer.encode(text, parse_special=True)
    ids = []
    for piece in re.split(_any_of(names), text):
        if piece in names:
            ids.append(tokenizer.special_id(piece))
        else:
            ids += tokenizer.encode(_STAND_IN.sub(lambda found: names[int(found[1])], piece))
    return ids


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    named_tokens: Mapping[str, str],
    *,
    add_generation_prompt: bool,
    **variables: Any,
) -> str:
    """Return the text of the chat; errors as in `encode_chat`."""
    from jinja2 import TemplateError

    try:
        compiled = _compile(template)
    except TemplateError as e:
        raise ValueError(
            f"the chat template cannot be read: {_one_line(e)}; correct it, or take the one of "
            "the model's folder"
        ) from e
    values = {
        **named_tokens,
        **variables,
        "messages": messages,
        "add_generation_prompt": add_generation_prompt,
    }
    try:
        return compiled.render(values)
    except Refusal as e:
        raise ValueError(f"the chat template refuses this chat: {_one_line(e)}") from e
    except Exception as e:  # the template is a program of somebody else, and fails like one
        raise ValueError(
            f"the chat template fails on this chat: {type(e).__name__}: {_one_line(e)}; change "
            "the messages, or take another template"
        ) from e


class Refusal(Exception):
    """What `raise_exception` of a template raises."""


@functools.lru_cache(maxsize=16)
def _compile(template: str) -> Any:
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(template)


def _refuse(message: str) -> None:
    raise Refusal(message)


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    # jinja's own escapes for HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _hide(text: str, names: tuple[str, ...]) -> str:
    if not names:
        return text
    return re.sub(_any_of(names), lambda found: f"{_OPEN}{names.index(found[0])}{_CLOSE}", text)


@functools.lru_cache(maxsize=16)
def _any_of(names: tuple[str, ...]) -> re.Pattern:
    """Matches a name; in a group, so that `split` keeps it.  Of two that begin alike the longer
    one.
    """
    return re.compile("(" + "|".join(map(re.escape, sorted(names, key=len, reverse=True))) + ")")


def _map_texts(value: Any, change: Any) -> Any:
    """The messages with every text but a role changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {
            key: item if key == "role" else _map_texts(item, change) for key, item in value.items()
        }
    return (
        [_map_texts(item, change) for item in value] if isinstance(value, list | tuple) else value
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
