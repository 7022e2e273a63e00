"""What the device does next: which pieces of which prompts, and which rows draw tokens.

There is no prefill or decode phase.  A choice has tokens, and the cache holds the first of them;
each step computes more of them, for the choices that run first and then for those that wait, first
come first served.  When pages run out, the choice that came last starts over.
A step is planned before the results of the last one are known: a choice then counts the tokens
that it may have drawn.  Imports no jax.
"""

import collections
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from hunyuan_jax.infer.pages import Pages, page_hashes
from hunyuan_jax.infer.request import FinishReason, Output, Request, TokenLogprobs


class Shapes(NamedTuple):
    """What one call of the device takes.

    page_size: tokens of a page; piece: tokens of a piece of a prompt, whole pages or a part of
    one; num_pieces: how many pieces of one pool a call may have, in ascending order from 1;
    overhead: what a call itself costs, in pieces; rows: of each pool that draw; max_steps: steps
    of one call, in each of which a row draws 1 to step_tokens tokens.
    """

    page_size: int
    piece: int
    num_pieces: tuple[int, ...]
    rows: int
    max_steps: int
    step_tokens: int = 1
    overhead: int = 1


class Choice:
    """One answer to a request in progress.

    tokens: prompt and answer; num_computed: of the tokens, those that the cache holds or that are
    on their way; length: tokens, with those that the device may have drawn and that have not come
    back; limit: tokens at which it ends; capacity: tokens that its pages hold; num_again: tokens
    that were sent and are to be drawn again; epoch: counts the times that it started over, so that
    late results are known; num_top: as `Sampling.logprobs`.
    """

    def __init__(self, request: Request, number: int, max_new: int):
        self.request = request
        self.number = number
        self.max_new = 0 if request.only_score else max_new
        self.tokens = list(request.tokens)
        self.num_prompt = len(self.tokens)
        self.length, self.limit = self.num_prompt, self.num_prompt + self.max_new
        self.stop_ids = frozenset(request.sampling.stop_ids)
        self.num_top = request.sampling.logprobs
        self.pool = self.row = -1
        self.pages: list[int] = []
        self.names: list[bytes] = []
        self.capacity = self.num_computed = self.num_sent = self.num_again = self.epoch = 0
        self.num_cached: int | None = None
        self.is_drawing = False
        self.is_finished = False
        self.prompt_logprobs: list[TokenLogprobs | None] | None = None
        if request.sampling.prompt_logprobs is not None:
            self.prompt_logprobs = self.unscored()

    def unscored(self) -> list[TokenLogprobs | None]:
        """Logprobs of the prompt before any is computed; its first token has none."""
        return [] if self.request.score_from else [None]

    @property
    def num_needed(self) -> int:
        """Tokens that the model reads.  Nothing follows the last one of a prompt that is only
        scored.
        """
        return max(1, len(self.tokens) - self.request.only_score)

    @property
    def num_drawn(self) -> int:
        """Tokens of the answer."""
        return len(self.tokens) - self.num_prompt


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A piece of a prompt: the tokens [start, end) of a choice; is_last: the next token is drawn.

    Those of one choice in a step follow each other: in every layer a call writes the keys and
    values of all its pieces before it reads any.
    """

    choice: Choice
    epoch: int
    start: int
    end: int
    is_last: bool


class Rows(NamedTuple):
    """Choices of a pool that draw: each with its epoch, and how many tokens it draws at most."""

    choices: list[Choice]
    epochs: list[int]
    most: list[int]


@dataclasses.dataclass(frozen=True)
class Plan:
    """One call: chunks, then num_steps steps of each row, fewer if one ends and ends_early.

    rows: of each pool; changed: choices that have got pages since the last plan, each with the
    number of pages that it had before, 0 for one that has got its row.
    """

    step: int
    chunks: list[Chunk]
    rows: list[Rows]
    num_steps: int
    ends_early: bool
    changed: list[tuple[Choice, int]]


class Drawn(NamedTuple):
    """What came back of a chunk: tokens, and logprobs as far as asked."""

    tokens: list[int]
    logprobs: Sequence[TokenLogprobs] | None = None
    prompt_logprobs: Sequence[TokenLogprobs] | None = None


class DrawnRows(NamedTuple):
    """What came back of the rows of a pool: of each its tokens, their logprobs if asked, and the
    number of steps in which they were drawn.
    """

    tokens: Sequence[list[int]]
    logprobs: Sequence[Sequence[TokenLogprobs] | None]
    num_steps: Sequence[int]


class Scheduler:
    """Plans steps over pools of pages and rows; a choice stays in one pool.

    max_steps, num_pieces, max_rows: as in `Shapes`, max_steps by the rows of a pool that draw; the
    engine may lower them.
    """

    def __init__(self, pools: Sequence[Pages], shapes: Shapes, is_invariant: bool = False):
        self.pools = list(pools)
        self.waiting: collections.deque[Choice] = collections.deque()
        self.running: dict[Choice, None] = {}
        self.max_steps: Callable[[int], int] = lambda num_rows: shapes.max_steps
        self.num_pieces, self.max_rows = shapes.num_pieces, shapes.rows
        self.num_preempted = self.num_prompt_tokens = self.num_generated = 0
        self.num_looked_up = self.num_found = 0
        # Steps that verified drafts, and drafts that were drawn.
        self.num_verified = self.num_accepted = 0
        self._shapes = shapes
        self._is_invariant = is_invariant
        self._step = 0
        self._free_rows = [list(reversed(range(shapes.rows))) for _ in pools]
        # Running choices whose prompt is not computed, and those of `Plan.changed`.
        self._reading: dict[Choice, None] = {}
        self._changed: list[tuple[Choice, int]] = []
        # Names of pages that a running choice will have computed, by pool.
        self._promised: list[dict[bytes, Choice]] = [{} for _ in pools]

    # -- what goes in ---------------------------------------------------------

    def add(self, choice: Choice) -> None:
        """Puts a choice at the end of the queue."""
        size, salt = self._shapes.page_size, choice.request.cache_salt
        choice.names = page_hashes(choice.tokens, size, salt)
        self.waiting.append(choice)

    def abort(self, choice: Choice) -> Output | None:
        """Ends a choice; None if it has ended."""
        if choice.is_finished:
            return None
        if choice not in self.running:
            self.waiting.remove(choice)
            choice.is_finished = True
        else:
            self._finish(choice)
        return self._output(choice, [], "abort")

    # -- plans ----------------------------------------------------------------

    def plan(self) -> Plan | None:
        """The next step, or None where nothing can be done before the last one has come back."""
        self._step += 1
        rows = self._drawing_rows()
        chunks = self._chunks() if self._reading or self.waiting else []
        if not chunks and not rows:
            return None
        width, num_in_pool = self._shapes.step_tokens, [0] * len(self.pools)
        for choice in rows:
            num_in_pool[choice.pool] += 1
        wanted = (1,) if chunks else _halves(self.max_steps(max(num_in_pool)))
        num_steps = next((n for n in wanted if self._grow(rows, n * width)), 1)
        of_pools = [Rows([], [], []) for _ in self.pools]
        most = num_steps * width
        for choice in rows:
            choices, epochs, of_rows = of_pools[choice.pool]
            room = choice.capacity + 1 - choice.length
            num = most if most < room else room
            choice.length += num
            choices.append(choice)
            epochs.append(choice.epoch)
            of_rows.append(num)
        changed, self._changed = self._changed, []
        return Plan(self._step, chunks, of_pools, num_steps, bool(self.waiting), changed)

    def _drawing_rows(self) -> list[Choice]:
        """Choices with room for one more token; where there is none, the last one that came has to
        make room.
        """
        rows = [c for c in self.running if c.is_drawing and c.length < c.limit]
        # The newest token is not in the cache.
        full = [c for c in rows if c.length > c.capacity and not self._grow([c], 1)]
        if not full:
            return rows
        without = set(full)
        for pool in {choice.pool for choice in full}:
            if self.pools[pool].has_leaving:
                continue  # room comes with the next results
            victim = next(c for c in reversed(self.running) if c.pool == pool)
            self._start_over(victim)
            without.add(victim)
        return [choice for choice in rows if choice not in without]

    def _grow(self, rows: list[Choice], num_steps: int) -> bool:
        """Gives rows the pages for so many more tokens; False if there are not enough."""
        size, missing, num_in_pool = self._shapes.page_size, [], [0] * len(self.pools)
        for choice in [c for c in rows if c.length - 1 + num_steps > c.capacity]:
            # The last token never gets into the cache.
            length = min(choice.length - 1 + num_steps, choice.limit - 1)
            num = -(-length // size) - len(choice.pages)
            if num > 0:
                missing.append((choice, num))
                num_in_pool[choice.pool] += num
        if not missing:
            return True
        if any(
            num > pages.num_available for num, pages in zip(num_in_pool, self.pools, strict=True)
        ):
            return False
        for choice, num in missing:
            self._add_pages(choice, self.pools[choice.pool].take(num))
        return True

    def _add_pages(self, choice: Choice, pages: list[int]) -> None:
        self._changed.append((choice, len(choice.pages)))
        choice.pages += pages
        choice.capacity = len(choice.pages) * self._shapes.page_size

    def _chunks(self) -> list[Chunk]:
        """Pieces of prompts, as many in each pool as a call takes without much padding."""
        piece, chunks = self._shapes.piece, []
        most, num_in_pool = self._num_pieces(), collections.Counter()
        for choice in self._prompts():
            while not choice.is_drawing and num_in_pool[choice.pool] < most:
                num_in_pool[choice.pool] += 1
                start, end = choice.num_computed, choice.num_computed + piece
                choice.num_computed = end = min(end, choice.num_needed)
                choice.is_drawing = is_last = end == choice.num_needed
                if is_last:
                    choice.length += 1
                    del self._reading[choice]
                self.num_prompt_tokens += end - start
                chunks.append(Chunk(choice, choice.epoch, start, end, is_last))
                self._name_pages(choice, start, end)
            if all(num_in_pool[pool] >= most for pool in range(len(self.pools))):
                break
        return chunks

    def _num_pieces(self) -> int:
        """Pieces of each pool in the next call: of the numbers that a call takes, the one that
        computes most pieces a second; of equals the larger.
        """
        num_left, most = [0] * len(self.pools), self.num_pieces[-1]
        for choice in self._reading:
            num_left[choice.pool] += self._pieces_left(choice, choice.num_computed)
        for choice in itertools.islice(self.waiting, sum(map(len, self._free_rows))):
            if min(num_left) >= most:
                break
            # About as `_admit` will choose.
            names = self._usable(choice)
            num_known = [pages.num_known(names) for pages in self.pools]
            pool = min(range(len(num_left)), key=lambda pool: (num_left[pool], -num_known[pool]))
            num_computed = num_known[pool] * self._shapes.page_size
            num_left[pool] += self._pieces_left(choice, num_computed)
        overhead = self._shapes.overhead

        def speed(num: int) -> float:
            return sum(min(num, left) for left in num_left) / (num + overhead)

        return max(reversed(self.num_pieces), key=speed)

    def _pieces_left(self, choice: Choice, num_computed: int) -> int:
        return -(-(choice.num_needed - num_computed) // self._shapes.piece)

    def _usable(self, choice: Choice) -> list[bytes]:
        """The names of pages that a prompt may take from the cache."""
        # The last token is computed in any case: the next one is drawn from it.  So is the one
        # before the first that is scored.
        last = len(choice.tokens) - 1
        if choice.prompt_logprobs is not None:
            last = min(last, max(choice.request.score_from - 1, 0))
        return choice.names[: last // self._shapes.page_size]

    def _prompts(self) -> Iterator[Choice]:
        """Running choices whose prompt is not computed, then waiting ones as they get a row."""
        yield from list(self._reading)
        least = self._shapes.rows - self.max_rows
        while self.waiting:
            free = [pool for pool, rows in enumerate(self._free_rows) if len(rows) > least]
            if not free or not self._admit(self.waiting[0], free):
                return
            yield self.waiting.popleft()

    def _admit(self, choice: Choice, free: list[int]) -> bool:
        """Gives a waiting choice a row and pages for its tokens; False if it must wait."""
        size, usable = self._shapes.page_size, self._usable(choice)
        num_running = [self._shapes.rows - len(rows) for rows in self._free_rows]
        known = {pool: self.pools[pool].num_known(usable) for pool in free}
        pool = min(free, key=lambda pool: (num_running[pool], -known[pool]))
        num_known = known[pool]
        if num_known < len(usable) and usable[num_known] in self._promised[pool]:
            return False
        if self._is_invariant:
            num_known -= num_known % (self._shapes.piece // size)
        # A page for each row that runs is left: else this prompt would soon have to start over.
        num_new = -(-choice.num_needed // size) - num_known
        pages, found = self.pools[pool], usable[:num_known]
        num_left = pages.num_available - pages.num_unused(found) - num_new
        if num_left < num_running[pool]:
            return False
        choice.pool, choice.row = pool, self._free_rows[pool].pop()
        self._add_pages(choice, pages.share(found) + pages.take(num_new))
        choice.num_computed = num_known * size
        self.num_looked_up += len(choice.tokens)
        self.num_found += choice.num_computed
        if choice.num_cached is None:
            choice.num_cached = choice.num_computed
        self.running[choice] = self._reading[choice] = None
        for name in choice.names[num_known:]:
            self._promised[pool].setdefault(name, choice)
        return True

    def _name_pages(self, choice: Choice, start: int, end: int) -> None:
        """Says what the pages hold that the tokens [start, end) have filled."""
        promised, pages = self._promised[choice.pool], self.pools[choice.pool]
        full = slice(start // self._shapes.page_size, end // self._shapes.page_size)
        for page, name in zip(choice.pages[full], choice.names[full], strict=True):
            pages.name(page, name)
            if promised.get(name) is choice:
                del promised[name]

    # -- what comes back ------------------------------------------------------

    def settle(self, step: int | None = None) -> None:
        """Frees the pages that wait for steps up to this one; None: nothing is on its way."""
        for pages in self.pools:
            pages.settle(self._step if step is None else step)

    def update(
        self,
        plan: Plan,
        of_chunks: Sequence[Drawn],
        of_rows: Sequence[DrawnRows],
    ) -> list[Output]:
        """Takes what a plan has drawn; the news of each choice."""
        self.settle(plan.step)
        outputs: list[Output | None] = []
        for chunk, drawn in zip(plan.chunks, of_chunks, strict=True):
            choice = chunk.choice
            if choice.is_finished or choice.epoch != chunk.epoch:
                continue
            if choice.prompt_logprobs is not None and choice.num_sent == 0:
                choice.prompt_logprobs += drawn.prompt_logprobs or ()
            if chunk.is_last:
                outputs.append(self._take(choice, 1, drawn.tokens, drawn.logprobs))
        verifies = self._shapes.step_tokens > 1
        for rows, drawn in zip(plan.rows, of_rows, strict=True):
            for choice, epoch, most, tokens, logprobs, num_steps in zip(
                *rows, *drawn, strict=True
            ):
                if choice.is_finished or choice.epoch != epoch:
                    continue
                if verifies:
                    self.num_verified += num_steps
                    self.num_accepted += len(tokens) - num_steps
                outputs.append(self._take(choice, most, tokens, logprobs))
        return [output for output in outputs if output is not None]

    def _take(
        self,
        choice: Choice,
        most: int,
        tokens: list[int],
        logprobs: Sequence[TokenLogprobs] | None,
    ) -> Output | None:
        """Appends what was drawn of `most` tokens; None if there is nothing to tell."""
        reason: FinishReason | None = None
        num_left = choice.limit - len(choice.tokens)
        if len(tokens) >= num_left:
            tokens, reason = tokens[:num_left], "length"
        if choice.stop_ids and not choice.stop_ids.isdisjoint(tokens):
            end = next(i for i, token in enumerate(tokens) if token in choice.stop_ids) + 1
            tokens, reason = tokens[:end], "stop"
        choice.tokens += tokens
        choice.length += len(tokens) - most
        if reason is not None:
            self._finish(choice)
        if logprobs is not None:
            logprobs = tuple(logprobs[: len(tokens)])
        if choice.num_again:
            num, choice.num_again = choice.num_again, max(0, choice.num_again - len(tokens))
            tokens, logprobs = tokens[num:], logprobs and logprobs[num:]
        return self._output(choice, tokens, reason, logprobs) if tokens or reason else None

    def _output(
        self,
        choice: Choice,
        tokens: list[int],
        reason: FinishReason | None,
        logprobs: tuple[TokenLogprobs, ...] | None = None,
    ) -> Output:
        prompt_logprobs = None
        if choice.prompt_logprobs is not None and choice.num_sent == 0 and reason != "abort":
            prompt_logprobs = tuple(choice.prompt_logprobs)
        choice.num_sent += len(tokens)
        self.num_generated += len(tokens)
        return Output(
            choice.request.id,
            choice.number,
            tuple(tokens),
            logprobs,
            prompt_logprobs,
            reason,
            choice.num_cached or 0,
        )

    def _finish(self, choice: Choice) -> None:
        choice.is_finished = True
        self._leave(choice)

    def _start_over(self, choice: Choice) -> None:
        """Gives up the row and the pages of a choice; it is the next to get some."""
        self._leave(choice)
        if self._is_invariant:
            # The same calls draw the same tokens again.
            del choice.tokens[choice.num_prompt :]
            choice.num_again = choice.num_sent
        choice.epoch += 1
        choice.num_computed, choice.length = 0, len(choice.tokens)
        choice.is_drawing = False
        if choice.prompt_logprobs is not None:
            choice.prompt_logprobs = choice.unscored()
        self.num_preempted += 1
        self.waiting.appendleft(choice)

    def _leave(self, choice: Choice) -> None:
        if choice.is_drawing and not self._is_invariant:
            # Tokens that were drawn have other bits than those of a prompt, but are as good.
            size, salt = self._shapes.page_size, choice.request.cache_salt
            choice.names = page_hashes(choice.tokens, size, salt, choice.names)
            self._name_pages(choice, choice.num_prompt, len(choice.tokens) - 1)
        promised = self._promised[choice.pool]
        for name in [name for name in choice.names if promised.get(name) is choice]:
            del promised[name]
        self.pools[choice.pool].release(choice.pages, self._step)
        self._free_rows[choice.pool].append(choice.row)
        choice.pages, choice.capacity = [], 0
        choice.row = -1
        del self.running[choice]
        self._reading.pop(choice, None)


def _halves(num: int) -> Iterator[int]:
    """num, and half of it again and again, down to 1."""
    while num:
        yield num
        num //= 2
