"""Labels of chats for fine-tuning: which tokens the model learns to write."""

from collections.abc import Mapping, Sequence
from typing import Any

from hunyuan_jax.chat import origin, template
from hunyuan_jax.chat.render import (
    ASSISTANT_END,
    ROLES,
    USER_END,
    built_in_turns,
    find_fault,
    render_chat,
)
from hunyuan_jax.tokenizer import Tokenizer

IGNORED_LABEL = -100


def sft_example(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    max_len: int | None = None,
    parse_special: bool = False,
    **variables: Any,
) -> tuple[list[int], list[int]]:
    """Returns (ids, labels) of a chat for supervised fine-tuning, two lists of one length.

    A label is the id at its position, not shifted, or -100 where nothing is learned.

    With a jinja template that marks what the assistant says by {% generation %} tags, the labels
    are the tokens that overlap it, as in transformers.  With others they are what each assistant
    turn adds to the prompt before it.
    With the built-in template they are each assistant's turn, its <|eos|> included, and the
    <|extra_0|> before it, so the model also learns to close the user's turn.  Where user and
    assistant alternate this is what the official code learns (docs/model.md, Tokenizer).

    Args:
      messages: see `render_chat`.
      tokenizer: see `render_chat`.
      max_len: both lists are cut on the right to this length.  Labels are found before, so a cut
        answer keeps its beginning.
      parse_special: see `render_chat`; with the built-in template labels are then those of the
        official code for any chat: from the i-th <|extra_0|> to the i-th <|eos|>, whoever wrote
        them.
      variables: of a jinja template, such as tools.

    Raises:
      ValueError: as `render_chat`, for a max_len below 1, and for a template that writes earlier
        turns differently once later ones follow.
    """
    if max_len is not None and max_len < 1:
        raise ValueError(
            f"max_len={max_len} keeps no token: it must be at least 1; raise it, or leave it None "
            "to keep all"
        )
    is_built_in = tokenizer.chat_template is None
    if fault := find_fault(messages, ROLES if is_built_in else None):
        raise ValueError(fault)
    if is_built_in and parse_special:
        ids = render_chat(messages, tokenizer, parse_special=True)
        labels = _answer_labels(
            ids, tokenizer.special_id(USER_END), tokenizer.special_id(ASSISTANT_END)
        )
    elif is_built_in and variables:
        raise ValueError(f"{next(iter(variables))} has no effect without a chat template")
    elif is_built_in:
        ids, labels = _labelled_by_turns(messages, tokenizer)
    elif template.has_generation_tag(tokenizer.chat_template):
        ids, labels = _labelled_by_tags(messages, tokenizer, parse_special, variables)
    else:
        ids, labels = _labelled_by_prefixes(messages, tokenizer, parse_special, variables)
    return ids[:max_len], labels[:max_len]


def _labelled_by_turns(
    messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer
) -> tuple[list[int], list[int]]:
    """Labels under the built-in template."""
    turns = built_in_turns(messages, tokenizer)
    spans, end, before = [], 0, ""
    for message, turn in zip(messages, turns, strict=True):
        start, end = end, end + len(turn)
        if message["role"] == "assistant":
            spans.append((start - len(USER_END) * before.endswith(USER_END), end))
        # A content that says it is not the token.
        before = turn if message["role"] == "user" else ""
    return _labels(origin.concat(turns), spans, tokenizer, parse_special=False)


def _labelled_by_tags(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    parse_special: bool,
    variables: Mapping[str, Any],
) -> tuple[list[int], list[int]]:
    text = template.render(tokenizer, messages, add_generation_prompt=False, **variables)
    return _labels(text, origin.learned_spans(text), tokenizer, parse_special)


def _labels(
    text: origin.Text, spans: list[tuple[int, int]], tokenizer: Tokenizer, parse_special: bool
) -> tuple[list[int], list[int]]:
    """(ids, labels) of a rendered chat; what overlaps a span is learned."""
    ids, is_learned = template.encode_spans(text, spans, tokenizer, parse_special=parse_special)
    return ids, [
        token_id if is_label else IGNORED_LABEL
        for token_id, is_label in zip(ids, is_learned, strict=True)
    ]


def _labelled_by_prefixes(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    parse_special: bool,
    variables: Mapping[str, Any],
) -> tuple[list[int], list[int]]:
    """Labels under a jinja template: an answer is what the chat up to it adds to its prompt."""

    def rendered(num_messages: int, is_prompt: bool) -> list[int]:
        return render_chat(
            messages[:num_messages],
            tokenizer,
            parse_special=parse_special,
            add_generation_prompt=is_prompt,
            **variables,
        )

    def opening(answered: list[int]) -> list[int]:
        """What stands before the text of a chat's first message, such as a system prompt that the
        template adds.
        """
        text = template.render(tokenizer, messages[:1], add_generation_prompt=False, **variables)
        first = origin.first_of_message(text, 0)
        _, is_said = template.encode_spans(
            text, [(first, len(text))], tokenizer, parse_special=parse_special
        )
        return answered[: is_said.index(True)] if True in is_said else answered

    ids = rendered(len(messages), is_prompt=False)
    labels = [IGNORED_LABEL] * len(ids)
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        answered = rendered(index + 1, is_prompt=False)
        prompt = rendered(index, is_prompt=True) if index else opening(answered)
        if answered[: len(prompt)] != prompt or ids[: len(answered)] != answered:
            raise ValueError(
                f"messages[{index}] cannot be labelled: this chat template writes the turns "
                "before it differently once it is there, or it "
                "once more turns follow; train on chats that end with it"
            )
        labels[len(prompt) : len(answered)] = ids[len(prompt) : len(answered)]
    return ids, labels


def _answer_labels(ids: list[int], open_id: int, close_id: int) -> list[int]:
    """Copies `ids` from the i-th `open_id` to the i-th `close_id`, both included.

    All other labels are IGNORED_LABEL.
    """
    opens = [position for position, token_id in enumerate(ids) if token_id == open_id]
    closes = [position for position, token_id in enumerate(ids) if token_id == close_id]
    labels = [IGNORED_LABEL] * len(ids)
    for first, last in zip(opens, closes, strict=False):
        labels[first : last + 1] = ids[first : last + 1]
    return labels
