"""The engine's programs: functions of the parameters, the device's state and a plan's array.

Letters: L rows of the device, B rows of a call, T tokens of a chunk, I steps of a call, N pages of
a row, V vocabulary, K most likely tokens, C columns of a plan.
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
from hunyuan_jax.model.cache import Cache, empty_cache
from hunyuan_jax.model.transformer import Transformer
from hunyuan_jax.parallel import rules

# Tokens of a chunk whose logits exist at a time, for their log-probabilities.
_SCORED = 32


class State(NamedTuple):
    """What stays on the device between calls.

    entries: the pages of the cache.  Of each row: token_L, the newest token, not in the cache yet;
    length_L, tokens in the cache; num_drawn_L; is_done_L; and what `Seen` says, valid for rows
    that adjust their logits.  The last row is for lines without a choice.
    """

    entries: dict[str, Any]
    token_L: jax.Array
    length_L: jax.Array
    num_drawn_L: jax.Array
    is_done_L: jax.Array
    seen: Seen


class Results(NamedTuple):
    """tokens_IB: drawn tokens; num_made_B: how many of a row's are; logprobs [I, B]."""

    tokens_IB: jax.Array
    num_made_B: jax.Array
    logprobs: Logprobs


class Sources(NamedTuple):
    """What an engine's programs are compiled from; the devices of the mesh need not be there.

    graph_defs: of the model in "chunk" and in "decode"; num_pages: of a pool; num_columns: pages
    of a row.
    """

    graph_defs: dict[str, nnx.GraphDef]
    cfg: Any
    mesh: Any
    shapes: Shapes
    num_pages: int
    num_columns: int
    cache_dtype: str | None

    def new_state(self) -> State:
        """The state of one lane before its first call."""
        num_pools = rules.num_shards(self.mesh, "batch")
        rows, pages = num_pools * self.shapes.rows, num_pools * (self.num_pages + 1)
        sizes = (rows, pages, self.shapes.page_size)
        return new_state(self.cfg, *sizes, self.cache_dtype, self.mesh)

    def lower(self, name: str, num_lines: int, params: Any, state: Any) -> jax.stages.Lowered:
        """A program for num_lines lines of each pool.

        Args:
          name: "admit", "chunk" or "decode".
          params, state: arrays, or their shapes with shardings.
        """
        shardings = jax.tree.map(lambda x: x.sharding, state)
        if name == "admit":
            V = self.cfg.vocab_size
            row = Seen(np.zeros(V, bool), np.zeros(V, np.int32), np.zeros(V, np.float32))
            jitted = jax.jit(admit, donate_argnums=0, out_shardings=shardings)
            return jitted.lower(state, np.int32(0), row)
        num_pools = rules.num_shards(self.mesh, "batch")
        width, graph_def = plan_array.width(self.num_columns), self.graph_defs[name]
        if name == "chunk":
            width += 2 * self.shapes.piece
            function = functools.partial(chunk, graph_def, self.num_columns, num_pools)
        else:
            function = functools.partial(
                decode, graph_def, self.num_columns, self.shapes.max_steps
            )
        jitted = jax.jit(function, donate_argnums=1, out_shardings=(shardings, None))
        plan_BC = np.zeros((num_pools * num_lines, width), np.int32)
        return jitted.lower(params, state, plan_BC)


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
    return State(entries, integers_L, integers_L, integers_L, is_done_L, seen)


def admit(state: State, row: jax.Array, seen: Seen) -> State:
    """The state of a choice that adjusts its logits: `seen` of one row, [V] each."""
    arrays = (old.at[row].set(new) for old, new in zip(state.seen, seen, strict=True))
    return state._replace(seen=Seen(*arrays))


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


def _with_rows(state, row_B, token_B, length_B, num_drawn_B, is_done_B):
    """The state with new values of the rows of the lines, as `_everywhere` gives them."""
    return state._replace(
        token_L=state.token_L.at[row_B].set(token_B),
        length_L=state.length_L.at[row_B].set(length_B),
        num_drawn_L=state.num_drawn_L.at[row_B].set(num_drawn_B),
        is_done_L=state.is_done_L.at[row_B].set(is_done_B > 0),
    )


def _no_logprobs(shape: tuple[int, ...], vocab_size: int) -> Logprobs:
    top_shape = (*shape, sampling.num_logprobs(vocab_size))
    return Logprobs(jnp.zeros(shape), jnp.zeros(top_shape), jnp.zeros(top_shape, jnp.int32))


def decode(
    graph_def: nnx.GraphDef,
    num_pages: int,
    max_steps: int,
    params: dict[str, Any],
    state: State,
    plan_BC: jax.Array,
) -> tuple[State, Results]:
    """Draws up to num_steps tokens of each row; ends when all rows are done, or one is and the
    plan ends early.

    A row that is done writes to page 0.
    """
    model: Transformer = nnx.merge(graph_def, params)
    lines = _Lines(plan_BC)
    B, V = len(plan_BC), model.cfg.vocab_size
    row_B, table_BN = lines.row, lines.table(num_pages)
    zeros_B = jnp.zeros(B, jnp.int32)

    class Carry(NamedTuple):
        step: jax.Array
        entries: dict[str, Any]
        count_LV: jax.Array
        token_B: jax.Array
        length_B: jax.Array
        num_drawn_B: jax.Array
        is_done_B: jax.Array
        results: Results

    def goes_on(carry: Carry) -> jax.Array:
        was_done_B = state.is_done_L[row_B]
        has_ended = (carry.is_done_B & ~was_done_B).any() & (lines.ends_early.max() > 0)
        return (carry.step < lines.num_steps.max()) & ~carry.is_done_B.all() & ~has_ended

    def one_step(carry: Carry) -> Carry:
        is_live_B = ~carry.is_done_B
        cache = Cache(
            carry.entries,
            zeros_B,
            jnp.where(is_live_B, carry.length_B, 0),
            jnp.where(is_live_B[:, None], table_BN, 0),
        )
        output = model.decode(carry.token_B, cache)
        logits_BV = model.logits(output.hidden_BTD)[:, 0]
        seen = state.seen._replace(count_BV=carry.count_LV)
        token_B, logprobs, ends_B = _draw(logits_BV, lines, carry.num_drawn_B, is_live_B, seen)
        token_B = jnp.where(is_live_B, token_B, carry.token_B)
        live_B = is_live_B.astype(jnp.int32)
        counted = _everywhere(model.mesh, row_B, token_B, live_B)
        written = jax.tree.map(
            lambda old, new: old.at[carry.step].set(new),
            (carry.results.tokens_IB, carry.results.logprobs),
            (token_B, logprobs),
        )
        return Carry(
            carry.step + 1,
            output.cache.entries,
            carry.count_LV.at[counted[0], counted[1]].add(counted[2]),
            token_B,
            carry.length_B + live_B,
            carry.num_drawn_B + live_B,
            carry.is_done_B | ends_B,
            Results(written[0], carry.results.num_made_B + live_B, written[1]),
        )

    tokens_IB = jnp.zeros((max_steps, B), jnp.int32)
    results = Results(tokens_IB, zeros_B, _no_logprobs(tokens_IB.shape, V))
    carry = Carry(
        jnp.int32(0),
        state.entries,
        state.seen.count_BV,
        *(x_L[row_B] for x_L in state[1:4]),
        state.is_done_L[row_B] | (lines.is_used == 0),
        results,
    )
    carry = jax.lax.while_loop(goes_on, one_step, carry)
    values = (carry.token_B, carry.length_B, carry.num_drawn_B, carry.is_done_B)
    state = _with_rows(state, *_everywhere(model.mesh, row_B, *values))._replace(
        entries=carry.entries, seen=state.seen._replace(count_BV=carry.count_LV)
    )
    return state, carry.results


def chunk(
    graph_def: nnx.GraphDef,
    num_pages: int,
    num_pools: int,
    params: dict[str, Any],
    state: State,
    plan_BC: jax.Array,
) -> tuple[State, tuple[Results, Logprobs]]:
    """Computes a piece of each row's prompt, and draws a token of the rows whose last it is.

    The rows of a pool follow each other.  The last columns are the T tokens and the T that follow
    each of them, for log-probabilities [B, T] of the prompt.
    """
    model: Transformer = nnx.merge(graph_def, params)
    lines = _Lines(plan_BC)
    B, V = len(plan_BC), model.cfg.vocab_size
    first = plan_array.width(num_pages)
    tokens_BT, following_BT = jnp.split(plan_BC[:, first:], 2, axis=1)
    zeros_B = jnp.zeros(B, jnp.int32)
    cache = Cache(state.entries, zeros_B, lines.start, lines.table(num_pages))
    output = model.extend(tokens_BT, cache)
    is_last_B = lines.is_last > 0
    last_B11 = jnp.maximum(lines.end - lines.start - 1, 0)[:, None, None]
    hidden_B1D = jnp.take_along_axis(output.hidden_BTD, last_B11, axis=1)
    logits_BV = model.logits(hidden_B1D)[:, 0]
    token_B, logprobs, is_done_B = _draw(logits_BV, lines, lines.num_drawn, is_last_B, state.seen)
    # Rows that draw nothing are written to the last row, which is nobody's.
    row_B = jnp.where(is_last_B, lines.row, len(state.token_L) - 1)
    is_done_B |= ~is_last_B
    values = (token_B, lines.end, lines.num_drawn + 1, is_done_B)
    row_B, *values, num_new_B = _everywhere(model.mesh, row_B, *values, is_last_B)
    count_LV = state.seen.count_BV.at[row_B, values[0]].add(num_new_B)
    state = _with_rows(state, row_B, *values)._replace(
        entries=output.cache.entries, seen=state.seen._replace(count_BV=count_LV)
    )
    prompt = jax.lax.cond(
        (lines.prompt_logprobs > 0).any(),
        lambda: _prompt_logprobs(model, lines, output.hidden_BTD, following_BT, num_pools),
        lambda: _no_logprobs(tokens_BT.shape, V),
    )
    results = Results(
        token_B[None], is_last_B.astype(jnp.int32), jax.tree.map(lambda x: x[None], logprobs)
    )
    return state, (results, prompt)


def _prompt_logprobs(model, lines, hidden_BTD, following_BT, num_pools):
    """log-probabilities [B, T] of what follows each token.

    Letters: s pools, n groups of t tokens.  A group in which nothing is asked is skipped.
    """
    B, T, V = *hidden_BTD.shape[:2], model.cfg.vocab_size
    size = int(np.gcd(T, _SCORED))
    is_asked_BT = (lines.prompt_logprobs > 0)[:, None] & (
        jnp.arange(T) >= lines.score_first[:, None]
    )
    wants_top_BT = is_asked_BT & (lines.prompt_logprobs == WITH_TOP)[:, None]

    def groups(x_BT):
        return x_BT.reshape(num_pools, -1, size, *x_BT.shape[2:]).swapaxes(0, 1)

    def of_group(args):
        hidden_stD, following_st, is_asked, wants_top = args

        def found():
            logits_stV = model.logits(hidden_stD)
            flat = sampling.logprobs(
                logits_stV.reshape(-1, V), following_st.reshape(-1), wants_top
            )
            return jax.tree.map(lambda x: x.reshape(num_pools, size, *x.shape[1:]), flat)

        return jax.lax.cond(is_asked, found, lambda: _no_logprobs((num_pools, size), V))

    asked = (groups(x).any((1, 2)) for x in (is_asked_BT, wants_top_BT))
    found = jax.lax.map(of_group, (groups(hidden_BTD), groups(following_BT), *asked))
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(B, T, *x.shape[3:]), found)
