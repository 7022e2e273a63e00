"""Chats as token ids, by Hunyuan-Large's template or a folder's own."""

import itertools
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from hunyuan_jax.chat import origin, template
from hunyuan_jax.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant")

_START = "<|startoftext|>"
_SYSTEM_END = "<|extra_4|>"
USER_END = "<|extra_0|>"
ASSISTANT_END = "<|eos|>"


def render_chat(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    *,
    parse_special: bool = False,
    add_generation_prompt: bool | None = None,
    enable_thinking: bool | None = None,
    **variables: Any,
) -> list[int]:
    """Returns the ids of a chat, a list of int.

    The template is that of the tokenizer's folder if it has one, else Hunyuan-Large's own.

    `messages` are {"role": "system" | "user" | "assistant", "content": str}.  A chat that ends
    with a user turn is a prompt: the model answers from its last id.  No default system message is
    added.  A jinja template decides about other roles and fields; a content may then be absent,
    None, or a list of parts.

    The template's own tokens are placed as ids; contents, tools and everything else of the caller
    are encoded as plain text, so that they cannot forge a turn.  `parse_special` turns token names
    inside them into tokens, as the official code and transformers do.

    For a jinja template only: `add_generation_prompt`, by default true unless the last turn is the
    assistant's; further `variables`, such as tools; and `enable_thinking`, for models that can
    think before they answer.  It is handed to a template that knows it; for one that knows
    `reasoning_effort`, as Hy3's does, it is the effort "high" or "no_think"; otherwise the last
    user turn begins with "/think" or "/no_think", which the models know too.

    In the built-in template (docs/model.md, Tokenizer) an empty first message makes the official
    one fail (or, outside its sandbox, repeat <|startoftext|>).  Here an empty system message is as
    good as none: the user after it starts with one <|startoftext|>.

    Raises ValueError for malformed messages, a tokenizer without the chat tokens, roles that the
    template leaves out, and what it cannot do.  Warns of other messages that it leaves out.
    """
    has_template = tokenizer.chat_template is not None
    fault = find_fault(messages, None if has_template else ROLES)
    if fault:
        raise ValueError(fault)
    if has_template:
        if add_generation_prompt is None:
            add_generation_prompt = messages[-1]["role"] != "assistant"
        if enable_thinking is not None:
            if "enable_thinking" in tokenizer.chat_template:
                variables["enable_thinking"] = enable_thinking
            elif "reasoning_effort" in tokenizer.chat_template:
                effort = "high" if enable_thinking else "no_think"
                variables.setdefault("reasoning_effort", effort)
            else:
                messages = _with_thinking_command(
                    messages, "/think" if enable_thinking else "/no_think"
                )
        variables["add_generation_prompt"] = add_generation_prompt
        return template.encode_chat(messages, tokenizer, parse_special=parse_special, **variables)
    given = {
        "add_generation_prompt": add_generation_prompt,
        "enable_thinking": enable_thinking,
        **variables,
    }
    given = [name for name, value in given.items() if value is not None]
    if given:
        raise ValueError(
            f"{given[0]} has no effect without a chat template: this tokenizer's folder has none; "
            "leave it out"
        )
    return template.encode_text(
        origin.concat(built_in_turns(messages, tokenizer)), tokenizer, parse_special
    )


def said(token_ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """The text that a model wrote as these ids, with the names of special tokens.

    In a message these are tokens again, unlike names that somebody has typed.
    """
    special = set(map(tokenizer.special_id, tokenizer.special_names))
    return origin.concat(
        origin.Text(tokenizer.decode(run), origin.OWN if is_special else origin.VARIABLE)
        for is_special, run in itertools.groupby(token_ids, key=special.__contains__)
    )


def _with_thinking_command(
    messages: Sequence[Mapping[str, Any]], command: str
) -> list[Mapping[str, Any]]:
    last = max(
        (index for index, message in enumerate(messages) if message["role"] == "user"),
        default=None,
    )
    if last is None:
        raise ValueError(
            f"enable_thinking puts {command} before a user turn, but the chat has none; add one"
        )
    content = messages[last].get("content") or ""
    if isinstance(content, str):
        content = f"{command} {content}"
    else:
        content = [{"type": "text", "text": f"{command} "}, *content]
    return [*messages[:last], {**messages[last], "content": content}, *messages[last + 1 :]]


def built_in_turns(
    messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer
) -> list[origin.Text]:
    """Returns the text of each message by Hunyuan-Large's template, the tokens as their names.

    Raises ValueError for a tokenizer without these tokens.
    """
    for name in (_START, _SYSTEM_END, USER_END, ASSISTANT_END):
        tokenizer.special_id(name)
    start, system_end, user_end, assistant_end = map(
        origin.own, (_START, _SYSTEM_END, USER_END, ASSISTANT_END)
    )
    has_head = messages[0]["content"] != ""
    turns = []
    for index, message in enumerate(messages):
        content = origin.written_by(message["content"], origin.of_message(index))
        if message["role"] == "assistant":
            parts = [content, assistant_end]
        elif message["role"] == "user":
            # The template goes by position alone: the second message continues the head, whatever
            # the head's role.
            is_first = not (index == 1 and has_head)
            parts = [start, content, user_end] if is_first else [content, user_end]
        elif index == 0 and has_head:
            parts = [start, content, system_end]
        else:
            parts = [content]
        turns.append(origin.concat(parts))
    return turns


def find_fault(
    messages: Sequence[Mapping[str, Any]], roles: tuple[str, ...] | None = None
) -> str | None:
    """Returns one line about the first thing that the template cannot hold, or None.

    With `roles` None a jinja template decides about roles, about messages that have other fields
    than a content, and about contents of parts.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        return (
            f"messages is a {type(messages).__name__}: a chat is a list of "
            '{"role", "content"}; pass the list itself'
        )
    if not messages:
        return (
            "messages is empty: a chat has at least one message; drop the record or add a message"
        )
    for index, message in enumerate(messages):
        needed = {"role"} if roles is None else {"role", "content"}
        if not isinstance(message, Mapping) or not needed <= message.keys():
            return (
                f"messages[{index}] is {reprlib.repr(message)}: a message is "
                '{"role", "content"}; add what is missing'
            )
        role, content = message["role"], message.get("content", "")
        if role not in (roles or (role,)) or not isinstance(role, str):
            known = ", ".join(roles or ("a string",))
            return (
                f"messages[{index}] has role {reprlib.repr(role)}: it must be {known}; rename the "
                "role or drop the message"
            )
        is_text = isinstance(content, str)
        if not is_text and (roles is not None or not _is_parts(content)):
            return (
                f"messages[{index}] has content {reprlib.repr(content)}: it must be a string; "
                "join its text parts into one"
            )
    return None


def _is_parts(content: Any) -> bool:
    """Whether a content is None or parts such as {"type": "text", "text": ...}."""
    return content is None or (
        isinstance(content, list | tuple) and all(isinstance(part, Mapping) for part in content)
    )
