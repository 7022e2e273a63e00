"""Chats as token ids: the official template and the labels of supervised fine-tuning."""

import itertools
import reprlib
from collections.abc import Mapping, Sequence

from hunyuan_jax.tokenizer import Tokenizer

IGNORED_LABEL = -100
ROLES = ("system", "user", "assistant")

_START = "<|startoftext|>"
_SYSTEM_END = "<|extra_4|>"
_USER_END = "<|extra_0|>"
_ASSISTANT_END = "<|eos|>"


def render_chat(messages: Sequence[Mapping[str, str]], tokenizer: Tokenizer, *, parse_special: bool = False) -> list[int]:
    """Return the ids of the official chat template (specification section 7), a list of int.

    `messages` are {"role": "system" | "user" | "assistant", "content": str}.  A chat that ends with a user turn is a
    prompt: its last id is <|extra_0|> and the model answers from there.  No default system message is added.

    The template's own tokens are placed as ids and contents are encoded as plain text, so that a content cannot forge a
    turn.  `parse_special` turns token names inside contents into tokens, as the official code does.

    An empty first message makes the official template fail (or, outside its sandbox, repeat <|startoftext|>).  Here
    an empty system message is as good as none: the user after it starts with one <|startoftext|>.

    Raises ValueError for malformed messages, and for a tokenizer without the chat tokens.
    """
    fault = _find_fault(messages)
    if fault:
        raise ValueError(fault)
    ids = []
    # Texts that meet (a system message after the first has no token around it) are joined before they are encoded.
    for is_text, group in itertools.groupby(_template_pieces(messages, tokenizer), key=lambda piece: isinstance(piece, str)):
        pieces = list(group)
        ids += tokenizer.encode("".join(pieces), parse_special=parse_special) if is_text else pieces
    return ids


def sft_example(
    messages: Sequence[Mapping[str, str]], tokenizer: Tokenizer, max_len: int | None = None, parse_special: bool = False
) -> tuple[list[int], list[int]]:
    """Return (ids, labels) of a chat for supervised fine-tuning (specification section 8), two lists of one length.

    The labels are not shifted.  They are the ids from the i-th <|extra_0|> through the i-th <|eos|>, both included, and
    -100 elsewhere, so the model also learns to close the user's turn.  Pairing is by order of appearance as in the
    official code: it is meaningful when user and assistant alternate, user first; an unanswered last turn has no labels.
    Both lists are cut on the right to `max_len`; labels are found first, so that a cut answer keeps its beginning.

    `parse_special` is that of `render_chat`; a token name inside a content then takes part in the pairing.
    Raises ValueError as `render_chat`, and for a max_len below 1.
    """
    if max_len is not None and max_len < 1:
        raise ValueError(f"max_len={max_len} keeps no token: it must be at least 1; raise it, or leave it None to keep all")
    ids = render_chat(messages, tokenizer, parse_special=parse_special)
    labels = _answer_labels(ids, tokenizer.special_id(_USER_END), tokenizer.special_id(_ASSISTANT_END))
    return ids[:max_len], labels[:max_len]


def _template_pieces(messages: Sequence[Mapping[str, str]], tokenizer: Tokenizer) -> list[int | str]:
    """Return the chat as special ids (int) and texts (str) in order."""
    start, system_end, user_end, assistant_end = map(tokenizer.special_id, (_START, _SYSTEM_END, _USER_END, _ASSISTANT_END))
    has_head = messages[0]["content"] != ""
    pieces = []
    for index, message in enumerate(messages):
        role, content = message["role"], message["content"]
        if role == "assistant":
            pieces += [content, assistant_end]
        elif role == "user":
            # The template goes by position alone: the second message continues the head, whatever the head's role.
            pieces += [content, user_end] if index == 1 and has_head else [start, content, user_end]
        elif index == 0 and has_head:
            pieces += [start, content, system_end]
        else:
            pieces.append(content)
    return pieces


def _answer_labels(ids: list[int], open_id: int, close_id: int) -> list[int]:
    """Copy `ids` between the i-th `open_id` and the i-th `close_id`, both included; IGNORED_LABEL elsewhere."""
    opens = [position for position, token_id in enumerate(ids) if token_id == open_id]
    closes = [position for position, token_id in enumerate(ids) if token_id == close_id]
    labels = [IGNORED_LABEL] * len(ids)
    for first, last in zip(opens, closes, strict=False):
        labels[first : last + 1] = ids[first : last + 1]
    return labels


def _find_fault(messages: Sequence[Mapping[str, str]]) -> str | None:
    """Return one line about the first thing that the template cannot hold, or None."""
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        return f'messages is a {type(messages).__name__}: a chat is a list of {{"role", "content"}}; pass the list itself'
    if not messages:
        return "messages is empty: a chat has at least one message; drop the record or add a message"
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            return f'messages[{index}] is {reprlib.repr(message)}: a message is {{"role", "content"}}; add what is missing'
        role, content = message["role"], message["content"]
        if role not in ROLES:
            return f"messages[{index}] has role {reprlib.repr(role)}: it must be {', '.join(ROLES)}; rename the role or drop the message"
        if not isinstance(content, str):
            return f"messages[{index}] has content {reprlib.repr(content)}: it must be a string; join its text parts into one"
    return None
