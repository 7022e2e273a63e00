"""Runs plans on the device: holds its state and its programs, and reads what they draw.

The rows of an accelerator's batch shards are pools of one lane, which one call runs.  On a CPU,
where a batch of small experts is split over the cores, each pool is a lane with a state and a
thread of its own.
"""

import dataclasses
import functools
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from hunyuan_jax.infer import cpu_layout, plan_array, programs
from hunyuan_jax.infer.plan_array import COLUMN
from hunyuan_jax.infer.request import TokenLogprobs
from hunyuan_jax.infer.sampling import Logprobs, Seen
from hunyuan_jax.infer.scheduler import Choice, Chunk, Drawn, Plan, Shapes
from hunyuan_jax.model.abstract import abstract_model
from hunyuan_jax.parallel import rules, settings

_MAX_DECODE_PROGRAMS = 8


class _Call(NamedTuple):
    """A call of a lane: what it returns, and the place of each chunk or row in its batch."""

    results: Future
    places: dict[int, int]


@dataclasses.dataclass
class Dispatched:
    """The calls of a plan, on their way."""

    plan: Plan
    chunk_calls: list[_Call]
    row_calls: list[_Call]


@dataclasses.dataclass
class Lane:
    """Pools that one call runs, their state, and the thread that calls."""

    pools: range
    state: programs.State
    thread: ThreadPoolExecutor


class Runner:
    """Executes plans over `num_pools` pools, each with shapes.rows rows and num_pages pages."""

    @settings.stated()
    def __init__(
        self,
        graph_def: nnx.GraphDef,
        params: dict[str, Any],
        num_lanes: int,
        shapes: Shapes,
        num_pages: int,
        max_context: int,
        is_invariant: bool,
        cache_dtype: str | None,
    ):
        model = nnx.merge(graph_def, params)
        self._mesh, self._cfg = model.mesh, model.cfg
        self.replace_weights(params)
        chunk_def = decode_def = graph_def
        if cpu_layout.suits(self._cfg, self._mesh):
            # The piece of an invariant call has it for itself.
            chunk_def = cpu_layout.graph_def(self._cfg, self._mesh)
            decode_def = cpu_layout.graph_def(self._cfg, self._mesh, is_invariant)
        self._shapes = shapes
        shards = rules.num_shards(self._mesh, "batch")
        self._num_rows = shards * shapes.rows
        num_columns = -(-max_context // shapes.page_size)
        self._lines = plan_array.Lines(num_lanes * shards, shapes.rows, num_columns)
        self._width = plan_array.width(num_columns)
        new_state = jax.jit(
            functools.partial(
                programs.new_state,
                self._cfg,
                self._num_rows,
                shards * (num_pages + 1),
                shapes.page_size,
                cache_dtype,
                self._mesh,
            )
        )
        self.lanes = [
            Lane(range(i * shards, (i + 1) * shards), new_state(), ThreadPoolExecutor(1))
            for i in range(num_lanes)
        ]
        self._functions = {
            "decode": functools.partial(
                programs.decode, decode_def, num_columns, shapes.max_steps
            ),
            "chunk": functools.partial(programs.chunk, chunk_def, num_columns, shards),
            "admit": programs.admit,
        }
        buckets = [1 << i for i in range(shapes.rows.bit_length()) if 1 << i < shapes.rows]
        self._buckets = [*buckets, shapes.rows][-1 if is_invariant else -_MAX_DECODE_PROGRAMS :]
        self._programs: dict[tuple, Future] = {}
        self._lock = threading.Lock()

    def replace_weights(self, params: dict[str, Any]) -> None:
        """Computes with these from the next call on."""
        self._params = params
        if cpu_layout.suits(self._cfg, self._mesh):
            specs = abstract_model(self._cfg, self._mesh)[1]
            self._params = cpu_layout.unstacked(self._cfg, params, specs)

    # -- programs -------------------------------------------------------------

    def shapes(self) -> list[tuple]:
        """The names and sizes of all programs."""
        return [
            ("admit",),
            *(("chunk", num) for num in self._shapes.num_pieces),
            *(("decode", num_rows) for num_rows in self._buckets),
        ]

    def program(self, *key: Any) -> Callable:
        """A compiled program; compiles it if nobody has."""
        with self._lock:
            is_new = key not in self._programs
            if is_new:
                self._programs[key] = Future()
        if is_new:
            try:
                self._programs[key].set_result(self._compile(*key))
            except BaseException as e:
                self._programs.pop(key).set_exception(e)
                raise
        return self._programs[key].result()

    @settings.stated()
    def _compile(self, name: str, num_lines: int = 0) -> Callable:
        state = self.lanes[0].state
        shardings = jax.tree.map(lambda x: x.sharding, state)
        function = self._functions[name]
        if name == "admit":
            V = self._cfg.vocab_size
            row = Seen(np.zeros(V, bool), np.zeros(V, np.int32), np.zeros(V, np.float32))
            jitted = jax.jit(function, donate_argnums=0, out_shardings=shardings)
            return jitted.lower(state, np.int32(0), row).compile()
        jitted = jax.jit(function, donate_argnums=1, out_shardings=(shardings, None))
        width = self._width + (2 * self._shapes.piece if name == "chunk" else 0)
        num_pools = len(self.lanes[0].pools)
        plan_BC = np.zeros((num_pools * num_lines, width), np.int32)
        return jitted.lower(self._params, state, plan_BC).compile()

    # -- calls ----------------------------------------------------------------

    def dispatch(self, plan: Plan) -> Dispatched:
        """Starts the calls of a plan; comes back at once."""
        dispatched = Dispatched(plan, [], [])
        for lane in self.lanes:
            chunks = [(i, c) for i, c in enumerate(plan.chunks) if c.choice.pool in lane.pools]
            rows = [(i, c) for i, (c, _) in enumerate(plan.rows) if c.pool in lane.pools]
            if chunks:
                dispatched.chunk_calls.append(self._call_chunks(lane, chunks))
            if rows:
                dispatched.row_calls.append(self._call_rows(lane, rows, plan))
        return dispatched

    def _call_chunks(self, lane: Lane, chunks: list[tuple[int, Chunk]]) -> _Call:
        size = self._shapes.piece
        num_needed = _most_in_a_pool(chunk.choice for _, chunk in chunks)
        num_pieces = next(num for num in self._shapes.num_pieces if num >= num_needed)
        chunks = sorted(chunks, key=lambda pair: pair[1].end)
        places = self._places(lane, num_pieces, [(i, chunk.choice) for i, chunk in chunks])
        plan_BC = self._empty_plan(len(lane.pools) * num_pieces, 2 * size)
        for i, chunk in chunks:
            line, tokens = plan_BC[places[i]], chunk.choice.tokens
            line[: self._width] = self._line(lane, chunk.choice)
            line[COLUMN["start"]], line[COLUMN["end"]] = chunk.start, chunk.end
            line[COLUMN["is_last"]] = chunk.is_last
            line[COLUMN["score_first"]] = _scored(chunk)[0]
            line[self._width :][: chunk.end - chunk.start] = tokens[chunk.start : chunk.end]
            following = tokens[chunk.start + 1 : chunk.end + 1]
            line[self._width + size :][: len(following)] = following
            if chunk.is_last:
                self._admit(lane, chunk.choice)
        program = self.program("chunk", num_pieces)
        return _Call(lane.thread.submit(_call, program, self._params, lane, plan_BC), places)

    def _call_rows(self, lane: Lane, rows: list[tuple[int, Choice]], plan: Plan) -> _Call:
        num_needed = _most_in_a_pool(choice for _, choice in rows)
        num_rows = next(size for size in self._buckets if size >= num_needed)
        places = self._places(lane, num_rows, rows)
        plan_BC = self._empty_plan(len(lane.pools) * num_rows, 0)
        for i, choice in rows:
            plan_BC[places[i]] = self._line(lane, choice)
        plan_BC[:, COLUMN["num_steps"]] = plan.num_steps
        plan_BC[:, COLUMN["ends_early"]] = plan.ends_early
        program = self.program("decode", num_rows)
        return _Call(lane.thread.submit(_call, program, self._params, lane, plan_BC), places)

    def _admit(self, lane: Lane, choice: Choice) -> None:
        if not plan_array.adjusts(choice):
            return
        V = self._cfg.vocab_size
        answer = np.asarray(choice.tokens[choice.num_prompt :], np.int64)
        is_prompt_V, bias_V = np.zeros(V, bool), np.zeros(V, np.float32)
        is_prompt_V[choice.tokens[: choice.num_prompt]] = True
        for token, bias in choice.request.sampling.logit_bias:
            bias_V[token] = bias
        seen = Seen(is_prompt_V, np.bincount(answer, minlength=V).astype(np.int32), bias_V)
        program, row = self.program("admit"), np.int32(self._row(lane, choice))

        def call():
            lane.state = program(lane.state, row, seen)

        lane.thread.submit(call)

    def _row(self, lane: Lane, choice: Choice) -> int:
        return (choice.pool - lane.pools.start) * self._shapes.rows + choice.row

    def _line(self, lane: Lane, choice: Choice) -> np.ndarray:
        return self._lines.of(choice, self._row(lane, choice))

    def _places(
        self, lane: Lane, num_rows: int, choices: Iterable[tuple[int, Choice]]
    ) -> dict[int, int]:
        """Index in the plan -> line: num_rows lines for each pool, one after the other."""
        num_in_pool, places = dict.fromkeys(lane.pools, 0), {}
        for i, choice in choices:
            places[i] = (choice.pool - lane.pools.start) * num_rows + num_in_pool[choice.pool]
            num_in_pool[choice.pool] += 1
        return places

    def _empty_plan(self, num_lines: int, num_more: int) -> np.ndarray:
        plan_BC = np.zeros((num_lines, self._width + num_more), np.int32)
        plan_BC[:, COLUMN["row"]] = self._num_rows
        return plan_BC

    # -- results --------------------------------------------------------------

    def read(self, dispatched: Dispatched) -> tuple[list[Drawn], list[Drawn], float]:
        """(what chunks, what rows have drawn, when the device was ready); waits for it."""
        plan = dispatched.plan
        of_chunks = [Drawn(())] * len(plan.chunks)
        of_rows = [Drawn(())] * len(plan.rows)
        found = [
            (call.places, drawn, call.results.result())
            for calls, drawn in (
                (dispatched.chunk_calls, of_chunks),
                (dispatched.row_calls, of_rows),
            )
            for call in calls
        ]
        jax.block_until_ready([results for *_, results in found])
        ready = time.perf_counter()
        for places, drawn, results in found:
            if drawn is of_chunks:
                results, prompt = results
                choices = [chunk.choice for chunk in plan.chunks]
            else:
                prompt, choices = None, [choice for choice, _ in plan.rows]
            tokens_IB, num_made_B = np.asarray(results.tokens_IB), np.asarray(results.num_made_B)
            for i, place in places.items():
                sampling = choices[i].request.sampling
                num = num_made_B[place]
                logprobs = of_prompt = None
                if sampling.logprobs is not None:
                    where = (slice(num), place)
                    logprobs = _entries(results.logprobs, where, sampling.logprobs)
                if prompt is not None and sampling.prompt_logprobs is not None:
                    where = (place, slice(*_scored(plan.chunks[i])))
                    of_prompt = _entries(prompt, where, sampling.prompt_logprobs)
                drawn[i] = Drawn(tokens_IB[:num, place].tolist(), logprobs, of_prompt)
        return of_chunks, of_rows, ready


def _call(program: Callable, params: Any, lane: Lane, plan_BC: np.ndarray) -> Any:
    lane.state, results = program(params, lane.state, plan_BC)
    return results


def _most_in_a_pool(choices: Iterable[Choice]) -> int:
    num_in_pool: dict[int, int] = {}
    for choice in choices:
        num_in_pool[choice.pool] = num_in_pool.get(choice.pool, 0) + 1
    return max(num_in_pool.values())


def _scored(chunk: Chunk) -> tuple[int, int]:
    """The tokens [first, end) of a chunk whose next tokens belong to the prompt and are scored."""
    request = chunk.choice.request
    first = max(chunk.start, request.score_from - 1) - chunk.start
    return first, max(first, min(chunk.end, len(request.tokens) - 1) - chunk.start)


def _entries(found: Logprobs, where: Any, num_top: int) -> tuple[TokenLogprobs, ...]:
    """The log-probabilities at an index, each with num_top of the most likely ids."""
    of_tokens = np.asarray(found.token)[where].tolist()
    if not num_top:
        return tuple(TokenLogprobs(logprob, ()) for logprob in of_tokens)
    ids, tops = (np.asarray(x)[where][..., :num_top].tolist() for x in (found.top_ids, found.top))
    return tuple(
        TokenLogprobs(logprob, tuple(zip(*best, strict=True)))
        for logprob, *best in zip(of_tokens, ids, tops, strict=True)
    )
