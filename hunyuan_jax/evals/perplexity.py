"""Log-probabilities of whole texts: bits per byte, and loss by position."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from hunyuan_jax.evals.answers import Answers, Failed, Ids, Scored


class Window(NamedTuple):
    """A piece of a text that the model reads at once, and of it the tokens that count here."""

    context: Ids
    continuation: Ids


def windows(ids: Ids, prefix_id: int, max_length: int) -> list[Window]:
    """Splits a text of any length; each token counts once, the first one behind `prefix_id`.

    The windows are those of lm-eval with a context of one token: a window begins with the last
    token of the one before, and the last window reaches back as far as the model can read.
    """
    whole, found, start = [prefix_id, *ids], [], 0
    while start < len(ids):
        stop = min(start + max_length, len(ids))
        first = max(0, stop - max_length) if start else 0
        found.append(Window(whole[first : start + 1], whole[start + 1 : stop + 1]))
        start = stop
    return found


def score_rolling(
    answers: Answers,
    rows: Sequence[Ids],
    prefix_id: int,
    max_length: int | None = None,
    on_done: Callable[[int], None] = lambda place: None,
) -> list[Scored | Failed]:
    """The log-probabilities of all tokens of texts, float32 [len(row)] each.

    Args:
      rows: ids of each text.
      prefix_id: stands before each text.
      max_length: of a window; None takes what the model reads.
      on_done: told the place of each text that has its score, maybe more than once.
    """
    size = max_length or answers.max_length
    pieces = [
        (place, window)
        for place, row in enumerate(rows)
        for window in windows(row, prefix_id, size)
    ]
    scores = answers.scores(
        [window for _, window in pieces],
        on_done=lambda index: on_done(pieces[index][0]),
        wants_greedy=False,
    )
    of_text: dict[int, list[Scored | Failed]] = {place: [] for place in range(len(rows))}
    for (place, _), found in zip(pieces, scores, strict=True):
        of_text[place].append(found)
    return [_joined(found) for found in of_text.values()]


def _joined(found: list[Scored | Failed]) -> Scored | Failed:
    failed = next((one for one in found if isinstance(one, Failed)), None)
    if failed is not None:
        return failed
    return Scored(np.concatenate([np.zeros(0, np.float32), *(one.logprobs for one in found)]))


def measure(
    answers: Answers,
    texts: Sequence[str],
    max_length: int | None = None,
    on_done: Callable[[int], None] = lambda place: None,
) -> dict[str, Any]:
    """Figures of texts, each read alone: nats per token, perplexity, bits per byte of UTF-8, and
    by_position: rows of (first position, last position, tokens, mean loss in nats).

    A position is the number of tokens that the model has read before the one that counts.

    Args, other than those of `score_rolling`:
      texts: each a document.
    """
    tokenizer, size = answers.lm.tokenizer, max_length or answers.max_length
    rows = [tokenizer.encode(text) for text in texts]
    scores = score_rolling(answers, rows, tokenizer.bos_id, size, on_done)
    sums = np.zeros((2, size.bit_length() + 1))
    num_bytes, failed = 0, []
    for place, (text, row, found) in enumerate(zip(texts, rows, scores, strict=True)):
        if isinstance(found, Failed):
            failed.append(f"text {place}: {found.reason}")
            continue
        num_bytes += len(text.encode("utf-8", "replace"))
        counts = [
            len(window.context) + i
            for window in windows(row, tokenizer.bos_id, size)
            for i in range(len(window.continuation))
        ]
        bucket = np.array([count.bit_length() - 1 for count in counts], np.int64)
        np.add.at(sums[0], bucket, 1)
        np.add.at(sums[1], bucket, -found.logprobs.astype(np.float64))
    num_tokens, nats = sums.sum(axis=1)
    figures: dict[str, Any] = {
        "texts": len(texts) - len(failed),
        "tokens": int(num_tokens),
        "bytes": num_bytes,
    }
    if num_tokens and num_bytes:
        loss = nats / num_tokens
        figures |= {
            "nats_per_token": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "bits_per_byte": nats / math.log(2) / num_bytes,
            "by_position": [
                (2**i, min(2 ** (i + 1) - 1, size), int(num), total / num)
                for i, (num, total) in enumerate(sums.T)
                if num
            ],
        }
    return figures | {"failed": failed}
