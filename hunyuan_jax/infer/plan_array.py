"""The part of a plan that the device reads: one int32 array with a line for each row.

Floats are in it bit by bit, so that a step sends one array.  Imports no jax.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from hunyuan_jax.infer.scheduler import Choice, Plan

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
_FIRST_FLOAT, _FIRST_STOP = len(INTEGERS), len(COLUMN)
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

    def __init__(self, num_pools: int, pools_of_lane: int, num_rows: int, num_pages: int):
        self.of_pools = np.zeros((num_pools, num_rows, width(num_pages)), np.int32)
        self._pools_of_lane, self._num_rows = pools_of_lane, num_rows

    def row(self, choice: Choice) -> int:
        """The number of a choice's row among those of its lane."""
        return choice.pool % self._pools_of_lane * self._num_rows + choice.row

    def empty(self, num_lines: int, num_more: int = 0) -> np.ndarray:
        """int32 [B, C] of lines without a choice, for each pool of a lane, with more columns."""
        shape = (self._pools_of_lane * num_lines, self.of_pools.shape[-1] + num_more)
        plan_BC = np.zeros(shape, np.int32)
        plan_BC[:, COLUMN["row"]] = self._pools_of_lane * self._num_rows
        return plan_BC

    def drawing(self, plan: Plan, pools: Sequence[int], num_lines: int) -> np.ndarray:
        """int32 [B, C] of the rows that draw in the pools of a lane, num_lines for each."""
        plan_BC = self.empty(num_lines)
        for i, pool in enumerate(pools):
            rows = [choice.row for choice in plan.rows[pool].choices]
            lines = plan_BC[i * num_lines : i * num_lines + len(rows)]
            np.take(self.of_pools[pool], rows, axis=0, out=lines, mode="clip")
        plan_BC[:, COLUMN["num_steps"]] = plan.num_steps
        plan_BC[:, COLUMN["ends_early"]] = plan.ends_early
        return plan_BC

    def write(self, choice: Choice, num_known: int) -> None:
        """Brings the line of a choice up to date whose first num_known pages are in it; with 0
        the line is new.
        """
        line = self.of_pools[choice.pool, choice.row]
        if not num_known:
            fields, sampling = self._fields(choice), choice.request.sampling
            stops = sampling.stop_ids[:MAX_STOP_IDS]
            line[: len(INTEGERS)] = [fields.get(name, 0) for name in INTEGERS]
            line[_FIRST_FLOAT:_FIRST_STOP].view(np.float32)[:] = [
                getattr(sampling, name) for name in FLOATS
            ]
            line[STOPS] = (*stops, *[_NO_ID] * (MAX_STOP_IDS - len(stops)))
            line[FIRST_PAGE:] = 0
        for column, page in enumerate(choice.pages[num_known:], FIRST_PAGE + num_known):
            line[column] = page

    def _fields(self, choice: Choice) -> Mapping[str, int]:
        sampling = choice.request.sampling
        return {
            "row": self.row(choice),
            "is_used": 1,
            "limit": choice.max_new,
            "logprobs": _wish(sampling.logprobs),
            "prompt_logprobs": _wish(sampling.prompt_logprobs),
            "adjusts": adjusts(choice),
            "top_k": min(sampling.top_k, 2**31 - 1),
            "seed": (sampling.seed + 2**31) % 2**32 - 2**31,
            "choice": choice.number,
            "num_drawn": choice.num_drawn,
            "min_new": min(sampling.min_new_tokens, 2**31 - 1),
        }


def _wish(num_top: int | None) -> int:
    if num_top is None:
        return 0
    return WITH_TOP if num_top else OF_TOKENS
