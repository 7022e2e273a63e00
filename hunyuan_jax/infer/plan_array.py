"""The part of a plan that the device reads: one int32 array with a line for each row.

Floats are in it bit by bit, so that a step sends one array.  Imports no jax.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from hunyuan_jax.infer.scheduler import Choice

# Stop ids that the device knows; the others end a row when its tokens have come back.
MAX_STOP_IDS = 16
_NO_ID = 2**31 - 1
# What is asked of tokens: their log-probabilities, or those of the most likely ones too.
OF_TOKENS, WITH_TOP = 1, 2
INTEGERS = (
    "row",
    "is_used",
    "limit",
    "start",
    "end",
    "is_last",
    "num_steps",
    "ends_early",
    "logprobs",
    "prompt_logprobs",
    "score_first",
    "adjusts",
    "top_k",
    "seed",
    "choice",
    "num_drawn",
    "min_new",
)
FLOATS = (
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)
COLUMN = {name: column for column, name in enumerate((*INTEGERS, *FLOATS))}
_FIRST_STOP = len(COLUMN)
FIRST_PAGE = _FIRST_STOP + MAX_STOP_IDS
STOPS = slice(_FIRST_STOP, FIRST_PAGE)


def width(num_pages: int) -> int:
    """Columns of a plan whose rows have tables of so many pages; those of a chunk follow."""
    return FIRST_PAGE + num_pages


def adjusts(choice: Choice) -> bool:
    """Whether the logits of a choice are adjusted before a token is drawn."""
    sampling = choice.request.sampling
    return bool(
        sampling.repetition_penalty != 1
        or sampling.presence_penalty
        or sampling.frequency_penalty
        or sampling.logit_bias
        or sampling.min_new_tokens
    )


class Lines:
    """The line of each row, int32 [pools, rows, columns]; what does not change from step to step
    is written once.
    """

    def __init__(self, num_pools: int, num_rows: int, num_pages: int):
        self.of_pools = np.zeros((num_pools, num_rows, width(num_pages)), np.int32)
        self._written: dict[tuple[int, int], tuple[Choice, int, int]] = {}

    def write(self, choice: Choice, row: int) -> None:
        """Brings the line of a choice up to date; `row` is the number of its row on the device."""
        where = (choice.pool, choice.row)
        line = self.of_pools[where]
        owner, epoch, num_pages = self._written.get(where, (None, 0, 0))
        if owner is not choice or epoch != choice.epoch:
            line[:] = 0
            _write(line, _fields(choice, row))
            stops = choice.request.sampling.stop_ids[:MAX_STOP_IDS]
            line[STOPS] = _NO_ID
            line[_FIRST_STOP : _FIRST_STOP + len(stops)] = stops
            num_pages = 0
        line[FIRST_PAGE + num_pages : FIRST_PAGE + len(choice.pages)] = choice.pages[num_pages:]
        self._written[where] = (choice, choice.epoch, len(choice.pages))


def _fields(choice: Choice, row: int) -> Mapping[str, Any]:
    sampling = choice.request.sampling
    return {
        "row": row,
        "is_used": 1,
        "limit": choice.max_new,
        "logprobs": _wish(sampling.logprobs),
        "prompt_logprobs": _wish(sampling.prompt_logprobs),
        "adjusts": adjusts(choice),
        "top_k": min(sampling.top_k, 2**31 - 1),
        "seed": np.uint32(sampling.seed % 2**32).view(np.int32),
        "choice": choice.number,
        "num_drawn": choice.num_drawn,
        "min_new": min(sampling.min_new_tokens, 2**31 - 1),
    } | {name: getattr(sampling, name) for name in FLOATS}


def _wish(num_top: int | None) -> int:
    if num_top is None:
        return 0
    return WITH_TOP if num_top else OF_TOKENS


def _write(line: np.ndarray, fields: Mapping[str, Any]) -> None:
    for name, value in fields.items():
        line[COLUMN[name]] = np.float32(value).view(np.int32) if name in FLOATS else value
