"""Continuous batching over one model: requests in, tokens out (infer/request.py)."""

import collections
import dataclasses
import itertools
import os
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
from flax import nnx

from hunyuan_jax.errors import ConfigError
from hunyuan_jax.infer import cpu_layout
from hunyuan_jax.infer.pages import Pages
from hunyuan_jax.infer.plan_array import MAX_STOP_IDS
from hunyuan_jax.infer.request import (
    ContextTooLong,
    Limits,
    Output,
    QueueFull,
    Request,
    Stats,
)
from hunyuan_jax.infer.runner import Runner
from hunyuan_jax.infer.scheduler import Choice, Plan, Scheduler, Shapes
from hunyuan_jax.infer.speculate import Off, Proposer
from hunyuan_jax.model.cache import empty_cache
from hunyuan_jax.model.count import count
from hunyuan_jax.parallel import context, hosts, rules
from hunyuan_jax.parallel.mesh import device_kind

# Tokens that one call may draw of a row, and how long a call should last, so that a reader sees
# them flow and a new request is soon served.
_MAX_STEPS = 32
_CALL_SECONDS = 0.05
# Tokens of a page, and of a piece of a prompt.
_CPU_SIZES = (64, 32)
_SIZES = (128, 256)
# Pieces of prompts in a call, and what the call itself costs, in pieces.  A TPU or GPU needs
# longer to read the weights than to compute a few pieces.
_CPU_NUM_PIECES, _CPU_OVERHEAD = (1, 2, 3, 8, 16), 1
_NUM_PIECES, _OVERHEAD = (1, 2, 4, 16), 8
# On a CPU a call of more than 8 pieces has at most so many operations, about half a second, so
# that rows that draw meanwhile don't stand still.
_CPU_CALL_FLOPS = 5e10
# Programs that any request can be served with, and threads that compile others behind them: a CPU
# has to serve meanwhile.
_NUM_FIRST = 2
_THREADS_BEHIND = 1
# Of the memory of a device, or of the machine for CPU devices, the share that pages take at most.
_MEMORY_SHARE = {"cpu": 0.05}
_MEMORY_SHARE_OTHERWISE = 0.4


class Engine:
    """Serves requests with one model.  Which calls are for which threads: infer/request.py.

    scheduler, runner: who plans steps, and who runs them; plans_ahead: whether a step is started
    before the last one has come back.
    """

    def __init__(
        self,
        graph_def: nnx.GraphDef,
        params: dict[str, Any],
        limits: Limits,
        proposer: Proposer | None = None,
    ):
        """`proposer`: of drafts; None drafts nothing."""
        proposer = proposer or Off()
        model = nnx.merge(graph_def, params)
        cfg, mesh = model.cfg, model.mesh
        if proposer.num_tokens:
            context.refuse(mesh, "speculate")
        self.limits = limits
        self.max_context = min(limits.max_context or cfg.max_position, cfg.max_position)
        num_lanes = cpu_layout.num_slices(cfg, limits.max_rows) if mesh.size == 1 else 1
        num_lanes = num_lanes if cpu_layout.suits(cfg, mesh) else 1
        num_pools = num_lanes * rules.num_shards(mesh, "batch")
        shapes = shapes_of(cfg, mesh, limits, num_pools)
        shapes = shapes._replace(step_tokens=1 + proposer.num_tokens)
        page_size, rows = shapes.page_size, shapes.rows
        if proposer.num_tokens + 2 >= page_size:
            raise ConfigError(
                f"speculate_tokens = {proposer.num_tokens} must be at most page_size - 3 = "
                f"{page_size - 3}; use fewer."
            )
        of_one = -(-self.max_context // page_size)
        affordable = _affordable_pages(cfg, mesh, page_size, limits, proposer) // num_lanes
        if hosts.spans_processes(mesh):
            hosts.require_same(limits=dataclasses.asdict(limits))
            affordable = hosts.least(affordable)
        num_pages = limits.num_pages or max(of_one, min(rows * of_one, affordable))
        if num_pages < of_one:
            raise ConfigError(
                f"num_pages = {num_pages} of {page_size} tokens do not hold max_context = "
                f"{self.max_context}; use at least {of_one}."
            )
        pools = [Pages(num_pages) for _ in range(num_pools)]
        self.scheduler = Scheduler(pools, shapes, limits.invariant)
        self.runner = Runner(
            graph_def,
            params,
            num_lanes,
            shapes,
            num_pages,
            self.max_context,
            limits.invariant,
            limits.cache_dtype,
            proposer,
        )
        self._lock = threading.Condition()
        self._step_lock = threading.Lock()
        self._choices: dict[str, list[Choice]] = {}
        self._arrived: collections.deque[Choice] = collections.deque()
        self._aborted: collections.deque[tuple[str, int | None]] = collections.deque()
        # Plans that have not come back, when they were dispatched, and what they draw.
        self._under_way: collections.deque[tuple[Plan, float, Future]] = collections.deque()
        self._reader = ThreadPoolExecutor(1)
        self._mail: dict[str, collections.deque[Output]] = {}
        self._numbers = itertools.count()
        self._clock = _Clock()
        self._compilations = _Compilations()
        self._warming: list[Future] = []
        self._vocab_size, self._num_drafts = cfg.vocab_size, proposer.num_tokens
        # A call of one CPU takes far longer than its plan, which then has the newest prompts.
        self.plans_ahead = mesh.size > 1 or device_kind(mesh) != "cpu"
        self._call_length = CallLength()
        self.scheduler.max_steps = self._call_length.max_steps

    # -- for any thread -------------------------------------------------------

    def add(self, request: Request) -> None:
        """Queues a request.

        Raises:
          QueueFull: as many choices wait as may.
          ContextTooLong: the prompt leaves no room for a token.
          ConfigError: a request that cannot be served, or an id that is in use.
        """
        sampling, num_prompt = request.sampling, len(request.tokens)
        most = self.max_context + (1 if request.only_score else -1)
        if num_prompt > most:
            raise ContextTooLong(
                f"the prompt has {num_prompt} tokens; at most {most} fit into the context of "
                f"{self.max_context}. Shorten it."
            )
        room = self.max_context - num_prompt
        _check(request, self._vocab_size)
        choices = [
            Choice(request, request.first_choice + i, min(sampling.max_new_tokens, room))
            for i in range(request.n)
        ]
        with self._lock:
            if request.id in self._choices:
                raise ConfigError(f"id = {request.id!r} is in use; choose another.")
            num_waiting = len(self._arrived) + len(self.scheduler.waiting)
            if num_waiting + request.n > self.limits.max_queue:
                raise QueueFull(
                    f"{num_waiting} choices wait, max_queue = {self.limits.max_queue}; try again "
                    "later."
                )
            self._choices[request.id] = choices
            self._arrived.extend(choices)
            self._lock.notify_all()

    def abort(self, request_id: str, choice: int | None = None) -> None:
        """Ends a request, or one of its choices, at the next step; unknown ids are ignored."""
        with self._lock:
            self._aborted.append((request_id, choice))
            self._lock.notify_all()

    @property
    def has_work(self) -> bool:
        """Whether a request is not finished."""
        return bool(self._choices)

    def wait(self, seconds: float) -> bool:
        """Waits until there is work, at most so long; whether there is."""
        with self._lock:
            return self._lock.wait_for(lambda: self.has_work, seconds)

    def stats(self) -> Stats:
        """What the engine holds and has done."""
        scheduler = self.scheduler
        pools = scheduler.pools
        return Stats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting) + len(self._arrived),
            pages_total=sum(pages.num_total for pages in pools),
            pages_used=sum(pages.num_used for pages in pools),
            pages_cached=sum(pages.num_cached for pages in pools),
            preemptions=scheduler.num_preempted,
            prompt_tokens=scheduler.num_prompt_tokens,
            generated_tokens=scheduler.num_generated,
            prefix_queries=scheduler.num_looked_up,
            prefix_hits=scheduler.num_found,
            drafts=scheduler.num_verified,
            draft_tokens=scheduler.num_verified * self._num_drafts,
            accepted_tokens=scheduler.num_accepted,
            idle_share=self._clock.idle_share,
            steps=self._clock.num_steps,
            host_seconds=self._clock.host_seconds,
            compilations=self._compilations.num,
        )

    # -- for one thread at a time ---------------------------------------------

    def warm_up(self, behind: bool = False) -> None:
        """Compiles every program, in threads; a compilation after it is counted.

        Args:
          behind: come back as soon as there are programs that any request can be served with; the
            others are compiled behind them (`is_warm`).
        """
        shapes = self.runner.shapes()
        num = _NUM_FIRST if behind else len(shapes)
        for program in self.runner.compile_ahead(shapes[:num], os.cpu_count()):
            program.result()
        self._warming = self.runner.compile_ahead(shapes[num:], _THREADS_BEHIND)
        self._look_at_programs()

    @property
    def is_warm(self) -> bool:
        """Whether nothing is left to be compiled behind.  Raises what a compilation has raised."""
        return all(program.done() and program.result() for program in self._warming)

    def _look_at_programs(self) -> None:
        self.scheduler.num_pieces = self.runner.sizes("chunk")
        self.scheduler.max_rows = self.runner.sizes("decode")[-1]
        if self.is_warm:
            self._warming = []
            self._compilations.start()

    def replace_weights(self, params: dict[str, Any] | None) -> None:
        """Computes with other weights from now on, of the same shapes, dtypes and shardings;
        prompts that are cached are forgotten.  Only while no request is unfinished.

        None lets go of the weights, so that their memory is free until others come.
        """
        if self.has_work:
            raise RuntimeError("weights are replaced between requests; finish or abort them first")
        self.step()  # frees the pages of what has finished
        while self._under_way:
            self.step()
        for pages in self.scheduler.pools:
            pages.forget()
        self.runner.replace_weights(params)

    def step(self) -> list[Output]:
        """Starts the next step, then waits for the one before, or for the next one itself where
        none is planned ahead; what the awaited one has brought.
        """
        begin = time.thread_time()
        self._compilations.thread = threading.get_ident()
        self._clock.num_steps += 1
        if self._warming:
            self._look_at_programs()
        outputs = self._take_in()
        plan = self.scheduler.plan()
        if plan is not None:
            if not self.runner.has_decode:
                self._foresee_rows()
            start, dispatched = time.perf_counter(), self.runner.dispatch(plan)
            results = self._reader.submit(self.runner.read, dispatched)
            self._under_way.append((plan, start, results))
        if len(self._under_way) > (self.plans_ahead and plan is not None):
            outputs += self._take_out(*self._under_way.popleft())
        if not self._under_way:
            self.scheduler.settle()
        with self._lock:
            for output in outputs:
                if output.finish_reason is not None:
                    left = self._choices[output.id]
                    left[:] = [c for c in left if c.number != output.choice]
                    if not left:
                        del self._choices[output.id]
            if not self._choices:
                self._clock.pause()
        self._compilations.thread = None
        self._clock.host_seconds += time.thread_time() - begin
        return outputs

    def _foresee_rows(self) -> None:
        """Has the first program that draws compiled beside the first that reads a prompt."""
        scheduler = self.scheduler
        num = sum(choice.max_new > 1 for choice in (*scheduler.running, *scheduler.waiting))
        if num:
            self.runner.foresee_rows(-(-num // len(scheduler.pools)))

    def _take_in(self) -> list[Output]:
        if not self._arrived and not self._aborted:
            return []
        with self._lock:
            arrived, aborted = list(self._arrived), list(self._aborted)
            self._arrived.clear()
            self._aborted.clear()
        for choice in arrived:
            self.scheduler.add(choice)
        outputs = []
        for request_id, number in aborted:
            for choice in self._choices.get(request_id, ()):
                if number in (None, choice.number):
                    outputs.append(self.scheduler.abort(choice))
        return [output for output in outputs if output is not None]

    def _take_out(self, plan: Plan, start: float, results: Future) -> list[Output]:
        of_chunks, of_rows, end = results.result()
        seconds = self._clock.took(start, end)
        if not plan.chunks:
            num_rows = max(len(rows.choices) for rows in plan.rows)
            self._call_length.took(num_rows, plan.num_steps, seconds)
        return self.scheduler.update(plan, of_chunks, of_rows)

    # -- where the mesh spans several processes -------------------------------

    def follow(self) -> int:
        """In each process but the first: computes what the engine of process 0 does, until that
        one is paused or closed; returns the exit status that it was closed with.
        """
        return self.runner.follow()

    def pause(self) -> None:
        """In process 0: lets the others return from `follow`, after what was dispatched.  They
        have to call it again before more is served.  Does nothing where there is one process.
        """
        self.runner.pause()

    def run_together(self, requests: Sequence[Request]) -> list[Output]:
        """As `run`, called by all processes at the same time: in process 0 the outputs, none in
        the others, which follow it.
        """
        if self.runner.follows:
            self.follow()
            return []
        try:
            return list(self.run(requests))
        finally:
            self.pause()

    def close(self, status: int = 0, *, at_once: bool = False) -> None:
        """In process 0: lets the others end with an exit status, after what was dispatched or at
        once.  Requests are not served afterwards.  Does nothing where there is one process.
        """
        self.runner.close(status, at_once)

    # -- for whoever wants answers only ---------------------------------------

    def run(self, requests: Sequence[Request]) -> Iterator[Output]:
        """Yields the outputs of some requests, whose ids are replaced by their place in the list;
        others may run at the same time.  Requests that are left unfinished are aborted.
        """
        ids = [f"run {next(self._numbers)}" for _ in requests]
        place_of = {request_id: str(place) for place, request_id in enumerate(ids)}
        mail = collections.deque()
        num_left = sum(request.n for request in requests)
        waiting = collections.deque(zip(ids, requests, strict=True))
        self._mail.update(dict.fromkeys(ids, mail))
        try:
            while num_left:
                while not mail:
                    self._advance(waiting)
                output = mail.popleft()
                num_left -= output.finish_reason is not None
                yield output._replace(id=place_of[output.id])
        finally:
            for request_id in ids:
                self._mail.pop(request_id, None)
                self.abort(request_id)

    def _advance(self, waiting: collections.deque[tuple[str, Request]]) -> None:
        """One step for everybody; what it brings goes to whom it belongs."""
        with self._step_lock:
            while waiting:
                try:
                    self.add(dataclasses.replace(waiting[0][1], id=waiting[0][0]))
                except QueueFull:
                    break
                waiting.popleft()
            for output in self.step():
                if output.id in self._mail:
                    self._mail[output.id].append(output)


def shapes_of(cfg: Any, mesh: Any, limits: Limits, num_pools: int) -> Shapes:
    """What the calls of an engine take whose rows are divided over so many pools."""
    page_size, chunk_size = _CPU_SIZES if device_kind(mesh) == "cpu" else _SIZES
    page_size, chunk_size = limits.page_size or page_size, limits.chunk_size or chunk_size
    if (num_chips := context.num_chips(mesh)) > 1:
        page_size *= num_chips
        chunk_size = page_size  # so that a chip computes the tokens that it keeps
    piece, is_cpu = chunk_size, device_kind(mesh) == "cpu"
    if not is_cpu or limits.invariant or page_size % piece:
        piece = -(-chunk_size // page_size) * page_size
    num_pieces = (1,) if limits.invariant else _num_pieces(cfg, mesh, piece)
    rows, overhead = -(-limits.max_rows // num_pools), _CPU_OVERHEAD if is_cpu else _OVERHEAD
    return Shapes(page_size, piece, num_pieces, rows, _MAX_STEPS, overhead=overhead)


def _check(request: Request, vocab_size: int) -> None:
    sampling = request.sampling
    if not 0 <= request.score_from < max(1, len(request.tokens)):
        raise ConfigError(
            f"score_from = {request.score_from} must be the place of a token of the prompt, 0 to "
            f"{len(request.tokens) - 1}."
        )
    if request.n < 1:
        raise ConfigError(f"n = {request.n} must be at least 1.")
    if not request.tokens:
        raise ConfigError("the prompt is empty; it must have at least one token.")
    ids = (*request.tokens, *(token for token, _ in sampling.logit_bias))
    wrong = next((token for token in ids if not 0 <= token < vocab_size), None)
    if wrong is not None:
        raise ConfigError(
            f"the prompt or logit_bias holds the id {wrong}; ids are 0 to {vocab_size - 1}."
        )
    if sampling.min_new_tokens and len(sampling.stop_ids) > MAX_STOP_IDS:
        raise ConfigError(
            f"min_new_tokens with {len(sampling.stop_ids)} stop ids; use at most {MAX_STOP_IDS}."
        )


def _num_pieces(cfg: Any, mesh: Any, piece: int) -> tuple[int, ...]:
    """How many pieces of a prompt the calls take."""
    if device_kind(mesh) != "cpu":
        return _NUM_PIECES
    most = _CPU_CALL_FLOPS // (2 * count(cfg).active * piece)
    return tuple(num for num in _CPU_NUM_PIECES if num <= max(8, most))


def _affordable_pages(
    cfg: Any, mesh: Any, page_size: int, limits: Limits, proposer: Proposer
) -> int:
    """Pages of each pool that a share of the memory holds."""
    size = (1, page_size, limits.cache_dtype)
    entries = jax.eval_shape(
        lambda: (empty_cache(cfg, *size).entries, proposer.new_entries(*size))
    )
    num_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(entries))
    num_shards = rules.num_shards(mesh, "batch")
    # The pages of a pool are spread over the devices that hold one batch shard.
    devices_of_pool = mesh.size // num_shards
    kind = device_kind(mesh)
    if kind == "cpu":
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        memory /= len(mesh.local_devices)
    else:
        stats = mesh.local_devices[0].memory_stats() or {}
        memory = stats.get("bytes_limit", 0) - stats.get("bytes_in_use", 0)
    share = _MEMORY_SHARE.get(kind, _MEMORY_SHARE_OTHERWISE)
    return int(memory * share * devices_of_pool // num_bytes)


class CallLength:
    """How many steps a call has, by the rows of a pool that draw: about _CALL_SECONDS of them."""

    def __init__(self):
        # By the power of two above the number of rows.
        self._num_steps = {0: 1}

    def max_steps(self, num_rows: int) -> int:
        """Of rows that have not been timed: as if twice as many took twice as long."""
        known = max(size for size in self._num_steps if size <= num_rows.bit_length())
        return max(1, self._num_steps[known] >> (num_rows.bit_length() - known))

    def took(self, num_rows: int, num_steps: int, seconds: float) -> None:
        """A call without prompts took so long."""
        if num_steps != self.max_steps(num_rows):
            return  # it was cut short
        if seconds < _CALL_SECONDS:
            num_steps = min(2 * num_steps, _MAX_STEPS)
        elif seconds > 2 * _CALL_SECONDS:
            num_steps = max(1, num_steps // 2)
        self._num_steps[num_rows.bit_length()] = num_steps


class _Clock:
    """For how long the device had nothing to do while there was work, and what steps cost.

    host_seconds: CPU time of the threads that called `step`.
    """

    def __init__(self):
        self.num_steps, self.host_seconds = 0, 0.0
        self._busy = self._idle = 0.0
        self._last: float | None = None

    def took(self, start: float, end: float) -> float:
        """Seconds that the device needed for a step that was dispatched at `start`."""
        last = start if self._last is None else self._last
        seconds = end - max(start, last)
        self._idle += max(0.0, start - last)
        self._busy += seconds
        self._last = end
        return seconds

    def pause(self) -> None:
        """There is no more work."""
        self._last = None

    @property
    def idle_share(self) -> float:
        """0 where nothing has run."""
        total = self._busy + self._idle
        return self._idle / total if total else 0.0


class _Compilations:
    """Counts jax's compilations inside steps from `start` on.

    thread: the one that steps, or None.
    """

    def __init__(self):
        self.num, self.thread = 0, None

    def start(self) -> None:
        counter = weakref.ref(self)

        def count(name: str, *_: Any, **__: Any) -> None:
            if name == "/jax/core/compile/backend_compile_duration" and counter() is not None:
                counter().num += counter().thread == threading.get_ident()

        jax.monitoring.register_event_duration_secs_listener(count)
