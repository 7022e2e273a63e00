"""Rows of chats as tokens and labels: `messages`, or `prompt` and `completion`."""

import json
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from hunyuan_jax.chat.labels import IGNORED_LABEL, sft_example
from hunyuan_jax.chat.render import USER_END, render_chat
from hunyuan_jax.data.examples import Text, text_of
from hunyuan_jax.tokenizer import Tokenizer

Messages = Sequence[Mapping[str, Any]]


def chat_of(row: Mapping[str, Any], tokenizer: Tokenizer) -> tuple[Text, ...]:
    """Returns the one text of a row of chats.

    A row has `messages`, or `prompt` and `completion`, each a text or a list of messages; and
    maybe `tools`, for a template that shows them.

    Raises:
      ValueError: one line about what is wrong with the row.
    """
    if row.get("messages") is not None:
        return (conversation([], row["messages"], tokenizer, tools_of(row)),)
    if row.get("prompt") is not None and row.get("completion") is not None:
        return (answered(row["prompt"], row["completion"], tokenizer, tools_of(row)),)
    raise ValueError(
        f"a row has 'messages', or 'prompt' and 'completion'; this one has {list(row)[:5]}"
    )


def tools_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a row gives its template beside the messages."""
    tools = row.get("tools")
    if isinstance(tools, str) and tools:
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise ValueError(f"tools is not JSON ({error})") from error
    return {"tools": tools} if tools else {}


def answered(
    prompt: str | Messages, completion: str | Messages, tokenizer: Tokenizer, tools: dict[str, Any]
) -> Text:
    """Returns a prompt and its completion, which alone is learned.

    Two texts follow each other, without bos, and eos ends them.  They are encoded one by one, as
    `generate` encodes a prompt.  With a prompt of messages the completion is what the
    assistant says next.

    Raises:
      ValueError: one line about what is wrong.
    """
    if isinstance(prompt, str) and isinstance(completion, str):
        if not completion:
            raise ValueError("the completion is empty; nothing would be learned but to stop")
        start = tokenizer.encode(prompt)
        end = [*tokenizer.encode(completion), tokenizer.eos_id]
        if not start:
            raise ValueError("the prompt is empty")
        return text_of([*start, *end], [False] * len(start) + [True] * len(end))
    if isinstance(prompt, str):
        raise ValueError(  # noqa: TRY004 a row's fault, like the others
            "prompt is a text but completion is not; make both texts, or both lists"
        )
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    return conversation(prompt, completion, tokenizer, tools)


def conversation(
    prompt: Messages, messages: Messages, tokenizer: Tokenizer, tools: dict[str, Any]
) -> Text:
    """Returns a chat by the tokenizer's template; what the assistant says in `messages`, after
    those of `prompt`, is learned, up to and including the token that stops it.

    Raises:
      ValueError: one line about what is wrong: no message, an unknown role, two assistants in a
        row, nothing of the assistant, or a message that the template leaves out.
    """
    for name, part in (("prompt", prompt), ("messages", messages)):
        if isinstance(part, str | Mapping) or not isinstance(part, Sequence):
            raise ValueError(  # noqa: TRY004 a row's fault, like the others
                f"{name} is a {type(part).__name__}; it must be a list of messages"
            )
    if not messages:
        raise ValueError("the chat is empty")
    chat = [*prompt, *messages]
    roles = [m.get("role") if isinstance(m, Mapping) else None for m in chat]
    for index in range(1, len(roles)):
        if roles[index - 1] == roles[index] == "assistant":
            raise ValueError(
                f"messages[{index}] follows another message of the assistant; join the two"
            )
    if "assistant" not in roles[len(prompt) :]:
        raise ValueError("the assistant says nothing in this chat; there is nothing to learn")
    with warnings.catch_warnings():
        # Of a message that the template leaves out: the model would learn without seeing it.
        warnings.simplefilter("error", UserWarning)
        try:
            ids, labels = sft_example(chat, tokenizer, **tools)
            start = len(render_chat(prompt, tokenizer, **tools)) if prompt else 0
        except UserWarning as error:
            raise ValueError(str(error)) from error
    is_learned = [i >= start and label != IGNORED_LABEL for i, label in enumerate(labels)]
    _unlearn_what_others_write(ids, is_learned, tokenizer)
    if not any(is_learned[1:]):
        raise ValueError("the assistant's text is empty; there is nothing to learn")
    return text_of(ids, is_learned)


def _unlearn_what_others_write(
    ids: list[int], is_learned: list[bool], tokenizer: Tokenizer
) -> None:
    """Takes the labels off what is not the assistant's text or the token that stops it.

    The official labels begin with the end of the user's turn.  A template may write something
    behind the stop token, such as a line break, that a chat never asks the model for.
    """
    if tokenizer.chat_template is None:
        user_end = tokenizer.special_id(USER_END)
        is_learned[:] = [
            is_label and i != user_end for i, is_label in zip(ids, is_learned, strict=True)
        ]
        return
    stops = {tokenizer.eos_id, *tokenizer.stop_ids}
    start = 0
    while start < len(ids):
        if not is_learned[start]:
            start += 1
            continue
        end = start
        while end < len(ids) and is_learned[end]:
            end += 1
        last = max((i for i in range(start, end) if ids[i] in stops), default=end - 1)
        is_learned[last + 1 : end] = [False] * (end - last - 1)
        start = end
