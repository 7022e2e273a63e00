"""Spark attention: a query attends to about k tokens, chosen by a statistical top-k.

    out = sum_s softmax_s(top_k(q_1 . k_1s / sqrt(h))) * softplus(q_2 . k_2s / sqrt(h)) * v_s

q_1, k_1 are the first half of a head's entries, which decide who is attended to, and q_2, k_2 the
second (Spark Transformer, arXiv 2506.06644, section 3.3).  RoPE rotates each half by itself.
The threshold comes from the mean and standard deviation of the scores of the keys that a query can
see; a query that sees k keys or fewer attends to all.  The paper leaves open that rule, and the
factors 1 / sqrt(h); they are choices of this project.
Letters: B batch, T queries, S keys, K kv heads, G = N / K, H head dim, h = H / 2, c queries of a
chunk.
"""

import functools

import jax
import jax.numpy as jnp

from hunyuan_jax.layers.protocols import Sequence
from hunyuan_jax.layers.statistical_top_k import threshold

_MASKED = -1e30  # swallows any score in float32
_SCORES_AT_A_TIME = 2**22  # elements of one chunk's scores on one shard


def spark_attention(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, sequence: Sequence, top_k: int
) -> jax.Array:
    """[B, T, N, H] in q's dtype; a query that sees no key gets zeros.  Runs inside an island.

    Args:
      q_BTNH, k_BSKH, v_BSKH, sequence: as for `attention.attend`.
      top_k: keys that a query attends to, about.
    """
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    is_visible_BTS = visible(sequence, T, S)
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    chunk = max(1, min(T, _SCORES_AT_A_TIME // (B * N * S)))
    padding = -T % chunk
    chunks = [
        jnp.pad(x, ((0, 0), (0, padding), *((0, 0),) * (x.ndim - 2)))
        .reshape(B, -1, chunk, *x.shape[2:])
        .swapaxes(0, 1)
        for x in (q_BTKGH, is_visible_BTS)
    ]
    # The scores of a chunk are made again in the backward pass: memory is linear in T.
    attend = jax.checkpoint(functools.partial(_attend, k_BSKH, v_BSKH, top_k))
    out_nBcKGH = jax.lax.map(lambda xs: attend(*xs), chunks)
    return out_nBcKGH.swapaxes(0, 1).reshape(B, -1, N, H)[:, :T]


def visible(sequence: Sequence, num_queries: int, num_keys: int) -> jax.Array:
    """bool [B, T, S]: which keys a query sees: up to its own slot, of its own document."""
    query_T, key_S = jnp.arange(num_queries), jnp.arange(num_keys)
    if sequence.length_B is None:
        segment_BT = sequence.segment_BT
        is_same_BTS = (segment_BT[:, :, None] == segment_BT[:, None]) & (segment_BT > 0)[:, None]
        return is_same_BTS & (key_S <= query_T[:, None])
    slot_BT = sequence.length_B[:, None] + query_T
    return (key_S >= sequence.start_B[:, None, None]) & (key_S <= slot_BT[..., None])


def _attend(k_BSKH, v_BSKH, top_k, q_BcKGH, is_visible_BcS):
    (q_1, q_2), (k_1, k_2) = (jnp.split(x, 2, axis=-1) for x in (q_BcKGH, k_BSKH))
    score_BKGcS, gate_BKGcS = (
        jnp.einsum("BcKGh,BSKh->BKGcS", q, k, preferred_element_type=jnp.float32)
        * q.shape[-1] ** -0.5
        for q, k in ((q_1, k_1), (q_2, k_2))
    )
    is_visible = is_visible_BcS[:, None, None]
    is_kept = is_visible & is_among_top(score_BKGcS, is_visible, top_k)
    weight_BKGcS = jax.nn.softmax(jnp.where(is_kept, score_BKGcS, _MASKED), axis=-1)
    weight_BKGcS = jnp.where(is_kept, weight_BKGcS * jax.nn.softplus(gate_BKGcS), 0.0)
    return jnp.einsum("BKGcS,BSKH->BcKGH", weight_BKGcS.astype(v_BSKH.dtype), v_BSKH)


def is_among_top(score_S: jax.Array, is_visible_S: jax.Array, top_k: int) -> jax.Array:
    """bool [..., S]: whether a score is among about the top_k largest visible ones.

    All are where no more than top_k are visible.
    """
    num_visible = is_visible_S.sum(-1, keepdims=True).astype(jnp.float32)
    visible_S = jnp.where(is_visible_S, score_S, 0.0)
    sums = visible_S.sum(-1, keepdims=True), (visible_S * visible_S).sum(-1, keepdims=True)
    share = jnp.clip(top_k / jnp.maximum(num_visible, 1.0), 0.0, 1.0 - 1e-6)
    limit = threshold(*sums, jnp.maximum(num_visible, 1.0), share)
    return (score_S >= limit) | (num_visible <= top_k)
