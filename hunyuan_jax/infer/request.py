"""What goes into the engine and what comes out of it.  Token ids only; imports no jax.

The engine (`infer/engine.py`) has one loop under `generate`, `chat`, scores and the server:

    engine = pretrained.new_engine(limits: Limits)
    engine.warm_up(behind=False)        # compiles every program ahead, in threads
    engine.add(request)                 # raises QueueFull, ContextTooLong or ConfigError
    engine.step() -> list[Output]       # [] while nothing has come back
    engine.abort(id, choice=None)       # of all choices, or of one
    engine.has_work                     # whether a request is not finished
    engine.wait(seconds) -> bool        # until there is work
    engine.stats() -> Stats

`add`, `abort`, `has_work`, `wait` and `stats` may be called from any thread; `step` and `warm_up`
from one thread at a time.  An unknown or finished id is ignored by `abort`.  Each choice gets one
`Output` with a finish_reason, its last; "abort" after an abort.  Text is one layer above: a stop
string is found by `infer/detokenize.py`, whose user aborts the choice and reports "stop".
"""

import dataclasses
from typing import Literal, NamedTuple

from hunyuan_jax.errors import ConfigError
from hunyuan_jax.infer.settings import Sampling

FinishReason = Literal["stop", "length", "abort"]
# What keys and values may be held in, beside the model's own dtype.
CACHE_DTYPES = ("int8", "fp8")
# Tokens of a draft, at most.
MAX_DRAFTS = 8


class QueueFull(RuntimeError):
    """The engine's queue is full; try again later."""


class ContextTooLong(ConfigError):
    """A prompt that does not fit into the engine's context."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """What an engine holds at most."""

    max_rows: int = 64
    """Choices that are computed at the same time."""
    max_context: int | None = None
    """Tokens of a prompt and its answer; None takes the model's positions."""
    max_queue: int = 1024
    """Choices that wait for a row."""
    num_pages: int | None = None
    """Pages of the cache; None takes what max_rows of max_context need, up to a share of the
    device's memory."""
    page_size: int | None = None
    """Tokens of a page that a chip holds; None takes the device's default."""
    chunk_size: int | None = None
    """Tokens of a piece of a prompt, rounded up to whole pages; on a CPU it may be a part of a
    page, but not with `invariant`.  None takes the device's default.  Where rows are on several
    chips a piece is a page."""
    cache_dtype: str | None = None
    """One of CACHE_DTYPES for keys and values, with a scale for each token and head; None takes
    that of the loaded model, else the model's own dtype."""
    invariant: bool = False
    """Whether a request's tokens and logprobs are bit-equal whatever its neighbours."""

    speculate: str | None = None
    """Who drafts tokens that the model verifies: mtp, ngram or the folder of a small model."""
    speculate_tokens: int | None = None
    """Tokens of a draft, 1 to 8; None takes 1 for mtp, else 4."""

    def __post_init__(self) -> None:
        if self.cache_dtype not in (None, *CACHE_DTYPES):
            choices = ", ".join(CACHE_DTYPES)
            raise ConfigError(f"cache_dtype = {self.cache_dtype!r}; use {choices}.")
        num = self.speculate_tokens
        if num is not None and not (self.speculate and 1 <= num <= MAX_DRAFTS):
            raise ConfigError(
                f"speculate_tokens = {num} must be 1 to {MAX_DRAFTS}, and needs speculate."
            )
        if self.speculate and self.invariant:
            raise ConfigError(
                f"speculate = {self.speculate!r} with invariant: how many tokens a step reads "
                "changes the last bits; leave one out."
            )


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt to be continued.

    id: unique among the unfinished ones; tokens: at least one id; sampling: resolved, with
    stop_ids; n: number of choices, each drawn by the seed and its number; cache_salt: prompts
    share cached pages only with those of the same salt; first_choice: number of the first choice;
    only_score: no token is drawn, and the output has the prompt's logprobs and ends with "length";
    the model does not read the last token, so that one more than its context fits;
    score_from: place of the first token of the prompt whose logprobs are asked.  Pages that end
    before it may come from the cache.
    """

    id: str
    tokens: tuple[int, ...]
    sampling: Sampling
    n: int = 1
    cache_salt: str = ""
    first_choice: int = 0
    only_score: bool = False
    score_from: int = 0


class TokenLogprobs(NamedTuple):
    """Of one token: its log-probability in nats, and the most likely ids with theirs, best first.

    They are those of the model: before penalties, bias, temperature and top-k.
    """

    logprob: float
    top: tuple[tuple[int, float], ...]


class Output(NamedTuple):
    """What is new of one choice.

    tokens: new ids, a stop id included; logprobs: one for each of them, None unless asked;
    prompt_logprobs: in the first output of the choice if asked, one for each token of the prompt
    from score_from on, None for the prompt's first token; finish_reason: None while more follows;
    num_cached_tokens: of the prompt, those that were found in the cache.
    """

    id: str
    choice: int
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    finish_reason: FinishReason | None = None
    num_cached_tokens: int = 0


@dataclasses.dataclass(frozen=True)
class Stats:
    """Counts since the engine was built; running, waiting and pages are those of now.

    pages_cached: not in use, with contents that a prompt may share; prefix_queries and
    prefix_hits: prompt tokens that were looked up, and found; drafts: steps of rows that verified
    one, draft_tokens and accepted_tokens: their tokens, and those that were drawn; idle_share: of
    the time in which there was work, the share in which the device had none; steps: calls of
    `step`; host_seconds: CPU time of the threads that called it; compilations: inside steps, since
    all programs are compiled.
    """

    running: int
    waiting: int
    pages_total: int
    pages_used: int
    pages_cached: int
    preemptions: int
    prompt_tokens: int
    generated_tokens: int
    prefix_queries: int
    prefix_hits: int
    drafts: int
    draft_tokens: int
    accepted_tokens: int
    idle_share: float
    steps: int
    host_seconds: float
    compilations: int
