"""Defines flash_attention: float32 everywhere, all T x S weights at once.

Letters: B batch, T queries, S keys, N query heads, K kv heads, G = N / K, H head dim.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.flash_attention import dropout

_MASKED = -1e30  # swallows any score in float32, so that a row without keys has no NaN on the way


class Settings(NamedTuple):
    """Static arguments of `api.flash_attention`, with defaults filled in.

    has_offset: whether a `query_offset` is given.
    """

    causal: bool
    scale: float
    dropout_rate: float
    has_offset: bool = False


def is_visible(
    position: jax.Array,
    key: jax.Array,
    query_segment: jax.Array,
    key_segment: jax.Array,
    causal: bool,
) -> jax.Array:
    """Returns whether a query sees a key, bool; all arrays are int32 and broadcast.

    Args:
      position: t + `lead_of`, the last key that query t sees if causal.
      key: the key's index s.
      query_segment, key_segment: 0 is padding.
    """
    visible = (query_segment == key_segment) & (key_segment > 0)
    return visible & (key <= position) if causal else visible


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    query_segment_BT: jax.Array,
    key_segment_BS: jax.Array,
    seed_BN: jax.Array,
    settings: Settings,
    offset: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns (out [B, T, N, H] in q's dtype, log-sum-exp [B, N, T] float32).

    Arrays are as in `api.flash_attention`; seed_BN is uint32, from `dropout.head_seeds`, and
    offset is `query_offset`.
    """
    T, S = q_BTNH.shape[1], k_BSKH.shape[1]
    scores_BNTS, visible_BNTS = _scores(
        q_BTNH, k_BSKH, query_segment_BT, key_segment_BS, offset, settings
    )
    max_BNT1 = jax.lax.stop_gradient(scores_BNTS.max(-1, keepdims=True))
    weights_BNTS = jnp.where(visible_BNTS, jnp.exp(scores_BNTS - max_BNT1), 0.0)
    sum_BNT1 = weights_BNTS.sum(-1, keepdims=True)
    has_keys_BNT1 = sum_BNT1 > 0
    sum_BNT1 = jnp.where(has_keys_BNT1, sum_BNT1, 1.0)
    lse_BNT = jnp.where(has_keys_BNT1, max_BNT1 + jnp.log(sum_BNT1), -jnp.inf)[..., 0]
    weights_BNTS = weights_BNTS / sum_BNT1
    if settings.dropout_rate:
        query_T1 = jnp.arange(T)[:, None] + (0 if offset is None else offset)
        kept_BNTS = dropout.is_kept(
            seed_BN[:, :, None, None], query_T1, jnp.arange(S), settings.dropout_rate
        )
        weights_BNTS = jnp.where(kept_BNTS, weights_BNTS / (1 - settings.dropout_rate), 0.0)
    return _times_values(weights_BNTS, v_BSKH, key_segment_BS).astype(q_BTNH.dtype), lse_BNT


def gradients(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    query_segment_BT: jax.Array,
    key_segment_BS: jax.Array,
    out_BTNH: jax.Array,
    lse_BNT: jax.Array,
    dout_BTNH: jax.Array,
    settings: Settings,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the gradients of q, k and v, as `api.attention_gradients`."""
    delta_BNT = jnp.einsum(
        "BTNH,BTNH->BNT", out_BTNH.astype(jnp.float32), dout_BTNH.astype(jnp.float32)
    )
    lse_BNT1 = jnp.where(jnp.isneginf(lse_BNT), 0.0, lse_BNT)[..., None]

    def surrogate(q_BTNH, k_BSKH, v_BSKH):
        # Its derivative by a score is weight * (d weight - delta), by a value weight * d out.
        scores_BNTS, visible_BNTS = _scores(
            q_BTNH, k_BSKH, query_segment_BT, key_segment_BS, None, settings
        )
        weights_BNTS = jnp.where(visible_BNTS, jnp.exp(scores_BNTS - lse_BNT1), 0.0)
        out_BTNH = _times_values(weights_BNTS, v_BSKH, key_segment_BS)
        return (out_BTNH * dout_BTNH).sum() - (weights_BNTS.sum(-1) * delta_BNT).sum()

    return jax.grad(surrogate, argnums=(0, 1, 2))(q_BTNH, k_BSKH, v_BSKH)


def lead_of(offset: jax.Array | None, num_queries: int, num_keys: int) -> jax.Array | int:
    """Returns the index of query 0 among the keys: the offset, or S - T without one."""
    return num_keys - num_queries if offset is None else offset


_F32 = {"preferred_element_type": jnp.float32, "precision": jax.lax.Precision.HIGHEST}


def _scores(q_BTNH, k_BSKH, query_segment_BT, key_segment_BS, offset, settings):
    """Returns (scaled scores, float32 [B, N, T, S], _MASKED where hidden; bool [B, 1, T, S])."""
    (B, T, N, H), (S, K) = q_BTNH.shape, k_BSKH.shape[1:3]
    # Padding may hold anything, NaN too.
    q_BTNH, k_BSKH = zero_padding(q_BTNH, query_segment_BT), zero_padding(k_BSKH, key_segment_BS)
    q_BTKGH = q_BTNH.astype(jnp.float32).reshape(B, T, K, N // K, H)
    scores_BNTS = (
        jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH.astype(jnp.float32), **_F32).reshape(
            B, N, T, S
        )
        * settings.scale
    )
    visible_BTS = is_visible(
        jnp.arange(T)[:, None] + lead_of(offset, T, S),
        jnp.arange(S),
        query_segment_BT[:, :, None],
        key_segment_BS[:, None, :],
        settings.causal,
    )
    visible_BNTS = visible_BTS[:, None]
    return jnp.where(visible_BNTS, scores_BNTS, _MASKED), visible_BNTS


def _times_values(weights_BNTS, v_BSKH, key_segment_BS):
    """Returns weights v, float32 [B, T, N, H]."""
    (B, N, T, S), (K, H) = weights_BNTS.shape, v_BSKH.shape[2:]
    weights_BKGTS = weights_BNTS.reshape(B, K, N // K, T, S)
    v_BSKH = zero_padding(v_BSKH, key_segment_BS).astype(jnp.float32)
    return jnp.einsum("BKGTS,BSKH->BTKGH", weights_BKGTS, v_BSKH, **_F32).reshape(B, T, N, H)


def zero_padding(x_BTNH: jax.Array, segment_BT: jax.Array) -> jax.Array:
    """Zeroes the slots of segment 0; no gradient flows into them."""
    return jnp.where(segment_BT[:, :, None, None] > 0, x_BTNH, jnp.zeros((), x_BTNH.dtype))
