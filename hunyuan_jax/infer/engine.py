"""Jitted prefill and decode on token ids; the engine knows nothing about text.

Letters: B batch, S prompt slots, V vocabulary, P CLA groups, N tokens of a chunk.
"""

import contextlib
import functools
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hunyuan_jax.config import ModelConfig
from hunyuan_jax.infer.sampling import Sampling, next_token
from hunyuan_jax.model.cache import KvCache, empty_cache, grow_cache, split_cache
from hunyuan_jax.model.transformer import Transformer
from hunyuan_jax.parallel import rules
from hunyuan_jax.parallel.mesh import device_kind
from hunyuan_jax.params import declare as params_lib
from hunyuan_jax.params.abstract import abstract_module

# Lengths are rounded up to multiples of these, and to no more than four lengths an octave: few
# programs, and at most a quarter wasted.
_PROMPT_BUCKET = 32
_CACHE_BUCKET = 128
# Tokens that one call of the decode program may make, and how long a call should last, so that a
# reader sees them flow.
_MAX_CHUNK = 32
_CHUNK_SECONDS = 0.05
# Elements of an expert's matrix up to which a batch is generated in parts: 512 x 1024 gains, 1024
# x 2048 loses (docs/generation.md).
_SMALL_EXPERT = 1 << 19
_CACHE_DIMS = ("layers", "batch", "seq", "kv_heads", "head_dim")


class State(NamedTuple):
    """A generation in progress.

    cache: slots so far; row_B: int32, a row's number in the batch; token_B: the newest token, not
    yet in the cache; position_B: its RoPE position; seen_BV: bool, tokens that occur in the row
    (None without a repetition penalty); is_done_B: whether the row has produced a stop id;
    num_drawn: int32.
    """

    cache: KvCache
    row_B: jax.Array
    token_B: jax.Array
    position_B: jax.Array
    seen_BV: jax.Array | None
    is_done_B: jax.Array
    num_drawn: jax.Array


class How(NamedTuple):
    """What a call is told about the tokens to draw: values, none of which makes a new program but
    whether a part of `sampling` is None.

    stop_ids: int32; fill_id: follows a stop id; key: typed PRNG key of the seed.
    """

    sampling: Sampling
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
        self._decode_params = None
        self.prefill = jax.jit(
            functools.partial(_prefill, graph_def),
            static_argnames=("num_slots", "top_k", "is_apart"),
        )
        self.decode = jax.jit(
            functools.partial(_decode, graph_def), static_argnames="top_k", donate_argnums=1
        )

    def stream(
        self,
        tokens_BS: np.ndarray,
        mask_BS: np.ndarray,
        max_new_tokens: int,
        sampling: Sampling,
        stop_ids: tuple[int, ...],
        fill_id: int,
        seed: int,
    ) -> Iterator[np.ndarray]:
        """Yields int32 [B] tokens, one step at a time, until max_new_tokens or until every row has
        stopped.

        What a row draws depends on the seed, its number in the batch and how many tokens it has
        drawn, not on the other rows.

        Args:
          tokens_BS, mask_BS: prompts padded on the left; mask 0 is padding.
          stop_ids: a row ends with the first of these it produces and is filled with fill_id from
            then on.
        """
        B, S = tokens_BS.shape
        padding = bucket(S, _PROMPT_BUCKET) - S
        num_parts = _num_parts(self._cfg, self._mesh, B)
        num_idle = -B % (
            num_parts * rules.num_shards(self._mesh, "batch")
        )  # rows that only make the batch divide
        tokens_BS = np.pad(tokens_BS, ((0, num_idle), (padding, 0)))
        mask_BS = np.pad(
            np.pad(mask_BS, ((0, 0), (padding, 0))), ((0, num_idle), (0, 0)), mode="edge"
        )
        row_B = np.arange(B + num_idle, dtype=np.int32)
        num_slots = bucket(S + padding + max_new_tokens, _CACHE_BUCKET)
        how = How(
            sampling._replace(top_k=0),
            np.asarray(stop_ids, np.int32),
            fill_id,
            jax.random.key(seed),
        )
        options = {"top_k": sampling.top_k}
        if self._decode_params is None:
            self._decode_params = (
                taken_apart(self.params, self._specs) if _is_one_cpu(self._mesh) else self.params
            )
        prefill = functools.partial(
            self.prefill,
            self.params,
            how=how,
            num_slots=num_slots,
            is_apart=_is_one_cpu(self._mesh),
            **options,
        )
        decode = functools.partial(self.decode, self._decode_params, how=how, **options)
        prompts = zip(
            *(np.split(array, num_parts) for array in (tokens_BS, mask_BS, row_B, row_B >= B)),
            strict=True,
        )
        with contextlib.ExitStack() as stack:
            # XLA:CPU runs one after the other what one thread dispatches.
            threads = (
                [stack.enter_context(ThreadPoolExecutor(1)) for _ in range(num_parts)]
                if num_parts > 1
                else []
            )
            states, is_finished = _each(threads, prefill, prompts)
            yield np.concatenate(jax.device_get([state.token_B for state in states]))[:B]
            num_left, length, chunk, start = max_new_tokens - 1, 1, None, time.perf_counter()
            while (num_left or chunk) and not all(is_finished):
                following = None
                if num_left:
                    num_steps = min(num_left, length)
                    states, following = _each(
                        threads, decode, [(state, num_steps) for state in states]
                    )
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
    """The length rounded up to a multiple of `multiple` and of an eighth of the next power of two."""
    step = max(multiple, 1 << max(0, length.bit_length() - 3))
    return -(-length // step) * step


def taken_apart(params: dict[str, Any], specs: dict[str, Any]) -> dict[str, Any]:
    """The parameters with every CLA group and expert apart, for `_decode`; on a CPU they share the
    memory of `params`.  `specs`: their `ParamSpec`s.
    """

    def parts(array, num_dims):
        if not num_dims:
            return jax.device_put(array, may_alias=True)
        return params_lib.Apart(tuple(parts(part, num_dims - 1) for part in array))

    def apart(array, spec):
        return parts(np.asarray(array), spec.num_stacked)

    return params | {"groups": jax.tree.map(apart, params["groups"], specs["groups"])}


def _is_one_cpu(mesh: Any) -> bool:
    return mesh.size == 1 and device_kind(mesh) == "cpu"


def _num_parts(cfg: ModelConfig, mesh: Any, batch_size: int) -> int:
    """In how many parts, each with a thread of its own, a batch is generated.

    XLA:CPU serves one expert after the other, and a small one with one core; parts keep every core
    busy.  Larger matrices are worth all cores, and are better read once for the whole batch.
    """
    is_small = cfg.is_moe and cfg.hidden_size * cfg.intermediate_size <= _SMALL_EXPERT
    if not _is_one_cpu(mesh) or not is_small:
        return 1
    rows = math.ceil(batch_size / (os.cpu_count() or 1))
    return math.ceil(batch_size / rows)  # no part of idle rows alone


def _each(
    threads: list[ThreadPoolExecutor], fn: Callable, arguments: Iterable[tuple]
) -> tuple[tuple, tuple]:
    """The pair that fn returns, for every part's arguments, each in a thread of its own if there
    are any.
    """
    if threads:
        # One by one, so that the first compiles for all; fn comes back as soon as the work is
        # dispatched.
        pairs = [
            thread.submit(fn, *part).result()
            for thread, part in zip(threads, arguments, strict=True)
        ]
    else:
        pairs = [fn(*part) for part in arguments]
    return tuple(zip(*pairs, strict=True))


def _prefill(
    graph_def, params, tokens_BS, mask_BS, row_B, is_done_B, *, how, num_slots, top_k, is_apart
):
    model: Transformer = nnx.merge(graph_def, params)
    positions_BS = jnp.maximum(jnp.cumsum(mask_BS, axis=-1) - 1, 0)
    output = model(
        tokens_BS, positions_BS, mask_BS, cache=empty_cache(model.cfg, *tokens_BS.shape)
    )
    cache = grow_cache(output.cache, num_slots)
    if is_apart:
        cache = split_cache(cache)
    else:
        pinned = (
            rules.constrain(x_PBSKH, model.mesh, _CACHE_DIMS)
            for x_PBSKH in (cache.k_PBSKH, cache.v_PBSKH)
        )
        cache = KvCache(*pinned, cache.segment_BS, cache.num_filled)
    logits_BV = model.logits(output.hidden_BTD[:, -1:])[:, 0]
    seen_BV = None
    if how.sampling.repetition_penalty is not None:
        seen_BV = jax.vmap(lambda t, m: jnp.zeros(logits_BV.shape[-1], bool).at[t].max(m > 0))(
            tokens_BS, mask_BS
        )
    state = State(
        cache, row_B, tokens_BS[:, -1], positions_BS[:, -1] + 1, seen_BV, is_done_B, jnp.int32(0)
    )
    state = _advance(state, logits_BV, how, top_k)
    return state, state.is_done_B.all()


def _decode(graph_def, params, state, num_steps, *, how, top_k):
    """(state, (tokens [N, B], how many of N are made, whether every row has stopped)) after
    num_steps or when every row has.
    """
    model: Transformer = nnx.merge(graph_def, params)

    def goes_on(carry):
        step, state, _ = carry
        return (step < num_steps) & ~state.is_done_B.all()

    def one_step(carry):
        step, state, tokens_NB = carry
        token_B1 = state.token_B[:, None]
        output = model(
            token_B1, state.position_B[:, None], jnp.ones_like(token_B1), cache=state.cache
        )
        logits_BV = model.logits(output.hidden_BTD)[:, 0]
        state = _advance(
            state._replace(cache=output.cache, position_B=state.position_B + 1),
            logits_BV,
            how,
            top_k,
        )
        return step + 1, state, tokens_NB.at[step].set(state.token_B)

    tokens_NB = jnp.full((_MAX_CHUNK, state.token_B.shape[0]), how.fill_id, jnp.int32)
    num_made, state, tokens_NB = jax.lax.while_loop(
        goes_on, one_step, (jnp.int32(0), state, tokens_NB)
    )
    return state, (tokens_NB, num_made, state.is_done_B.all())


def _advance(state: State, logits_BV: jax.Array, how: How, top_k: int) -> State:
    """With the token that the logits give."""
    sampling = how.sampling._replace(top_k=top_k)
    key_B = jax.vmap(
        lambda row: jax.random.fold_in(jax.random.fold_in(how.key, row), state.num_drawn)
    )(state.row_B)
    drawn_B = next_token(logits_BV, state.seen_BV, sampling, key_B)
    token_B = jnp.where(state.is_done_B, how.fill_id, drawn_B).astype(jnp.int32)
    seen_BV = state.seen_BV
    if seen_BV is not None:
        seen_BV = seen_BV.at[jnp.arange(token_B.shape[0]), token_B].set(True)
    is_done_B = state.is_done_B | (token_B[:, None] == how.stop_ids).any(-1)
    return state._replace(
        token_B=token_B, seen_BV=seen_BV, is_done_B=is_done_B, num_drawn=state.num_drawn + 1
    )
