"""Defines flash_attention: float32 everywhere, all T x S weights at once.

Letters: B batch, T queries, S keys, N query heads, K kv heads, G = N / K, H head dim.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.flash_attention import dropout

_MASKED = -1e30  # swallows any score in float32, so that a row without keys has no NaN on the way


class Settings(NamedTuple):
    """Static arguments of `api.flash_attention`, with defaults filled in."""

    causal: bool
    scale: float
    dropout_rate: float


def is_visible(
    position: jax.Array,
    key: jax.Array,
    query_segment: jax.Array,
    key_segment: jax.Array,
    causal: bool,
) -> jax.Array:
    """Returns whether a query sees a key, bool; all arrays are int32 and broadcast.

    Args:
      position: t + S - T, the last key that query t sees if causal.
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
) -> tuple[jax.Array, jax.Array]:
    """Returns (out [B, T, N, H] in q's dtype, log-sum-exp [B, N, T] float32).

    Arrays are as in `api.flash_attention`; seed_BN is uint32, from `dropout.head_seeds`.
    """
    (B, T, N, H), (S, K) = q_BTNH.shape, k_BSKH.shape[1:3]
    f32 = {"preferred_element_type": jnp.float32, "precision": jax.lax.Precision.HIGHEST}
    # Padding may hold anything, NaN too.
    q_BTNH, (k_BSKH, v_BSKH) = (
        zero_padding(q_BTNH, query_segment_BT),
        (zero_padding(x, key_segment_BS) for x in (k_BSKH, v_BSKH)),
    )
    q_BTKGH = q_BTNH.astype(jnp.float32).reshape(B, T, K, N // K, H)
    scores_BNTS = (
        jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH.astype(jnp.float32), **f32).reshape(
            B, N, T, S
        )
        * settings.scale
    )

    query_T1, key_S = jnp.arange(T)[:, None], jnp.arange(S)
    visible_BTS = is_visible(
        query_T1 + S - T,
        key_S,
        query_segment_BT[:, :, None],
        key_segment_BS[:, None, :],
        settings.causal,
    )
    visible_BNTS = visible_BTS[:, None]
    scores_BNTS = jnp.where(visible_BNTS, scores_BNTS, _MASKED)
    max_BNT1 = jax.lax.stop_gradient(scores_BNTS.max(-1, keepdims=True))
    weights_BNTS = jnp.where(visible_BNTS, jnp.exp(scores_BNTS - max_BNT1), 0.0)
    sum_BNT1 = weights_BNTS.sum(-1, keepdims=True)
    has_keys_BNT1 = sum_BNT1 > 0
    sum_BNT1 = jnp.where(has_keys_BNT1, sum_BNT1, 1.0)
    lse_BNT = jnp.where(has_keys_BNT1, max_BNT1 + jnp.log(sum_BNT1), -jnp.inf)[..., 0]
    weights_BNTS = weights_BNTS / sum_BNT1
    if settings.dropout_rate:
        kept_BNTS = dropout.is_kept(
            seed_BN[:, :, None, None], query_T1, key_S, settings.dropout_rate
        )
        weights_BNTS = jnp.where(kept_BNTS, weights_BNTS / (1 - settings.dropout_rate), 0.0)

    weights_BKGTS = weights_BNTS.reshape(B, K, N // K, T, S)
    out_BTKGH = jnp.einsum("BKGTS,BSKH->BTKGH", weights_BKGTS, v_BSKH.astype(jnp.float32), **f32)
    return out_BTKGH.reshape(B, T, N, H).astype(q_BTNH.dtype), lse_BNT


def zero_padding(x_BTNH: jax.Array, segment_BT: jax.Array) -> jax.Array:
    """Zeroes the slots of segment 0; no gradient flows into them."""
    return jnp.where(segment_BT[:, :, None, None] > 0, x_BTNH, jnp.zeros((), x_BTNH.dtype))
