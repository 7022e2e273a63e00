"""From logits to the next token: the official processors in the official order (docs/model.md,
Generation), and those that other servers have.

Every setting is an array with a value for each row, and "off" is a value: no setting compiles a
program.  What no row asks for is skipped when the program runs, and what a row draws depends on
its own settings alone.
Letters: B rows, V vocabulary, W stop ids, K most likely tokens.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hunyuan_jax.infer.settings import MAX_LOGPROBS

# Rows with at most so large a top_k find their limits among so many tokens; the others search.
_SORTED = 64


class RowSettings(NamedTuple):
    """Settings of each row, [B].

    temperature: 0 is greedy; top_k: 0 is off; seed, choice, num_drawn: what the key of a draw is
    made of; min_new: no stop id is drawn before so many tokens; stop_BW: padded with ids that
    don't exist; adjusts: whether a penalty, a bias or min_new is on.
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    repetition_penalty: jax.Array
    presence_penalty: jax.Array
    frequency_penalty: jax.Array
    seed: jax.Array
    choice: jax.Array
    num_drawn: jax.Array
    min_new: jax.Array
    stop_BW: jax.Array
    adjusts: jax.Array


class Seen(NamedTuple):
    """What adjusts logits: is_prompt_BV, whether the prompt has the token; count_BV, how often it
    was drawn; bias_BV.
    """

    is_prompt_BV: jax.Array
    count_BV: jax.Array
    bias_BV: jax.Array


def next_token(logits_BV: jax.Array, rows: RowSettings, seen: Callable[[], Seen]) -> jax.Array:
    """int32 [B]: the most likely token of a greedy row, else a draw by the row's key.

    Args:
      seen: called where a row adjusts its logits.
    """
    logits_BV = jax.lax.cond(
        rows.adjusts.any(), lambda: adjusted(logits_BV, rows, seen()), lambda: logits_BV
    )
    greedy_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    return jax.lax.cond(
        (rows.temperature > 0).any(),
        lambda: jnp.where(rows.temperature > 0, draw(logits_BV, rows), greedy_B),
        lambda: greedy_B,
    )


def adjusted(logits_BV: jax.Array, rows: RowSettings, seen: Seen) -> jax.Array:
    """Penalties, bias, and no stop id before its time: float32 [B, V]."""
    penalty_B1 = rows.repetition_penalty[:, None]
    penalised_BV = jnp.where(logits_BV < 0, logits_BV * penalty_B1, logits_BV / penalty_B1)
    is_drawn_BV = seen.count_BV > 0
    y_BV = jnp.where(seen.is_prompt_BV | is_drawn_BV, penalised_BV, logits_BV)
    y_BV = y_BV - jnp.where(is_drawn_BV, rows.presence_penalty[:, None], 0)
    count_BV = seen.count_BV.astype(jnp.float32)
    y_BV = y_BV - count_BV * rows.frequency_penalty[:, None] + seen.bias_BV
    row_B1 = jnp.arange(len(y_BV))[:, None]
    stopless_BV = y_BV.at[row_B1, rows.stop_BW].set(-jnp.inf, mode="drop")
    y_BV = jnp.where((rows.num_drawn < rows.min_new)[:, None], stopless_BV, y_BV)
    return jnp.where(rows.adjusts[:, None], y_BV, logits_BV)


def draw(logits_BV: jax.Array, rows: RowSettings) -> jax.Array:
    """int32 [B], by a key of the seed, the choice and the number of tokens drawn."""

    def key(seed, choice, num_drawn):
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), choice), num_drawn)

    key_B = jax.vmap(key)(rows.seed, rows.choice, rows.num_drawn)
    kept_BV = truncated(logits_BV, rows)
    return jax.vmap(jax.random.categorical)(key_B, kept_BV).astype(jnp.int32)


def truncated(logits_BV: jax.Array, rows: RowSettings) -> jax.Array:
    """Logits over the temperature, in which tokens beyond top-k, top-p or min-p are -inf."""
    V = logits_BV.shape[-1]
    x_BV = logits_BV / jnp.where(rows.temperature > 0, rows.temperature, 1)[:, None]
    k_B = jnp.where((rows.top_k == 0) | (rows.top_k >= V), V, rows.top_k)
    is_sorted_B = (k_B <= _SORTED) & (k_B < V)
    top_BK = jax.lax.top_k(x_BV, min(_SORTED, V))[0]
    needs_search_B = ~is_sorted_B & ((k_B < V) | (rows.top_p < 1)) & (rows.temperature > 0)
    limit_B = jnp.where(is_sorted_B, _limit_of_sorted(x_BV, top_BK, k_B, rows), -jnp.inf)
    limit_B = jax.lax.cond(
        needs_search_B.any(),
        lambda: jnp.where(is_sorted_B, limit_B, _searched_limit(x_BV, k_B, rows)),
        lambda: limit_B,
    )
    # The most likely token stays, however small top_p is; log 0 is off.
    limit_B = jnp.minimum(limit_B, top_BK[:, 0])
    limit_B = jnp.maximum(limit_B, top_BK[:, 0] + jnp.log(rows.min_p))
    return jnp.where(x_BV < limit_B[:, None], -jnp.inf, x_BV)


def _limit_of_sorted(x_BV, top_BK, k_B, rows):
    """The least logit that top-k and then top-p keep, of rows whose k is at most K.

    Tokens that tie with the last of the k share its fate.
    """
    last_B1 = jnp.take_along_axis(top_BK, jnp.minimum(k_B, top_BK.shape[1])[:, None] - 1, axis=1)
    kept_BV = jnp.where(x_BV < last_B1, -jnp.inf, x_BV)
    p_BK = jnp.exp(top_BK - jax.nn.logsumexp(kept_BV, axis=-1, keepdims=True))
    mass_before_BK = jnp.cumsum(p_BK, axis=-1) - p_BK
    is_kept_BK = (jnp.arange(top_BK.shape[1]) < k_B[:, None]) & (
        (mass_before_BK < rows.top_p[:, None]) | (rows.top_p[:, None] >= 1)
    )
    return jnp.min(jnp.where(is_kept_BK, top_BK, jnp.inf), axis=-1)


def _searched_limit(x_BV, k_B, rows):
    """As `_limit_of_sorted`, of any row: without sorting the vocabulary."""
    last_B = _largest_with(x_BV, jnp.ones_like(x_BV), k_B.astype(jnp.float32))
    x_BV = jnp.where(x_BV < last_B[:, None], -jnp.inf, x_BV)
    p_BV = jnp.exp(x_BV - x_BV.max(-1, keepdims=True))
    # The most likely token has weight 1: it reaches a top_p that float32 rounds to 0 too.
    target_B = jnp.maximum(rows.top_p * p_BV.sum(-1), jnp.finfo(jnp.float32).tiny)
    limit_B = _largest_with(x_BV, p_BV, target_B)
    return jnp.where(rows.top_p < 1, limit_B, last_B)


def _largest_with(x_BV: jax.Array, weight_BV: jax.Array, target_B: jax.Array) -> jax.Array:
    """The largest float such that the weights of what is not less sum up to the target, found bit
    by bit; -inf where all weights do not.
    """
    bits_BV = jax.lax.bitcast_convert_type(x_BV, jnp.int32)
    # Unsigned integers in the order of the floats.
    order_BV = jnp.where(bits_BV < 0, ~bits_BV, bits_BV | jnp.int32(-(2**31))).view(jnp.uint32)

    def one_bit(i, found_B):
        larger_B = found_B | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        is_in_BV = order_BV >= larger_B[:, None]
        return jnp.where(jnp.where(is_in_BV, weight_BV, 0).sum(-1) >= target_B, larger_B, found_B)

    found_B = jax.lax.fori_loop(0, 32, one_bit, jnp.zeros(len(x_BV), jnp.uint32))
    is_positive_B = found_B >= jnp.uint32(2**31)
    bits_B = jnp.where(is_positive_B, found_B ^ jnp.uint32(2**31), ~found_B)
    limit_B = jax.lax.bitcast_convert_type(bits_B, jnp.float32)
    return jnp.where(jnp.isnan(limit_B), -jnp.inf, limit_B)


class Logprobs(NamedTuple):
    """log p in nats: of the given tokens [...], and of the K most likely ones, with their ids."""

    token: jax.Array
    top: jax.Array
    top_ids: jax.Array


def logprobs(logits_BV: jax.Array, token_B: jax.Array, wants_top: jax.Array) -> Logprobs:
    """Of the model, whatever the sampling settings are; of the most likely tokens if wants_top,
    else zeros in their place.
    """
    B, K = len(logits_BV), num_logprobs(logits_BV.shape[-1])
    sum_B1 = jax.nn.logsumexp(logits_BV, axis=-1, keepdims=True)
    top_BK, ids_BK = jax.lax.cond(
        wants_top,
        lambda: jax.lax.top_k(logits_BV, K),
        lambda: [jnp.zeros((B, K)), jnp.zeros((B, K), jnp.int32)],
    )
    of_token_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=1)[:, 0]
    return Logprobs(of_token_B - sum_B1[:, 0], top_BK - sum_B1, ids_BK)


def num_logprobs(vocab_size: int) -> int:
    """K of `logprobs`."""
    return min(MAX_LOGPROBS, vocab_size)
