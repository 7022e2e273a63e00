"""Cuts the visible slots of a sequence into splits, and merges the splits' results.

Shape letters: dims.md; i splits, R = G * T: the query rows of one kv head, row g * T + t.
"""

from typing import Any

import jax
import jax.numpy as jnp

# The maximum of no scores.  Finite, so that the difference of two is 0 and not NaN.
NO_SCORE = -1e30
# The kernels use exp2, which saves a multiplication per score.
LOG2_E = 1.4426950408889634


def rows_of_heads(q_BTNH: jax.Array, num_kv_heads: int) -> jax.Array:
    """Groups the queries by kv head: [B, T, N, H] -> [B, K, R, H]."""
    B, T, N, H = q_BTNH.shape
    q_BTKGH = q_BTNH.reshape(B, T, num_kv_heads, N // num_kv_heads, H)
    return q_BTKGH.transpose(0, 2, 3, 1, 4).reshape(B, num_kv_heads, -1, H)


def heads_of_rows(out_BKRH: jax.Array, num_tokens: int) -> jax.Array:
    """Undoes `rows_of_heads`: [B, K, R, H] -> [B, T, N, H]."""
    B, K, R, H = out_BKRH.shape
    out_BKGTH = out_BKRH.reshape(B, K, R // num_tokens, num_tokens, H)
    return out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, num_tokens, -1, H)


def blocks_of_split(
    split: jax.Array, start: jax.Array, length: jax.Array, block_slots: int, num_splits: int
) -> tuple[jax.Array, jax.Array]:
    """Returns (first, end) of the blocks of slots a split attends to; none if end <= first.

    The splits share the blocks of [start, length) evenly.
    """
    # Not //: rounding negative numbers takes more instructions, and on traced numbers it asks jax
    # for the device.
    first, end = (
        jax.lax.div(start, block_slots),
        jax.lax.div(length + block_slots - 1, block_slots),
    )
    blocks_each = jax.lax.div(jnp.maximum(end - first, 0) + num_splits - 1, num_splits)
    return first + split * blocks_each, jnp.minimum(first + (split + 1) * blocks_each, end)


def merge(
    acc_iBKRH: jax.Array, max_iBKR: jax.Array, sum_iBKR: jax.Array, num_tokens: int, dtype: Any
) -> tuple[jax.Array, jax.Array]:
    """Returns (softmax(scores) @ v over all splits, [B, T, N, H] in `dtype`; the log-sum-exp of
    the scores, float32 [B, T, N]); 0 and -inf if no slot is seen.

    Args:
      acc_iBKRH: sum over a split's slots of 2^(score - max) v, float32; scores are to base 2.
      max_iBKR: largest score of the split, NO_SCORE if the row sees none of its slots.
      sum_iBKR: sum over a split's slots of 2^(score - max).
    """
    max_BKR = max_iBKR.max(0)
    weight_iBKR = jnp.exp2(max_iBKR - max_BKR)
    sum_BKR = (weight_iBKR * sum_iBKR).sum(0)
    acc_BKRH = (weight_iBKR[..., None] * acc_iBKRH).sum(0)
    out_BKRH = acc_BKRH / jnp.where(sum_BKR > 0, sum_BKR, 1)[..., None]
    lse_BKR = jnp.log(sum_BKR) + max_BKR / LOG2_E
    lse_BTN = heads_of_rows(lse_BKR[..., None], num_tokens)[..., 0]
    return heads_of_rows(out_BKRH, num_tokens).astype(dtype), lse_BTN
