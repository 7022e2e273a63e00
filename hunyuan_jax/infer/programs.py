"""The engine's programs: functions of the parameters, the device's state and a plan's array.

Letters: L rows of the device, B rows of a call, T tokens of a chunk or a step, I tokens of a call,
N pages of a row, V vocabulary, K drafts or most likely tokens, C columns of a plan.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hunyuan_jax.infer import plan_array, sampling
from hunyuan_jax.infer.plan_array import COLUMN, FIRST_PAGE, FLOATS, STOPS, WITH_TOP
from hunyuan_jax.infer.sampling import Logprobs, RowSettings, Seen
from hunyuan_jax.infer.scheduler import Shapes
from hunyuan_jax.infer.speculate import Memory, Off, Proposer, Step
from hunyuan_jax.model.cache import Cache, empty_cache
from hunyuan_jax.model.transformer import Transformer
from hunyuan_jax.parallel import context, hosts, rules

# Tokens of a chunk whose logits exist at a time, for their log-probabilities.
_SCORED = 32


class State(NamedTuple):
    """What stays on the device between calls.

    entries: the pages of the cache.  Of each row: token_L, the newest token, not in the cache yet;
    length_L, tokens in the cache; num_drawn_L; is_done_L; what `Seen` says, valid for rows that
    adjust their logits; drafts_LK, of what follows the newest token.  The last row is for lines
    without a choice.  memory: of the proposer.
    """

    entries: dict[str, Any]
    token_L: jax.Array
    length_L: jax.Array
    num_drawn_L: jax.Array
    is_done_L: jax.Array
    seen: Seen
    drafts_LK: jax.Array
    memory: Memory


class Results(NamedTuple):
    """tokens_IB: drawn tokens, -1 where none was, 1 + K of each step; logprobs [I, B]."""

    tokens_IB: jax.Array
    logprobs: Logprobs


class Sources(NamedTuple):
    """What an engine's programs are compiled from; the devices of the mesh need not be there.

    graph_defs: of the model in "chunk" and in "decode"; num_pages: of a pool; num_columns: pages
    of a row; proposer: of drafts.
    """

    graph_defs: dict[str, nnx.GraphDef]
    cfg: Any
    mesh: Any
    shapes: Shapes
    num_pages: int
    num_columns: int
    cache_dtype: str | None
    proposer: Proposer = Off()

    def new_state(self) -> State:
        """The state of one lane before its first call."""
        num_pools = rules.num_shards(self.mesh, "batch")
        rows, pages = num_pools * self.shapes.rows, num_pools * (self.num_pages + 1)
        size = self.shapes.page_size
        state = new_state(self.cfg, rows, pages, size, self.cache_dtype, self.mesh)
        K, entries = (
            self.proposer.num_tokens,
            self.proposer.new_entries(pages, size, self.cache_dtype),
        )
        entries = {name: entry.pinned(self.mesh) for name, entry in entries.items()}
        memory = Memory(entries, jnp.zeros((rows + 1, self._num_kept), jnp.int32))
        return state._replace(drafts_LK=jnp.zeros((rows + 1, K), jnp.int32), memory=memory)

    def lower(self, name: str, num_lines: int, params: Any, state: Any) -> jax.stages.Lowered:
        """A program for num_lines lines of each pool.

        Args:
          name: "admit", "chunk" or "decode".
          params: of the model and of the proposer; state: arrays, or shapes with shardings.
        """
        shardings = jax.tree.map(lambda x: x.sharding, state)
        inputs = self.inputs(name, num_lines)
        if name == "admit":
            jitted = jax.jit(admit, donate_argnums=0, out_shardings=shardings)
            return jitted.lower(state, *inputs)
        graph_def = self.graph_defs[name]
        if name == "chunk":
            num_pools = rules.num_shards(self.mesh, "batch")
            function = functools.partial(
                chunk, graph_def, self.proposer, self.num_columns, num_pools
            )
        else:
            function = functools.partial(
                decode, graph_def, self.proposer, self.num_columns, self.shapes
            )
        # Process 0 reads what is drawn, so all of it must be on its own devices.
        is_shared = hosts.spans_processes(self.mesh)
        results = rules.sharding(self.mesh, ()) if is_shared else None
        jitted = jax.jit(function, donate_argnums=1, out_shardings=(shardings, results))
        return jitted.lower(params, state, *inputs)

    def inputs(self, name: str, num_lines: int) -> tuple[Any, ...]:
        """What a call of a program gets from the host, as zeros: a row of "admit", what it has
        seen and its tokens; else the plan's array.
        """
        if name == "admit":
            V = self.cfg.vocab_size
            seen = Seen(np.zeros(V, bool), np.zeros(V, np.int32), np.zeros(V, np.float32))
            return np.int32(0), seen, np.zeros(self._num_kept, np.int32)
        width = plan_array.width(self.num_columns) + 2 * self.shapes.piece * (name == "chunk")
        num_pools = rules.num_shards(self.mesh, "batch")
        return (np.zeros((num_pools * num_lines, width), np.int32),)

    @property
    def _num_kept(self) -> int:
        """Tokens of a row that the proposer reads."""
        return self.num_columns * self.shapes.page_size if self.proposer.keeps_tokens else 0


def new_state(
    cfg, num_rows: int, num_pages: int, page_size: int, cache_dtype: str | None, mesh
) -> State:
    """Nothing computed yet, in num_rows rows and one more, and num_pages pages."""
    entries = empty_cache(cfg, num_pages, page_size, cache_dtype).entries
    entries = {name: entry.pinned(mesh) for name, entry in entries.items()}
    shape = (num_rows + 1, cfg.vocab_size)
    integers_L = jnp.zeros(num_rows + 1, jnp.int32)
    seen = Seen(jnp.zeros(shape, bool), jnp.zeros(shape, jnp.int32), jnp.zeros(shape))
    is_done_L = jnp.ones(num_rows + 1, bool)
    none_L0 = jnp.zeros((num_rows + 1, 0), jnp.int32)
    rows = (integers_L, integers_L, integers_L, is_done_L)
    return State(entries, *rows, seen, none_L0, Memory({}, none_L0))


def admit(state: State, row: jax.Array, seen: Seen, tokens_S: jax.Array) -> State:
    """The state of a choice that adjusts its logits, or whose proposer keeps its tokens: `seen` of
    one row, [V] each, and its tokens so far.
    """
    arrays = (old.at[row].set(new) for old, new in zip(state.seen, seen, strict=True))
    tokens_LS = state.memory.tokens_LS.at[row].set(tokens_S)
    return state._replace(seen=Seen(*arrays), memory=state.memory._replace(tokens_LS=tokens_LS))


class _Lines:
    """A plan's array [B, C] by the names of its columns."""

    def __init__(self, plan_BC: jax.Array):
        self._plan_BC = plan_BC

    def __getattr__(self, name: str) -> jax.Array:
        column_B = self._plan_BC[:, COLUMN[name]]
        if name in FLOATS:
            return jax.lax.bitcast_convert_type(column_B, jnp.float32)
        return column_B

    def table(self, num_pages: int) -> jax.Array:
        """int32 [B, N]."""
        return self._plan_BC[:, FIRST_PAGE : FIRST_PAGE + num_pages]

    def settings(self, num_drawn_B: jax.Array) -> RowSettings:
        """Of each row that has drawn so many tokens."""
        return RowSettings(
            self.temperature,
            self.top_k,
            self.top_p,
            self.min_p,
            self.repetition_penalty,
            self.presence_penalty,
            self.frequency_penalty,
            self.seed,
            self.choice,
            num_drawn_B,
            self.min_new,
            self.stops,
            (self.adjusts > 0) & (self.is_used > 0),
        )

    @property
    def stops(self) -> jax.Array:
        """int32 [B, W]."""
        return self._plan_BC[:, STOPS]


def _draw(logits_BV, lines, num_drawn_B, is_live_B, state_seen):
    """(token_B, its log-probabilities where asked, whether the row is done with it)."""

    def seen():
        return Seen(*(x_LV[lines.row] for x_LV in state_seen))

    rows = lines.settings(num_drawn_B)
    # What a row without a choice asks for does not matter.
    rows = rows._replace(temperature=jnp.where(is_live_B, rows.temperature, 0))
    token_B = sampling.next_token(logits_BV, rows, seen)
    logprobs = jax.lax.cond(
        (is_live_B & (lines.logprobs > 0)).any(),
        lambda: sampling.logprobs(
            logits_BV, token_B, (is_live_B & (lines.logprobs == WITH_TOP)).any()
        ),
        lambda: _no_logprobs(token_B.shape, logits_BV.shape[-1]),
    )
    is_done_B = (token_B[:, None] == lines.stops).any(-1) | (num_drawn_B + 1 >= lines.limit)
    return token_B, logprobs, is_done_B


def _everywhere(mesh, *columns_B):
    """int32 columns of the lines, on every device, as the rows of the state are: one exchange of a
    few numbers, where a scatter of sharded ones would exchange what it writes to.
    """
    columns_BC = jnp.stack([x.astype(jnp.int32) for x in columns_B], axis=1)
    return tuple(rules.constrain(columns_BC, mesh, ()).T)


def _with_rows(state, row_B, token_B, length_B, num_drawn_B, is_done_B, *drafts):
    """The state with new values of the rows of the lines, as `_everywhere` gives them."""
    drafts_LK = state.drafts_LK
    if drafts:
        drafts_LK = drafts_LK.at[row_B].set(jnp.stack(drafts, axis=1))
    return state._replace(
        token_L=state.token_L.at[row_B].set(token_B),
        length_L=state.length_L.at[row_B].set(length_B),
        num_drawn_L=state.num_drawn_L.at[row_B].set(num_drawn_B),
        is_done_L=state.is_done_L.at[row_B].set(is_done_B > 0),
        drafts_LK=drafts_LK,
    )


def _with_tokens(memory, row_B, token_B, place_B, num_new_B):
    """The memory with a token of each row at its place, where it is new."""
    place_B = jnp.where(num_new_B > 0, place_B, memory.tokens_LS.shape[1])
    tokens_LS = memory.tokens_LS.at[row_B, place_B].set(token_B, mode="drop")
    return memory._replace(tokens_LS=tokens_LS)


def _no_logprobs(shape: tuple[int, ...], vocab_size: int) -> Logprobs:
    top_shape = (*shape, sampling.num_logprobs(vocab_size))
    return Logprobs(jnp.zeros(shape), jnp.zeros(top_shape), jnp.zeros(top_shape, jnp.int32))


def decode(
    graph_def: nnx.GraphDef,
    proposer: Proposer,
    num_pages: int,
    shapes: Shapes,
    params: tuple[dict[str, Any], Any],
    state: State,
    plan_BC: jax.Array,
) -> tuple[State, Results]:
    """Runs num_steps steps, in each of which a row draws a token and those that its drafts allow;
    ends when all rows are done, or one is and the plan ends early.

    A row that is done, or whose pages are full, writes to page 0.
    """
    model: Transformer = nnx.merge(graph_def, params[0])
    lines = _Lines(plan_BC)
    B, V, T = len(plan_BC), model.cfg.vocab_size, 1 + proposer.num_tokens
    row_B, table_BN = lines.row, lines.table(num_pages)
    capacity_B = (table_BN > 0).sum(1) * shapes.page_size
    zeros_B = jnp.zeros(B, jnp.int32)

    class Carry(NamedTuple):
        step: jax.Array
        entries: dict[str, Any]
        memory: Memory
        count_LV: jax.Array
        token_B: jax.Array
        length_B: jax.Array
        num_drawn_B: jax.Array
        is_done_B: jax.Array
        drafts_BK: jax.Array
        results: Results

        @property
        def is_live_B(self) -> jax.Array:
            return ~self.is_done_B & (self.length_B < capacity_B)

    def goes_on(carry: Carry) -> jax.Array:
        was_done_B = state.is_done_L[row_B]
        has_ended = (carry.is_done_B & ~was_done_B).any() & (lines.ends_early.max() > 0)
        return (carry.step < lines.num_steps.max()) & carry.is_live_B.any() & ~has_ended

    def one_step(carry: Carry) -> Carry:
        is_live_B, length_B = carry.is_live_B, carry.length_B
        cache = Cache(
            carry.entries,
            zeros_B,
            jnp.where(is_live_B, length_B, 0),
            jnp.where(is_live_B[:, None], table_BN, 0),
        )
        read_BT = jnp.concatenate([carry.token_B[:, None], carry.drafts_BK], axis=1)
        output = model.extend(read_BT, cache)
        logits_BTV = model.logits(output.hidden_BTD)
        # Nothing that is drawn follows the last draft.
        drafts_BT = jnp.pad(carry.drafts_BK, ((0, 0), (0, 1)), constant_values=-1)

        def draw_one(t: jax.Array, drawing: tuple[Carry, jax.Array]) -> tuple[Carry, jax.Array]:
            carry, is_live_B = drawing
            logits_BV = jax.lax.dynamic_index_in_dim(logits_BTV, t, 1, keepdims=False)
            seen = state.seen._replace(count_BV=carry.count_LV)
            token_B, logprobs, ends_B = _draw(logits_BV, lines, carry.num_drawn_B, is_live_B, seen)
            token_B, live_B = jnp.where(is_live_B, token_B, -1), is_live_B.astype(jnp.int32)
            written = jax.tree.map(
                lambda old, new: old.at[carry.step * T + t].set(new),
                carry.results,
                Results(token_B, logprobs),
            )
            token_B = jnp.where(is_live_B, token_B, carry.token_B)
            told = _everywhere(model.mesh, row_B, token_B, carry.length_B + 1, live_B)
            carry = carry._replace(
                memory=_with_tokens(carry.memory, *told),
                count_LV=carry.count_LV.at[told[0], told[1]].add(told[3]),
                token_B=token_B,
                length_B=carry.length_B + live_B,
                num_drawn_B=carry.num_drawn_B + live_B,
                is_done_B=carry.is_done_B | (is_live_B & ends_B),
                results=written,
            )
            return carry, is_live_B & carry.is_live_B & (token_B == drafts_BT[:, t])

        # Without drafts not a loop, whose carry XLA:CPU would copy.
        carry, _ = jax.lax.fori_loop(0, T, draw_one, (carry, is_live_B), unroll=T == 1)
        drawn_TB = jax.lax.dynamic_slice_in_dim(carry.results.tokens_IB, carry.step * T, T)
        step = Step(
            row_B,
            cache.table_BN,
            cache.length_B,
            read_BT[:, 0],
            jnp.maximum(drawn_TB.T, 0),
            carry.length_B - length_B,
            output.hidden_BTD,
        )
        memory, drafts_BK = proposer.propose(model, params[1], carry.memory, step)
        return carry._replace(
            step=carry.step + 1,
            entries=output.cache.entries,
            memory=memory,
            drafts_BK=drafts_BK,
        )

    tokens_IB = jnp.full((shapes.max_steps * T, B), -1, jnp.int32)
    carry = Carry(
        jnp.int32(0),
        state.entries,
        state.memory,
        state.seen.count_BV,
        *(x_L[row_B] for x_L in (state.token_L, state.length_L, state.num_drawn_L)),
        state.is_done_L[row_B] | (lines.is_used == 0),
        state.drafts_LK[row_B],
        Results(tokens_IB, _no_logprobs(tokens_IB.shape, V)),
    )
    carry = jax.lax.while_loop(goes_on, one_step, carry)
    values = (carry.token_B, carry.length_B, carry.num_drawn_B, carry.is_done_B)
    state = _with_rows(
        state, *_everywhere(model.mesh, row_B, *values, *carry.drafts_BK.T)
    )._replace(
        entries=carry.entries,
        memory=carry.memory,
        seen=state.seen._replace(count_BV=carry.count_LV),
    )
    return state, carry.results


def chunk(
    graph_def: nnx.GraphDef,
    proposer: Proposer,
    num_pages: int,
    num_pools: int,
    params: tuple[dict[str, Any], Any],
    state: State,
    plan_BC: jax.Array,
) -> tuple[State, tuple[Results, Logprobs]]:
    """Computes a piece of each row's prompt, and draws a token of the rows whose last it is.

    The rows of a pool follow each other.  The last columns are the T tokens and the T that follow
    each of them, for log-probabilities [B, T] of the prompt.
    """
    model: Transformer = nnx.merge(graph_def, params[0])
    lines = _Lines(plan_BC)
    B, V = len(plan_BC), model.cfg.vocab_size
    first = plan_array.width(num_pages)
    tokens_BT, following_BT = jnp.split(plan_BC[:, first:], 2, axis=1)
    zeros_B = jnp.zeros(B, jnp.int32)
    cache = Cache(state.entries, zeros_B, lines.start, lines.table(num_pages))
    output = model.extend(tokens_BT, cache)
    hidden_BTD = context.from_chips(output.hidden_BTD, model.mesh, "embed")
    is_last_B = lines.is_last > 0
    last_B11 = jnp.maximum(lines.end - lines.start - 1, 0)[:, None, None]
    hidden_B1D = jnp.take_along_axis(hidden_BTD, last_B11, axis=1)
    logits_BV = model.logits(hidden_B1D)[:, 0]
    token_B, logprobs, is_done_B = _draw(logits_BV, lines, lines.num_drawn, is_last_B, state.seen)
    # Rows that draw nothing are written to the last row, which is nobody's.
    row_B = jnp.where(is_last_B, lines.row, len(state.token_L) - 1)
    is_done_B |= ~is_last_B
    told = _everywhere(model.mesh, row_B, token_B, lines.end, is_last_B)
    memory = proposer.read(
        model, params[1], state.memory, cache, tokens_BT, following_BT, output.hidden_BTD
    )
    step = Step(
        row_B,
        jnp.where(is_last_B[:, None], cache.table_BN, 0),
        jnp.where(is_last_B, lines.end - 1, 0),
        jnp.take_along_axis(tokens_BT, last_B11[:, 0], axis=1)[:, 0],
        token_B[:, None],
        is_last_B.astype(jnp.int32),
        hidden_B1D,
    )
    memory, drafts_BK = proposer.propose(model, params[1], _with_tokens(memory, *told), step)
    values = (token_B, lines.end, lines.num_drawn + 1, is_done_B, *drafts_BK.T)
    count_LV = state.seen.count_BV.at[told[0], told[1]].add(told[3])
    state = _with_rows(state, *_everywhere(model.mesh, row_B, *values))._replace(
        entries=output.cache.entries,
        memory=memory,
        seen=state.seen._replace(count_BV=count_LV),
    )
    prompt = jax.lax.cond(
        (lines.prompt_logprobs > 0).any(),
        lambda: _prompt_logprobs(model, lines, hidden_BTD, following_BT, num_pools),
        lambda: _no_logprobs(tokens_BT.shape, V),
    )
    drawn_B = jnp.where(is_last_B, token_B, -1)
    results = Results(drawn_B[None], jax.tree.map(lambda x: x[None], logprobs))
    return state, (results, prompt)


def _prompt_logprobs(model, lines, hidden_BTD, following_BT, num_pools):
    """log-probabilities [B, T] of what follows each token.

    Letters: s pools, n groups of t tokens.  A group in which nothing is asked is skipped.
    """
    B, T, V = *hidden_BTD.shape[:2], model.cfg.vocab_size
    size = int(np.gcd(T, max(_SCORED, 2 * context.num_chips(model.mesh))))
    is_asked_BT = (lines.prompt_logprobs > 0)[:, None] & (
        jnp.arange(T) >= lines.score_first[:, None]
    )
    wants_top_BT = is_asked_BT & (lines.prompt_logprobs == WITH_TOP)[:, None]

    def groups(x_BT):
        return x_BT.reshape(num_pools, -1, size, *x_BT.shape[2:]).swapaxes(0, 1)

    def of_group(args):
        hidden_stD, following_st, is_asked, wants_top = args

        def found():
            logits_stV = model.logits(context.to_chips(hidden_stD, model.mesh, "embed"))
            flat = sampling.logprobs(
                logits_stV.reshape(-1, V), following_st.reshape(-1), wants_top
            )
            return jax.tree.map(lambda x: x.reshape(num_pools, size, *x.shape[1:]), flat)

        return jax.lax.cond(is_asked, found, lambda: _no_logprobs((num_pools, size), V))

    asked = (groups(x).any((1, 2)) for x in (is_asked_BT, wants_top_BT))
    found = jax.lax.map(of_group, (groups(hidden_BTD), groups(following_BT), *asked))
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(B, T, *x.shape[3:]), found)
