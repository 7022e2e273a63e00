"""Jitted prefill and decode on token ids; the engine knows nothing about text.

Letters: B batch, S prompt slots, V vocabulary, D model, N tokens of a chunk.
"""

import functools
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hunyuan_jax.infer import cpu_layout
from hunyuan_jax.infer.sampling import Processors, next_token
from hunyuan_jax.model.cache import Cache, empty_cache
from hunyuan_jax.model.transformer import Transformer
from hunyuan_jax.parallel import rules
from hunyuan_jax.params.abstract import abstract_module

# Lengths are rounded up to multiples of these, and to no more than four lengths an octave: few
# programs, and at most a quarter wasted.
_PROMPT_BUCKET = 32
_CACHE_BUCKET = 128
# Tokens that one call of the decode program may make, and how long a call should last, so that a
# reader sees them flow.
_MAX_CHUNK = 32
_CHUNK_SECONDS = 0.05


class State(NamedTuple):
    """A generation in progress.

    cache: tokens so far; row_B: int32, a row's number in the batch; token_B: the newest token, not
    yet in the cache; seen_BV: bool, tokens that occur in the row (None without a repetition
    penalty); is_done_B: whether the row has produced a stop id; num_drawn: int32.
    """

    cache: Cache
    row_B: jax.Array
    token_B: jax.Array
    seen_BV: jax.Array | None
    is_done_B: jax.Array
    num_drawn: jax.Array


class DecodeArgs(NamedTuple):
    """Traced sampling arguments.  Changing a value never recompiles; turning a processor on or off
    does.

    stop_ids: int32; fill_id: follows a stop id; key: typed PRNG key of the seed.
    """

    processors: Processors
    stop_ids: jax.Array
    fill_id: int
    key: jax.Array


class Engine:
    """Generates with one model; holds the compiled functions."""

    def __init__(self, graph_def: nnx.GraphDef, params: dict):
        self.params = params
        model = nnx.merge(graph_def, params)
        self._mesh, self._cfg = model.mesh, model.cfg
        self._specs = abstract_module(lambda: model, self._mesh)[1]
        self._is_unrolled = cpu_layout.suits(self._cfg, self._mesh)
        place_cache = cpu_layout.unstacked_cache if self._is_unrolled else self._pinned
        self.prefill = jax.jit(
            functools.partial(_prefill, graph_def, place_cache),
            static_argnames=("num_slots", "top_k"),
        )
        decode_def = (
            cpu_layout.graph_def(self._cfg, self._mesh) if self._is_unrolled else graph_def
        )
        self.decode = jax.jit(
            functools.partial(_decode, decode_def), static_argnames="top_k", donate_argnums=1
        )

    @functools.cached_property
    def _decode_params(self) -> dict:
        if not self._is_unrolled:
            return self.params
        return cpu_layout.unstacked(self._cfg, self.params, self._specs)

    def _pinned(self, cache: Cache) -> Cache:
        entries = {name: entry.pinned(self._mesh) for name, entry in cache.entries.items()}
        return cache._replace(entries=entries)

    def stream(
        self,
        tokens_BS: np.ndarray,
        length_B: np.ndarray,
        max_new_tokens: int,
        processors: Processors,
        stop_ids: tuple[int, ...],
        fill_id: int,
        seed: int,
    ) -> Iterator[np.ndarray]:
        """Yields int32 [B] tokens, one step at a time, until max_new_tokens or until every row has
        stopped.

        What a row draws depends on the seed, its number in the batch and how many tokens it has
        drawn, not on the other rows.

        Args:
          tokens_BS: int32; row b is a prompt of length_B[b] tokens, then padding.
          length_B: at least 1.
          stop_ids: a row ends with the first of these it produces and is filled with fill_id from
            then on.
        """
        B, S = tokens_BS.shape
        padding = bucket(S, _PROMPT_BUCKET) - S
        num_slices = cpu_layout.num_slices(self._cfg, B) if self._is_unrolled else 1
        # Padding rows, so that the batch divides over the slices and the mesh.
        num_idle = -B % (num_slices * rules.num_shards(self._mesh, "batch"))
        tokens_BS = np.pad(tokens_BS, ((0, num_idle), (0, padding)))
        length_B = np.pad(length_B, (0, num_idle), constant_values=1).astype(np.int32)
        row_B = np.arange(B + num_idle, dtype=np.int32)
        args = DecodeArgs(
            processors._replace(top_k=0),
            np.asarray(stop_ids, np.int32),
            fill_id,
            jax.random.key(seed),
        )
        options = {"args": args, "top_k": processors.top_k}
        num_slots = bucket(S + max(padding, max_new_tokens), _CACHE_BUCKET)
        prefill = functools.partial(self.prefill, self.params, num_slots=num_slots, **options)
        decode = functools.partial(self.decode, self._decode_params, **options)
        prompts = zip(
            *(np.split(array, num_slices) for array in (tokens_BS, length_B, row_B, row_B >= B)),
            strict=True,
        )
        with cpu_layout.threads(num_slices) as each:
            states, is_finished = each(prefill, prompts)
            yield np.concatenate(jax.device_get([state.token_B for state in states]))[:B]
            num_left, length, chunk, start = max_new_tokens - 1, 1, None, time.perf_counter()
            while (num_left or chunk) and not all(is_finished):
                following = None
                if num_left:
                    num_steps = min(num_left, length)
                    states, following = each(decode, [(state, num_steps) for state in states])
                    num_left -= num_steps
                if chunk is not None:
                    # Read while the device works on the next chunk.
                    tokens_NB, num_made, is_finished = zip(*jax.device_get(chunk), strict=True)
                    yield from np.concatenate(tokens_NB, axis=1)[: max(num_made), :B]
                    now = time.perf_counter()
                    if now - start < _CHUNK_SECONDS:
                        length = min(2 * length, _MAX_CHUNK)
                    start = now
                chunk = following


def bucket(length: int, multiple: int) -> int:
    """Rounds a length up to a multiple of `multiple` and of 1/8 of the next power of two."""
    step = max(multiple, 1 << max(0, length.bit_length() - 3))
    return -(-length // step) * step


def _prefill(
    graph_def: nnx.GraphDef,
    place_cache: Callable[[Cache], Cache],
    params: dict,
    tokens_BS: jax.Array,
    length_B: jax.Array,
    row_B: jax.Array,
    is_done_B: jax.Array,
    *,
    args: DecodeArgs,
    num_slots: int,
    top_k: int,
) -> tuple[State, jax.Array]:
    """(state with the first new token, whether every row has stopped)."""
    model: Transformer = nnx.merge(graph_def, params)
    positions_BS = jnp.broadcast_to(jnp.arange(tokens_BS.shape[1]), tokens_BS.shape)
    mask_BS = (positions_BS < length_B[:, None]).astype(jnp.int32)
    cache = empty_cache(model.cfg, len(tokens_BS), num_slots)
    output = model.prefill(tokens_BS, positions_BS, mask_BS, cache)
    last_B11 = length_B[:, None, None] - 1
    hidden_B1D = jnp.take_along_axis(output.hidden_BTD, last_B11, axis=1)
    logits_BV = model.logits(hidden_B1D)[:, 0]
    seen_BV = None
    if args.processors.repetition_penalty is not None:
        seen_BV = jax.vmap(lambda t, m: jnp.zeros(logits_BV.shape[-1], bool).at[t].max(m > 0))(
            tokens_BS, mask_BS
        )
    cache = place_cache(output.cache)
    state = State(cache, row_B, tokens_BS[:, 0], seen_BV, is_done_B, jnp.int32(0))
    state = _advance(state, logits_BV, args, top_k)
    return state, state.is_done_B.all()


def _decode(
    graph_def: nnx.GraphDef,
    params: dict,
    state: State,
    num_steps: jax.Array,
    *,
    args: DecodeArgs,
    top_k: int,
) -> tuple[State, tuple[jax.Array, jax.Array, jax.Array]]:
    """(state, (tokens [N, B], how many of N are made, whether every row has stopped)) after
    num_steps or when every row has.
    """
    model: Transformer = nnx.merge(graph_def, params)

    def goes_on(carry):
        step, state, _ = carry
        return (step < num_steps) & ~state.is_done_B.all()

    def one_step(carry):
        step, state, tokens_NB = carry
        output = model.decode(state.token_B, state.cache)
        logits_BV = model.logits(output.hidden_BTD)[:, 0]
        state = _advance(state._replace(cache=output.cache), logits_BV, args, top_k)
        return step + 1, state, tokens_NB.at[step].set(state.token_B)

    tokens_NB = jnp.full((_MAX_CHUNK, state.token_B.shape[0]), args.fill_id, jnp.int32)
    num_made, state, tokens_NB = jax.lax.while_loop(
        goes_on, one_step, (jnp.int32(0), state, tokens_NB)
    )
    return state, (tokens_NB, num_made, state.is_done_B.all())


def _advance(state: State, logits_BV: jax.Array, args: DecodeArgs, top_k: int) -> State:
    """With the token that the logits give."""
    processors = args.processors._replace(top_k=top_k)
    key_B = jax.vmap(
        lambda row: jax.random.fold_in(jax.random.fold_in(args.key, row), state.num_drawn)
    )(state.row_B)
    drawn_B = next_token(logits_BV, state.seen_BV, processors, key_B)
    token_B = jnp.where(state.is_done_B, args.fill_id, drawn_B).astype(jnp.int32)
    seen_BV = state.seen_BV
    if seen_BV is not None:
        seen_BV = seen_BV.at[jnp.arange(token_B.shape[0]), token_B].set(True)
    is_done_B = state.is_done_B | (token_B[:, None] == args.stop_ids).any(-1)
    return state._replace(
        token_B=token_B, seen_BV=seen_BV, is_done_B=is_done_B, num_drawn=state.num_drawn + 1
    )
