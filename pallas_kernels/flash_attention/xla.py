"""flash_attention in plain XLA: one chunk of queries after another, over the keys it can see.

Letters: B batch, T queries, S keys, N query heads, K kv heads, G = N / K, H head dim, c queries of
a chunk, R = G * c rows of one kv head.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.flash_attention import dropout
from pallas_kernels.flash_attention.reference import Settings, is_visible, zero_padding

# Scores of one chunk: 2 MB of float32 and their gradients stay in a CPU's cache.  Chunks of fewer
# queries make poor matrix products.
_SCORES_AT_A_TIME, _MIN_QUERIES = 2**19, 64
# The queries form this many pieces, each with its own number of keys.  More pieces would skip more
# of what causality hides, and take longer to compile.
_NUM_PIECES = 8
_MASKED = -1e30  # swallows any score in float32


def attention(
    q_BTNH, k_BSKH, v_BSKH, query_segment_BT, key_segment_BS, seed_BN, settings: Settings
):
    """As `reference.attention`, with matrix products in the inputs' dtype and linear memory."""
    (B, T, N, _), S = q_BTNH.shape, k_BSKH.shape[1]
    q_BTNH = zero_padding(q_BTNH, query_segment_BT)
    k_BSKH, v_BSKH = zero_padding(k_BSKH, key_segment_BS), zero_padding(v_BSKH, key_segment_BS)
    arrays = (q_BTNH, k_BSKH, v_BSKH, query_segment_BT, key_segment_BS, seed_BN)
    one_sequence = functools.partial(_sequence, settings=settings)
    at_a_time = max(1, _SCORES_AT_A_TIME // (N * T * S))
    if at_a_time >= B:
        return jax.vmap(one_sequence)(*arrays)
    return jax.lax.map(lambda xs: one_sequence(*xs), arrays, batch_size=at_a_time)


def _sequence(q_TNH, k_SKH, v_SKH, query_segment_T, key_segment_S, seed_N, *, settings):
    """Returns (out [T, N, H], log-sum-exp [N, T]) of one sequence."""
    (T, N, _), S = q_TNH.shape, k_SKH.shape[0]
    chunk = min(T, max(_MIN_QUERIES, _SCORES_AT_A_TIME // (N * S)))
    num_chunks = -(-T // chunk)
    pad = num_chunks * chunk - T
    query_segment_T = jnp.pad(query_segment_T, (0, pad))
    query_T = jnp.arange(T + pad)
    arrays = (jnp.pad(q_TNH, ((0, pad), (0, 0), (0, 0))), query_segment_T, query_T)
    by_chunk = [x.reshape(num_chunks, chunk, *x.shape[1:]) for x in arrays]
    per_piece = -(-num_chunks // _NUM_PIECES)
    pieces = []
    for first in range(0, num_chunks, per_piece):
        stop = min(first + per_piece, num_chunks)
        # As many as the last of these queries sees, at least one.
        num_keys = min(max(stop * chunk + S - T, 1), S) if settings.causal else S
        keys = (
            k_SKH[:num_keys],
            v_SKH[:num_keys],
            key_segment_S[:num_keys],
            jnp.arange(num_keys),
            seed_N,
        )
        attend = jax.checkpoint(
            functools.partial(_chunk, keys=keys, lead=S - T, settings=settings)
        )
        pieces.append(
            jax.lax.map(
                lambda chunk, attend=attend: attend(*chunk), [x[first:stop] for x in by_chunk]
            )
        )
    out_xcNH, lse_xNc = (jnp.concatenate(parts) for parts in zip(*pieces, strict=True))
    return out_xcNH.reshape(-1, *out_xcNH.shape[2:])[:T], lse_xNc.swapaxes(0, 1).reshape(N, -1)[
        :, :T
    ]


def _chunk(q_cNH, query_segment_c, query_c, *, keys, lead, settings):
    """Returns (out [c, N, H], log-sum-exp [N, c]) of a chunk of queries over some keys."""
    k_SKH, v_SKH, key_segment_S, key_S, seed_N = keys
    (c, N, H), (S, K, _) = q_cNH.shape, k_SKH.shape
    G, dtype = N // K, q_cNH.dtype
    f32 = {
        "preferred_element_type": jnp.float32,
        "precision": "highest" if dtype == jnp.float32 else None,
    }
    # The query heads of one kv head are folded into rows, so that each kv head is one matrix
    # product.
    q_KRH = q_cNH.reshape(c, K, G, H).transpose(1, 2, 0, 3).reshape(K, G * c, H)
    scores_KRS = jnp.einsum("KRH,SKH->KRS", q_KRH, k_SKH, **f32) * settings.scale
    visible_cS = is_visible(
        query_c[:, None] + lead,
        key_S,
        query_segment_c[:, None],
        key_segment_S,
        settings.causal,
    )
    scores_KGcS = scores_KRS.reshape(K, G, c, S) + jnp.where(visible_cS, 0.0, _MASKED)
    max_KGc1 = jax.lax.stop_gradient(scores_KGcS.max(-1, keepdims=True))
    weights_KGcS = jnp.exp(scores_KGcS - max_KGc1)
    # A row without keys has the weights of its masked scores.
    has_keys_KGc1 = max_KGc1 > _MASKED / 2
    sum_KGc1 = weights_KGcS.sum(-1, keepdims=True)
    lse_KGc1 = jnp.where(has_keys_KGc1, max_KGc1 + jnp.log(sum_KGc1), -jnp.inf)
    if settings.dropout_rate:
        seed_KG11 = seed_N.reshape(K, G, 1, 1)
        weights_KGcS = jnp.where(
            dropout.is_kept(seed_KG11, query_c[:, None], key_S, settings.dropout_rate),
            weights_KGcS,
            0.0,
        )
    out_KRH = jnp.einsum(
        "KRS,SKH->KRH", weights_KGcS.astype(dtype).reshape(K, G * c, S), v_SKH, **f32
    )
    factor_KGc1 = jnp.where(has_keys_KGc1, 1 / ((1 - settings.dropout_rate) * sum_KGc1), 0.0)
    out_KGcH = (out_KRH.reshape(K, G, c, H) * factor_KGc1).astype(dtype)
    return out_KGcH.transpose(2, 0, 1, 3).reshape(c, N, H), lse_KGc1.reshape(N, c)
