"""Defines decode attention in float32 (`reference`), and computes it in XLA (`xla`).

Shape letters: dims.md; n pages, s slots of a page, m pages of a row, S = m * s.
"""

import jax
import jax.numpy as jnp


def seen_slots(
    num_tokens: int, num_slots: int, length_B: jax.Array, start_B: jax.Array
) -> jax.Array:
    """Returns bool [B, T, S]: query t sees the slots from start to its own, length - T + t."""
    slot_S = jnp.arange(num_slots)
    end_BT = length_B[:, None] - num_tokens + 1 + jnp.arange(num_tokens)
    return (slot_S >= start_B[:, None, None]) & (slot_S < end_BT[..., None])


def rows(x_Pns: jax.Array, group: jax.Array | int, table_Bm: jax.Array | None) -> jax.Array:
    """Returns [B, S, ...] of one group: the pages of each row, one after another.

    table_Bm None: page b is row b.  Numbers out of range give any page.
    """
    x_ns = jax.lax.dynamic_index_in_dim(x_Pns, group, keepdims=False)
    if table_Bm is None:
        return x_ns
    x_Bms = x_ns.at[table_Bm].get(mode="clip")
    return x_Bms.reshape(x_Bms.shape[0], -1, *x_Bms.shape[3:])


def reference(
    q_BTNH: jax.Array,
    k_PnsKH: jax.Array,
    v_PnsKH: jax.Array,
    length_B: jax.Array,
    start_B: jax.Array,
    k_scale_PnsK: jax.Array | None,
    v_scale_PnsK: jax.Array | None,
    group: jax.Array | int,
    table_Bm: jax.Array | None,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """As `api.decode_attention` with its log-sum-exp, float32 throughout."""
    k_BSKH, v_BSKH, k_scale_BSK, v_scale_BSK = (
        None if x_Pns is None else rows(x_Pns, group, table_Bm)
        for x_Pns in (k_PnsKH, v_PnsKH, k_scale_PnsK, v_scale_PnsK)
    )
    (B, T, N, H), (S, K) = q_BTNH.shape, k_BSKH.shape[1:3]
    q_BTKGH = q_BTNH.astype(jnp.float32).reshape(B, T, K, N // K, H)
    seen_BTS = seen_slots(T, S, length_B, start_B)
    k_BSKH, v_BSKH = (
        x_BSKH.astype(jnp.float32) * (1.0 if scale_BSK is None else scale_BSK[..., None])
        for x_BSKH, scale_BSK in ((k_BSKH, k_scale_BSK), (v_BSKH, v_scale_BSK))
    )
    v_BSKH = jnp.where(seen_BTS.any(1)[..., None, None], v_BSKH, 0)  # 0 * NaN is NaN
    score_BTKGS = scale * jnp.einsum("BTKGH,BSKH->BTKGS", q_BTKGH, k_BSKH, precision="highest")
    seen_BTKGS = seen_BTS[:, :, None, None]
    p_BTKGS = jax.nn.softmax(score_BTKGS, axis=-1, where=seen_BTKGS)
    p_BTKGS = jnp.where(
        seen_BTKGS.any(-1, keepdims=True), p_BTKGS, 0
    )  # 0 / 0 where nothing is seen
    out_BTKGH = jnp.einsum("BTKGS,BSKH->BTKGH", p_BTKGS, v_BSKH, precision="highest")
    lse_BTKG = jax.nn.logsumexp(score_BTKGS, axis=-1, where=seen_BTKGS)
    return out_BTKGH.reshape(B, T, N, H).astype(q_BTNH.dtype), lse_BTKG.reshape(B, T, N)


def xla(
    q_BTNH: jax.Array,
    k_PnsKH: jax.Array,
    v_PnsKH: jax.Array,
    length_B: jax.Array,
    start_B: jax.Array,
    k_scale_PnsK: jax.Array | None,
    v_scale_PnsK: jax.Array | None,
    group: jax.Array | int,
    table_Bm: jax.Array | None,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """As `reference`, with products in q's dtype and a float32 softmax.

    The scales of an int8 cache multiply scores and probabilities.
    """
    k_BSKH, v_BSKH, k_scale_BSK, v_scale_BSK = (
        None if x_Pns is None else rows(x_Pns, group, table_Bm)
        for x_Pns in (k_PnsKH, v_PnsKH, k_scale_PnsK, v_scale_PnsK)
    )
    (B, T, N, H), (S, K) = q_BTNH.shape, k_BSKH.shape[1:3]
    precision = "highest" if q_BTNH.dtype == jnp.float32 else None
    q_BKGTH = q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    seen_BTS = seen_slots(T, S, length_B, start_B)
    seen_B11TS = seen_BTS[:, None, None]
    score_BKGTS = scale * jnp.einsum(
        "BKGTH,BSKH->BKGTS",
        q_BKGTH,
        k_BSKH.astype(q_BTNH.dtype),
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    if k_scale_BSK is not None:
        score_BKGTS *= k_scale_BSK.transpose(0, 2, 1)[:, :, None, None]
    score_BKGTS = jnp.where(seen_B11TS, score_BKGTS, -1e30)
    max_BKGT1 = score_BKGTS.max(-1, keepdims=True)
    p_BKGTS = jnp.where(seen_B11TS, jnp.exp(score_BKGTS - max_BKGT1), 0)
    sum_BKGT1 = p_BKGTS.sum(-1, keepdims=True)
    if v_scale_BSK is not None:
        p_BKGTS = jnp.where(
            seen_B11TS, p_BKGTS * v_scale_BSK.transpose(0, 2, 1)[:, :, None, None], 0
        )
    v_BSKH = jnp.where(seen_BTS.any(1)[..., None, None], v_BSKH, 0).astype(q_BTNH.dtype)
    acc_BKGTH = jnp.einsum(
        "BKGTS,BSKH->BKGTH",
        p_BKGTS.astype(q_BTNH.dtype),
        v_BSKH,
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    out_BKGTH = acc_BKGTH / jnp.where(sum_BKGT1 > 0, sum_BKGT1, 1)
    out_BTNH, lse_BTN1 = (
        x_BKGTx.transpose(0, 3, 1, 2, 4).reshape(B, T, N, -1)
        for x_BKGTx in (out_BKGTH, max_BKGT1 + jnp.log(sum_BKGT1))
    )
    return out_BTNH.astype(q_BTNH.dtype), lse_BTN1[..., 0]
