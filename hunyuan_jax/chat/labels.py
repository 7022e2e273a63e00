"""Labels of chats for fine-tuning: which tokens the model learns to write."""

from collections.abc import Mapping, Sequence
from typing import Any

from hunyuan_jax.chat import template
from hunyuan_jax.chat.render import ASSISTANT_END, USER_END, find_fault, render_chat
from hunyuan_jax.tokenizer import Tokenizer

IGNORED_LABEL = -100


def sft_example(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    max_len: int | None = None,
    parse_special: bool = False,
) -> tuple[list[int], list[int]]:
    """Returns (ids, labels) of a chat for supervised fine-tuning, two lists of one length.

    A label is the id at its position, not shifted, or -100 where nothing is learned.

    With a jinja template that marks what the assistant says by {% generation %} tags, the labels
    are the tokens that overlap it, as in transformers.  With others they are what each assistant
    turn adds to the prompt before it.
    With the built-in template they are the ids from the i-th <|extra_0|> to the i-th <|eos|>, both
    included, so the model also learns to close the user's turn (docs/model.md, Tokenizer).  Tokens
    are paired in order of appearance, as in the official code.  That is meaningful if user and
    assistant alternate, user first; an unanswered last turn has no labels.

    Args:
      messages: see `render_chat`.
      tokenizer: see `render_chat`.
      max_len: both lists are cut on the right to this length.  Labels are found before, so a cut
        answer keeps its beginning.
      parse_special: see `render_chat`; a token name inside a content then takes part in the
        pairing.

    Raises:
      ValueError: as `render_chat`, for a max_len below 1, and for a template that writes earlier
        turns differently once later ones follow.
    """
    if max_len is not None and max_len < 1:
        raise ValueError(
            f"max_len={max_len} keeps no token: it must be at least 1; raise it, or leave it None "
            "to keep all"
        )
    if tokenizer.chat_template is None:
        ids = render_chat(messages, tokenizer, parse_special=parse_special)
        labels = _answer_labels(
            ids, tokenizer.special_id(USER_END), tokenizer.special_id(ASSISTANT_END)
        )
    elif template.has_generation_tag(tokenizer.chat_template):
        ids, labels = _labelled_by_tags(messages, tokenizer, parse_special)
    else:
        ids, labels = _labelled_by_prefixes(messages, tokenizer, parse_special)
    return ids[:max_len], labels[:max_len]


def _labelled_by_tags(
    messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, parse_special: bool
) -> tuple[list[int], list[int]]:
    if fault := find_fault(messages):
        raise ValueError(fault)
    ids, is_learned = template.encode_learned(messages, tokenizer, parse_special=parse_special)
    return ids, [
        i if is_label else IGNORED_LABEL for i, is_label in zip(ids, is_learned, strict=True)
    ]


def _labelled_by_prefixes(
    messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, parse_special: bool
) -> tuple[list[int], list[int]]:
    """Labels under a jinja template: an answer is what the chat up to it adds to its prompt."""

    def rendered(num_messages: int, is_prompt: bool) -> list[int]:
        return render_chat(
            messages[:num_messages],
            tokenizer,
            parse_special=parse_special,
            add_generation_prompt=is_prompt,
        )

    ids = rendered(len(messages), is_prompt=False)
    labels = [IGNORED_LABEL] * len(ids)
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = rendered(index, is_prompt=True) if index else []
        answered = rendered(index + 1, is_prompt=False)
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
