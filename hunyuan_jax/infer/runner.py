"""Runs plans on the device: holds its state and its programs, and reads what they draw.

The rows of an accelerator's batch shards are pools of one lane, which one call runs.  On a CPU,
where a batch of small experts is split over the cores, each pool is a lane with a state and a
thread of its own.
A mesh over several processes has a Runner in each.  That of process 0 gets the plans, and tells
the others each program that it compiles or calls (`infer/channel.py`).
"""

import collections
import dataclasses
import itertools
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from hunyuan_jax.infer import channel, cpu_layout, plan_array, programs
from hunyuan_jax.infer.plan_array import COLUMN
from hunyuan_jax.infer.request import TokenLogprobs
from hunyuan_jax.infer.sampling import Logprobs, Seen
from hunyuan_jax.infer.scheduler import Choice, Chunk, Drawn, DrawnRows, Plan, Shapes
from hunyuan_jax.infer.speculate import Proposer
from hunyuan_jax.model.abstract import abstract_model
from hunyuan_jax.parallel import hosts, rules, settings
from hunyuan_jax.params.abstract import row_major
from hunyuan_jax.quant.array import is_quantized


class _Call(NamedTuple):
    """A call of a lane: what it returns, and the line of each chunk by its place in the plan."""

    results: Future
    lines: dict[int, int]


class _RowCall(NamedTuple):
    """A call of a lane: what it returns, of which pools, and the number of lines of each."""

    results: Future
    pools: range
    num_lines: int


@dataclasses.dataclass
class Dispatched:
    """The calls of a plan, on their way."""

    plan: Plan
    chunk_calls: list[_Call]
    row_calls: list[_RowCall]


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
        proposer: Proposer,
    ):
        model = nnx.merge(graph_def, params)
        self._mesh, self._cfg = model.mesh, model.cfg
        self._proposer = proposer
        self._programs: dict[tuple[str, int], Future] = {}
        self.replace_weights(params)
        defs = {"chunk": graph_def, "decode": graph_def}
        if cpu_layout.suits(self._cfg, self._mesh):
            # The piece of an invariant call has it for itself.
            drawing = cpu_layout.InvariantStack if is_invariant else cpu_layout.UnrolledStack
            stacks = {"chunk": cpu_layout.PromptStack, "decode": drawing}
            for name, stack in stacks.items():
                defs[name] = cpu_layout.graph_def(self._cfg, self._mesh, stack)
        self._shapes = shapes
        shards = rules.num_shards(self._mesh, "batch")
        num_columns = -(-max_context // shapes.page_size)
        self._lines = plan_array.Lines(num_lanes * shards, shards, shapes.rows, num_columns)
        self._width = plan_array.width(num_columns)
        self._sources = programs.Sources(
            defs, self._cfg, self._mesh, shapes, num_pages, num_columns, cache_dtype, proposer
        )
        new_state = jax.jit(self._sources.new_state)
        self.lanes = [
            Lane(range(i * shards, (i + 1) * shards), new_state(), ThreadPoolExecutor(1))
            for i in range(num_lanes)
        ]
        buckets = [4**i for i in range(shapes.rows.bit_length()) if 4**i < shapes.rows]
        self._sizes = {
            "admit": (0,),
            "chunk": shapes.num_pieces,
            "decode": (*([] if is_invariant else buckets), shapes.rows),
        }
        self._lock = threading.Lock()
        self._leader, self._follower = _connected(self._mesh)

    def replace_weights(self, params: dict[str, Any] | None) -> None:
        """Computes with these from the next call on; None holds none.  Waits for programs that
        are being compiled.
        """
        wait(list(self._programs.values()))
        specs = abstract_model(self._cfg, self._mesh)[1]
        if params is None:
            pass
        elif cpu_layout.suits(self._cfg, self._mesh):
            params = cpu_layout.unstacked(self._cfg, params, specs)
        else:
            params = jax.tree.map(row_major, params, specs, is_leaf=is_quantized)
        self._params = (params, self._proposer.params)

    # -- programs -------------------------------------------------------------

    def shapes(self) -> list[tuple[str, int]]:
        """The names and sizes of all programs.  With the first two any request can be served, with
        the third as many as there are rows.
        """
        decode = self._sizes["decode"]
        first = [("chunk", self._sizes["chunk"][0]), ("decode", decode[0]), ("decode", decode[-1])]
        shapes = [(name, num) for name, sizes in self._sizes.items() for num in sizes]
        return list(dict.fromkeys([*first, *shapes]))

    def compile_ahead(
        self, shapes: Sequence[tuple[str, int]], num_threads: int | None
    ) -> list[Future]:
        """Compiles programs in threads.  Calls don't use them before they are there."""
        threads = ThreadPoolExecutor(num_threads)
        with self._lock:
            new = [shape for shape in shapes if shape not in self._programs]
            self._programs |= {shape: Future() for shape in new}
            programs = [self._programs[shape] for shape in shapes]
            for shape in new:
                threads.submit(self._fill, *shape)
            threads.shutdown(wait=False)
            return programs

    @property
    def has_decode(self) -> bool:
        """Whether a program that draws is there or being compiled."""
        return any(name == "decode" for name, _ in self._programs)

    def foresee_rows(self, num_rows: int) -> None:
        """Begins to compile the program that draws num_rows rows of each pool."""
        sizes = self._sizes["decode"]
        size = next((num for num in sizes if num >= num_rows), sizes[-1])
        self.compile_ahead([("decode", size)], 1)

    def sizes(self, name: str) -> tuple[int, ...]:
        """Sizes of a program that are not being compiled: a call need not wait for them, or is the
        first to need one.
        """
        found = ((num, self._programs.get((name, num))) for num in self._sizes[name])
        return tuple(num for num, program in found if program is None or program.done())

    def _program(self, name: str, num_needed: int = 0) -> tuple[Callable, int]:
        """(the program for so many lines, the lines that it takes); compiles it if nobody has.

        Rows that draw take a larger one that is there, or wait for one that is being compiled: it
        costs less than to compile another.
        """
        sizes = [num for num in self.sizes(name) if num >= num_needed] or self._sizes[name][-1:]
        enough = [num for num in self._sizes[name] if name == "decode" and num >= num_needed]
        begun = [num for num in enough if (name, num) in self._programs]
        known = [num for num in sizes if num in begun]
        shape = (name, (known or begun or sizes)[0])
        with self._lock:
            is_new = shape not in self._programs
            program = self._programs.setdefault(shape, Future())
        if is_new:
            self._fill(*shape)
        return program.result(), shape[1]

    def _fill(self, name: str, num_lines: int) -> None:
        try:
            self._leader.compile(name, num_lines)
            program = self.compile(name, num_lines)
            self._leader.wait_compiled(name, num_lines)
            self._programs[name, num_lines].set_result(program)
        except BaseException as e:
            self._programs.pop((name, num_lines)).set_exception(e)

    @settings.stated()
    def compile(self, name: str, num_lines: int) -> Callable:
        """Traces and compiles a program for num_lines lines of each pool of a lane."""
        lowered = self._sources.lower(name, num_lines, self._params, self.lanes[0].state)
        options = cpu_layout.compiler_options(len(self.lanes))
        return lowered.compile(compiler_options=options)

    # -- calls ----------------------------------------------------------------

    def dispatch(self, plan: Plan) -> Dispatched:
        """Starts the calls of a plan; comes back at once."""
        if self.follows:
            raise RuntimeError("this process follows process 0, which plans; call follow()")
        for choice, num_known in plan.changed:
            if choice.row >= 0:  # else it had to make room
                self._lines.write(choice, num_known)
        dispatched = Dispatched(plan, [], [])
        for lane in self.lanes:
            chunks = [(i, c) for i, c in enumerate(plan.chunks) if c.choice.pool in lane.pools]
            if chunks:
                dispatched.chunk_calls.append(self._call_chunks(lane, chunks))
            if any(plan.rows[pool].choices for pool in lane.pools):
                dispatched.row_calls.append(self._call_rows(lane, plan))
        return dispatched

    def _call_chunks(self, lane: Lane, chunks: list[tuple[int, Chunk]]) -> _Call:
        size = self._shapes.piece
        num_in_pool = collections.Counter(chunk.choice.pool for _, chunk in chunks)
        program, num_pieces = self._program("chunk", max(num_in_pool.values()))
        chunks = sorted(chunks, key=lambda pair: pair[1].end)
        free = {pool: itertools.count(i * num_pieces) for i, pool in enumerate(lane.pools)}
        lines = {i: next(free[chunk.choice.pool]) for i, chunk in chunks}
        plan_BC = self._lines.empty(num_pieces, 2 * size)
        for i, chunk in chunks:
            line, choice, tokens = plan_BC[lines[i]], chunk.choice, chunk.choice.tokens
            line[: self._width] = self._lines.of_pools[choice.pool, choice.row]
            line[COLUMN["start"]], line[COLUMN["end"]] = chunk.start, chunk.end
            line[COLUMN["is_last"]] = chunk.is_last
            line[COLUMN["score_first"]] = _scored(chunk)[0]
            line[self._width :][: chunk.end - chunk.start] = tokens[chunk.start : chunk.end]
            following = tokens[chunk.start + 1 : chunk.end + 1]
            line[self._width + size :][: len(following)] = following
            if chunk.is_last:
                self._admit(lane, choice)
        return _Call(self._submit(lane, "chunk", num_pieces, program, plan_BC), lines)

    def _call_rows(self, lane: Lane, plan: Plan) -> _RowCall:
        num_needed = max(len(plan.rows[pool].choices) for pool in lane.pools)
        program, num_lines = self._program("decode", num_needed)
        plan_BC = self._lines.drawing(plan, lane.pools, num_lines)
        results = self._submit(lane, "decode", num_lines, program, plan_BC)
        return _RowCall(results, lane.pools, num_lines)

    def _admit(self, lane: Lane, choice: Choice) -> None:
        if not (plan_array.adjusts(choice) or self._proposer.keeps_tokens):
            return
        V = self._cfg.vocab_size
        answer = np.asarray(choice.tokens[choice.num_prompt :], np.int64)
        is_prompt_V, bias_V = np.zeros(V, bool), np.zeros(V, np.float32)
        is_prompt_V[choice.tokens[: choice.num_prompt]] = True
        for token, bias in choice.request.sampling.logit_bias:
            bias_V[token] = bias
        seen = Seen(is_prompt_V, np.bincount(answer, minlength=V).astype(np.int32), bias_V)
        tokens_S = np.zeros(lane.state.memory.tokens_LS.shape[1], np.int32)
        tokens_S[: len(choice.tokens)] = choice.tokens[: len(tokens_S)]
        (program, size), row = self._program("admit"), np.int32(self._lines.row(choice))
        self._submit(lane, "admit", size, program, row, seen, tokens_S)

    def _submit(self, lane: Lane, name: str, size: int, program: Callable, *inputs: Any) -> Future:
        """Calls a program in the lane's thread, in every process in the same order."""
        params = self._params

        def call():
            self._leader.call(name, size, jax.tree.leaves(inputs))
            return _call(name, program, params, lane, inputs)

        return lane.thread.submit(call)

    # -- several processes ----------------------------------------------------

    @property
    def follows(self) -> bool:
        """Whether process 0, which is another one, plans for this one."""
        return self._follower is not None

    def follow(self) -> int:
        """Compiles and calls what process 0 does, until it pauses or stops; returns the exit
        status that it gives.  A process that fails, or misses another one, ends at once.
        """
        (lane,), follower = self.lanes, self._follower
        threads = ThreadPoolExecutor(os.cpu_count())
        try:
            for kind, name, size, payload in follower.messages():
                if kind == channel.Kind.COMPILE:
                    program = threads.submit(self._compile_and_tell, name, size)
                    self._programs[name, size] = program
                else:
                    inputs, tree = jax.tree.flatten(self._sources.inputs(name, size))
                    inputs = jax.tree.unflatten(tree, channel.from_bytes(inputs, payload))
                    program = self._programs[name, size].result()
                    _call(name, program, self._params, lane, inputs)
            jax.block_until_ready(lane.state)
        except Exception as e:
            follower.failed(e)
        return follower.status

    def _compile_and_tell(self, name: str, num_lines: int) -> Callable:
        try:
            program = self.compile(name, num_lines)
        except Exception as e:
            self._follower.failed(e)
            raise
        self._follower.compiled(name, num_lines)
        return program

    def pause(self) -> None:
        """Lets the processes that follow do something else, after what was dispatched; comes back
        when it is done here.
        """
        lane = self.lanes[0]
        lane.thread.submit(self._leader.pause).result()
        jax.block_until_ready(lane.state)

    def close(self, status: int, at_once: bool) -> None:
        """Ends the processes that follow; nothing can be dispatched afterwards.

        Args:
          status: their exit status.
          at_once: whether they leave undone what was dispatched.
        """
        if at_once:
            self._leader.stop(status, at_once)
        else:
            self.lanes[0].thread.submit(self._leader.stop, status).result()

    # -- results --------------------------------------------------------------

    def read(self, dispatched: Dispatched) -> tuple[list[Drawn], list[DrawnRows], float]:
        """(what chunks, what the rows of each pool have drawn, when the device was ready); waits
        for it.
        """
        plan = dispatched.plan
        of_chunks = [Drawn([])] * len(plan.chunks)
        of_rows = [DrawnRows((), (), ())] * len(plan.rows)
        try:
            found = [call.results.result() for call in dispatched.chunk_calls]
            found_rows = [call.results.result() for call in dispatched.row_calls]
            jax.block_until_ready((found, found_rows))
        except Exception:
            self._leader.wait_for_reason()
            raise
        ready = time.perf_counter()
        for (_, lines), (results, prompt) in zip(dispatched.chunk_calls, found, strict=True):
            tokens_B = np.asarray(results.tokens_IB)[0].tolist()
            for i, line in lines.items():
                chunk, logprobs, of_prompt = plan.chunks[i], None, None
                num_top = chunk.choice.request.sampling.prompt_logprobs
                if num_top is not None:
                    of_prompt = _entries(prompt, (line, slice(*_scored(chunk))), num_top)
                if chunk.is_last and chunk.choice.num_top is not None:
                    logprobs = _entries(results.logprobs, ([0], line), chunk.choice.num_top)
                of_chunks[i] = Drawn([tokens_B[line]][: chunk.is_last], logprobs, of_prompt)
        for (_, pools, num_lines), results in zip(dispatched.row_calls, found_rows, strict=True):
            for i, pool in enumerate(pools):
                choices = plan.rows[pool].choices
                lines = range(i * num_lines, i * num_lines + len(choices))
                of_rows[pool] = drawn_rows(results, lines, choices, self._shapes.step_tokens)
        return of_chunks, of_rows, ready


def _call(name: str, program: Callable, params: Any, lane: Lane, inputs: Sequence[Any]) -> Any:
    if name == "admit":
        lane.state = program(lane.state, *inputs)
        return None
    lane.state, results = program(params, lane.state, *inputs)
    return results


def _connected(mesh: Mesh) -> tuple[channel.Alone, channel.Follower | None]:
    """(the end of process 0, or of a process without others; the end of another process)."""
    if not hosts.spans_processes(mesh):
        return channel.Alone(), None
    num, leader, follower = jax.process_count(), None, None
    with hosts.fail_together():
        if hosts.is_first():
            leader = channel.Leader(hosts.coordinator_host(), num)
    address = hosts.gathered(leader.address if leader else "")[0]
    with hosts.fail_together():
        if leader:
            leader.accept()
        else:
            follower = channel.Follower(address, jax.process_index(), num)
    return leader or channel.Alone(), follower


def drawn_rows(
    results: programs.Results, lines: range, choices: Sequence[Choice], width: int
) -> DrawnRows:
    """What the choices of some lines have drawn; width: tokens of a step."""
    tokens_BI = np.asarray(results.tokens_IB)[:, lines.start : lines.stop].T
    is_drawn_BI = tokens_BI >= 0
    if is_drawn_BI.all():
        tokens = tokens_BI.tolist()
    else:
        flat, ends = tokens_BI[is_drawn_BI].tolist(), is_drawn_BI.sum(1).cumsum().tolist()
        tokens = [flat[start:end] for start, end in itertools.pairwise([0, *ends])]
    logprobs: list[Sequence[TokenLogprobs] | None] = [None] * len(choices)
    for i in [i for i, choice in enumerate(choices) if choice.num_top is not None]:
        where = (np.flatnonzero(is_drawn_BI[i]), lines[i])
        logprobs[i] = _entries(results.logprobs, where, choices[i].num_top)
    return DrawnRows(tokens, logprobs, is_drawn_BI[:, ::width].sum(1).tolist())


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
