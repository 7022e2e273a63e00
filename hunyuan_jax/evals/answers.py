"""What a model answers to many prompts: log-probabilities of continuations, and texts.

The engine computes them, with its prefix cache.  A prompt that cannot be served fails alone.
"""

import dataclasses
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from hunyuan_jax.errors import ConfigError
from hunyuan_jax.infer.detokenize import Detokenizer
from hunyuan_jax.infer.request import Limits, Output, QueueFull, Request, Stats
from hunyuan_jax.infer.settings import MAX_LOGPROBS, Sampling
from hunyuan_jax.infer.text import LM
from hunyuan_jax.parallel.mesh import device_kind

# Greedy, whatever the model's folder recommends: what is measured is the model itself.
GREEDY = Sampling(temperature=0).resolved({})

# Prompts that are computed at the same time.
_MAX_ROWS = 8

Ids = Sequence[int]


@dataclasses.dataclass(frozen=True)
class Failed:
    """Why a prompt has no answer, in one line."""

    reason: str


@dataclasses.dataclass(frozen=True)
class Scored:
    """logprobs: of each token of the continuation, float32 [T] in nats; is_greedy: whether each
    is the most likely one, None unless asked.
    """

    logprobs: np.ndarray
    is_greedy: bool | None = None

    @property
    def logprob(self) -> float:
        """Of the whole continuation, in nats."""
        return float(self.logprobs.sum(dtype=np.float64))


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt to be continued.

    ids: at least one; stop: strings that end the text and are not part of it; is_done: told the
    text so far, says whether more of it is of no interest.
    """

    ids: Ids
    sampling: Sampling = GREEDY
    stop: tuple[str, ...] = ()
    is_done: Callable[[str], bool] | None = None


def short_limits(lm: LM, max_context: int | None) -> Limits:
    """Of an engine for many prompts of some hundred tokens that share beginnings.

    On a CPU pieces of prompts are small, so that little is padding; short pages leave little to
    compute again behind a beginning that is known.
    """
    page_size, chunk_size = (16, 32) if device_kind(lm.model.mesh) == "cpu" else (None, None)
    return Limits(_MAX_ROWS, max_context, page_size=page_size, chunk_size=chunk_size)


def long_limits(max_context: int | None) -> Limits:
    """Of an engine for prompts of thousands of tokens."""
    return Limits(_MAX_ROWS, max_context)


class Answers:
    """A model that answers many prompts at a time.

    max_length: tokens that it reads at most.
    """

    def __init__(self, lm: LM, limits: Limits):
        self.lm = lm
        self._engine = lm.model.new_engine(limits)
        self.max_length = self._engine.max_context
        self._numbers = itertools.count()

    def scores(
        self,
        pairs: Sequence[tuple[Ids, Ids]],
        on_done: Callable[[int], None] = lambda place: None,
        wants_greedy: bool = True,
    ) -> list[Scored | Failed]:
        """The log-probabilities of continuations, each given its context; in the order of pairs.

        Of a pair that is too long the last max_length + 1 tokens are kept.  Pairs that differ in
        the last token only are computed once, and beginnings that they share are too.

        Args:
          pairs: (context, continuation) as ids, neither of them empty.
          on_done: told the place of each pair that has its score.
          wants_greedy: whether is_greedy is asked.
        """
        found: dict[int, Scored | Failed] = {}
        groups: dict[tuple[int, ...], list[int]] = {}
        for place, (context, continuation) in enumerate(pairs):
            if not context or not 1 <= len(continuation) <= self.max_length:
                found[place] = Failed(
                    f"{len(context)} tokens of context and {len(continuation)} of continuation; "
                    f"there must be at least 1 and 1 to {self.max_length}."
                )
                on_done(place)
                continue
            whole = (*context, *continuation)[-self.max_length - 1 :]
            groups.setdefault(whole[:-1], []).append(place)
        scoring = _Scoring(self, pairs, found, on_done, wants_greedy)
        self._run(itertools.chain.from_iterable(
            scoring.requests(row, places) for row, places in _in_order(groups, pairs)
        ), scoring)  # fmt: skip
        return [found[place] for place in range(len(pairs))]

    def texts(
        self, prompts: Sequence[Prompt], on_done: Callable[[int], None] = lambda place: None
    ) -> list[str | Failed]:
        """What the model writes after each prompt, without stop strings and special tokens; in
        the order of the prompts.

        Args:
          prompts: with resolved settings; stop_ids None takes those of the model.
          on_done: told the place of each prompt that has its text.
        """
        found: dict[int, str | Failed] = {}
        writing = _Writing(self, prompts, found, on_done)
        order = sorted(range(len(prompts)), key=lambda place: -len(prompts[place].ids))
        self._run(map(writing.request, order), writing)
        return [found[place] for place in range(len(prompts))]

    def warm_up(self) -> None:
        """Compiles every program; without it each is compiled when it is needed."""
        self._engine.warm_up()

    def stats(self) -> Stats:
        """What the engine has done."""
        return self._engine.stats()

    def new_id(self) -> str:
        """An id that no request has had."""
        return str(next(self._numbers))

    def _run(self, requests: Iterable[Request], taker: "_Scoring | _Writing") -> None:
        """Serves requests; `taker` gets their outputs and may have more requests."""
        engine, left, more = self._engine, iter(requests), deque()
        waiting: Request | None = None
        while True:
            while waiting is not None or more or (waiting := next(left, None)) is not None:
                if waiting is None:
                    waiting = more.popleft()
                try:
                    engine.add(waiting)
                except QueueFull:
                    break
                except ConfigError as e:
                    taker.fail(waiting.id, str(e))
                waiting = None
            if not engine.has_work:
                return
            for output in engine.step():
                more += taker.take(output)
                if output.finish_reason is None and taker.is_settled(output.id):
                    engine.abort(output.id)


class _Scoring:
    """Turns pairs into requests, and their outputs into scores."""

    def __init__(self, answers: Answers, pairs, found, on_done, wants_greedy: bool):
        self._answers, self._pairs, self._found, self._on_done = answers, pairs, found, on_done
        self._num_top = int(wants_greedy)
        # Request id -> (its row, places of the pairs that it serves).
        self._rows: dict[str, tuple[tuple[int, ...], list[int]]] = {}

    def requests(self, row: tuple[int, ...], places: list[int]) -> list[Request]:
        """Those of pairs whose tokens but the last are `row`."""
        lasts = {self._pairs[place][1][-1] for place in places}
        if len(lasts) == 1 or len(row) == self._answers.max_length:
            return self._one_by_one(row, places)
        # One forward tells the most likely next tokens.
        num_scored = max(len(self._pairs[place][1]) for place in places) - 1
        sampling = dataclasses.replace(
            GREEDY,
            max_new_tokens=1,
            stop_ids=(),
            logprobs=MAX_LOGPROBS,
            prompt_logprobs=self._num_top if num_scored else None,
        )
        request = Request(
            self._answers.new_id(), row, sampling, score_from=len(row) - max(num_scored, 1)
        )
        self._rows[request.id] = row, places
        return [request]

    def _one_by_one(self, row: tuple[int, ...], places: list[int]) -> list[Request]:
        """A request for each last token."""
        of_last: dict[int, list[int]] = {}
        for place in places:
            of_last.setdefault(self._pairs[place][1][-1], []).append(place)
        return [self._request((*row, last), some) for last, some in of_last.items()]

    def _request(self, whole: tuple[int, ...], places: list[int]) -> Request:
        num_scored = max(len(self._pairs[place][1]) for place in places)
        sampling = dataclasses.replace(GREEDY, stop_ids=(), prompt_logprobs=self._num_top)
        request = Request(
            self._answers.new_id(),
            whole,
            sampling,
            only_score=True,
            score_from=len(whole) - num_scored,
        )
        self._rows[request.id] = whole, places
        return request

    def take(self, output: Output) -> list[Request]:
        row, places = self._rows.pop(output.id)
        entries = list(output.prompt_logprobs or ())
        if not output.tokens:
            for place in places:
                self._settle(place, entries, row)
            return []
        (drawn,), rest = output.logprobs, []
        known = dict(drawn.top)
        for place in places:
            last = self._pairs[place][1][-1]
            if last in known:
                entry = drawn._replace(logprob=known[last])
                self._settle(place, [*entries, entry], (*row, last))
            else:
                rest.append(place)
        return self._one_by_one(row, rest)

    def _settle(self, place: int, entries, whole: tuple[int, ...]) -> None:
        num = len(self._pairs[place][1])
        ids, entries = whole[-num:], entries[-num:]
        is_greedy = None
        if self._num_top:
            is_greedy = all(e.top[0][0] == i for e, i in zip(entries, ids, strict=True))
        logprobs = np.array([entry.logprob for entry in entries], np.float32)
        self._found[place] = Scored(logprobs, is_greedy)
        self._on_done(place)

    def fail(self, request_id: str, reason: str) -> None:
        for place in self._rows.pop(request_id)[1]:
            self._found[place] = Failed(reason)
            self._on_done(place)

    def is_settled(self, request_id: str) -> bool:
        return request_id not in self._rows


class _Writing:
    """Turns prompts into requests, and their outputs into texts."""

    def __init__(self, answers: Answers, prompts, found, on_done):
        self._answers, self._prompts, self._found, self._on_done = (
            answers, prompts, found, on_done,
        )  # fmt: skip
        # Request id -> (place, who decodes it, the text so far).
        self._open: dict[str, tuple[int, Detokenizer, str]] = {}

    def request(self, place: int) -> Request:
        prompt, lm = self._prompts[place], self._answers.lm
        stop_ids, stop = prompt.sampling.stop_ids, []
        if stop_ids is None:
            stop_ids = lm.stop_ids
        for text in prompt.stop:
            # The name of a special token is not part of the text that is shown.
            if text in lm.tokenizer.special_names:
                stop_ids = (*stop_ids, lm.tokenizer.special_id(text))
            elif text:
                stop.append(text)
        sampling = dataclasses.replace(prompt.sampling, stop_ids=tuple(dict.fromkeys(stop_ids)))
        request = Request(self._answers.new_id(), tuple(prompt.ids), sampling, first_choice=place)
        self._open[request.id] = place, Detokenizer(lm.tokenizer, stop), ""
        return request

    def take(self, output: Output) -> list[Request]:
        if output.id not in self._open:  # it ended before it was aborted
            return []
        place, decoder, text = self._open[output.id]
        is_stopped = output.finish_reason == "stop"
        text += decoder.push(output.tokens[:-1] if is_stopped else output.tokens)
        if output.finish_reason is not None:
            text += decoder.finish()
        is_done = self._prompts[place].is_done
        if (
            output.finish_reason is None
            and decoder.stopped_by is None
            and not (is_done is not None and is_done(text))
        ):
            self._open[output.id] = place, decoder, text
            return []
        del self._open[output.id]
        self._found[place] = text
        self._on_done(place)
        return []

    def fail(self, request_id: str, reason: str) -> None:
        place, *_ = self._open.pop(request_id)
        self._found[place] = Failed(reason)
        self._on_done(place)

    def is_settled(self, request_id: str) -> bool:
        return request_id not in self._open


def _in_order(
    groups: dict[tuple[int, ...], list[int]], pairs: Sequence[tuple[Ids, Ids]]
) -> list[tuple[tuple[int, ...], list[int]]]:
    """Rows with their places: longest first, those of one context one after the other."""
    longest: dict[tuple[int, ...], int] = {}
    contexts = {row: tuple(pairs[places[0]][0]) for row, places in groups.items()}
    for row, context in contexts.items():
        longest[context] = max(longest.get(context, 0), len(row))

    def key(item: tuple[tuple[int, ...], list[int]]):
        context = contexts[item[0]]
        return -longest[context], context, -len(item[0])

    return sorted(groups.items(), key=key)
