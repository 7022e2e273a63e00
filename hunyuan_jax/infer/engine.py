"""Jitted prefill and decode on token ids; the engine knows nothing about text.

Letters: B batch, S prompt slots, V vocabulary.
"""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hunyuan_jax.infer.sampling import Sampling, next_token
from hunyuan_jax.model.cache import KvCache, empty_cache, grow_cache
from hunyuan_jax.model.transformer import Transformer

# Prompt and total lengths are rounded up to these multiples, so that a new length rarely means a new compilation.
_PROMPT_BUCKET = 32
_CACHE_BUCKET = 128


class State(NamedTuple):
    """A generation in progress.

    cache: slots so far; token_B: the newest token, not yet in the cache; position_B: its RoPE position; seen_BV: bool, tokens that
    occur in the row; is_done_B: whether the row has produced a stop id; key: typed PRNG key.
    """

    cache: KvCache
    token_B: jax.Array
    position_B: jax.Array
    seen_BV: jax.Array
    is_done_B: jax.Array
    key: jax.Array


class Engine:
    """Generates with one model; holds the compiled functions."""

    def __init__(self, graph_def: nnx.GraphDef, params: dict):
        self._params = params
        self._prefill = jax.jit(lambda *args: _prefill(graph_def, *args), static_argnums=(1, 5, 6, 7))
        self._decode = jax.jit(lambda *args: _decode(graph_def, *args), static_argnums=(2, 3), donate_argnums=1)

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
        """Yields int32 [B] tokens, one step at a time, until max_new_tokens or until every row has stopped.

        Args:
          tokens_BS, mask_BS: prompts padded on the left; mask 0 is padding.
          stop_ids: a row ends with the first of these it produces and is filled with fill_id from then on.
        """
        S = tokens_BS.shape[1]
        padding = -S % _PROMPT_BUCKET
        tokens_BS = np.pad(tokens_BS, ((0, 0), (padding, 0)))
        mask_BS = np.pad(mask_BS, ((0, 0), (padding, 0)))
        num_slots = S + padding + max_new_tokens
        num_slots += -num_slots % _CACHE_BUCKET
        state = self._prefill(self._params, num_slots, tokens_BS, mask_BS, jax.random.key(seed), sampling, stop_ids, fill_id)
        for step in range(max_new_tokens):
            token_B, is_finished = np.asarray(state.token_B), bool(np.all(state.is_done_B))
            yield token_B
            if is_finished:
                return
            if step < max_new_tokens - 1:
                state = self._decode(self._params, state, (sampling, stop_ids), fill_id)


def _prefill(graph_def, params, num_slots, tokens_BS, mask_BS, key, sampling, stop_ids, fill_id):
    model: Transformer = nnx.merge(graph_def, params)
    positions_BS = jnp.maximum(jnp.cumsum(mask_BS, axis=-1) - 1, 0)
    output = model(tokens_BS, positions_BS, mask_BS, cache=empty_cache(model.cfg, *tokens_BS.shape))
    cache = grow_cache(output.cache, num_slots)
    logits_BV = model.logits(output.hidden_BTD[:, -1:])[:, 0]
    seen_BV = jax.vmap(lambda t, m: jnp.zeros(logits_BV.shape[-1], bool).at[t].max(m > 0))(tokens_BS, mask_BS)
    is_done_B = jnp.zeros(tokens_BS.shape[0], bool)
    return _advance(logits_BV, cache, positions_BS[:, -1] + 1, seen_BV, is_done_B, key, (sampling, stop_ids), fill_id)


def _decode(graph_def, params, state, how, fill_id):
    model: Transformer = nnx.merge(graph_def, params)
    token_B1 = state.token_B[:, None]
    output = model(token_B1, state.position_B[:, None], jnp.ones_like(token_B1), cache=state.cache)
    logits_BV = model.logits(output.hidden_BTD)[:, 0]
    return _advance(logits_BV, output.cache, state.position_B + 1, state.seen_BV, state.is_done_B, state.key, how, fill_id)


def _advance(logits_BV, cache, position_B, seen_BV, is_done_B, key, how, fill_id) -> State:
    sampling, stop_ids = how
    key, draw_key = jax.random.split(key)
    token_B = jnp.where(is_done_B, fill_id, next_token(logits_BV, seen_BV, sampling, draw_key)).astype(jnp.int32)
    seen_BV = seen_BV.at[jnp.arange(token_B.shape[0]), token_B].set(True)
    is_done_B = is_done_B | jnp.isin(token_B, jnp.asarray(stop_ids, jnp.int32))
    return State(cache, token_B, position_B, seen_BV, is_done_B, key)
