"""Grouped-query attention with cross-layer sharing (specification section 3).

Within a CLA group the raw K/V projection of the first layer serves all.  RoPE and the RMS division of a key do not depend on the
layer, only the key norm's scale does, and q . (g * khat) = (q * g) . khat: so each layer folds its key scale into its own query,
and one (khat, v) pair per group is computed, and cached.
Letters: B batch, T queries, S keys, D model, N query heads, K kv heads, G = N / K, H head dim.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from hunyuan_jax.config import ModelConfig
from hunyuan_jax.model import params, rope
from hunyuan_jax.model.norm import rms_normalize


class Attention(nnx.Module):
    """One layer's query and output projections, and the K/V projections if it is the producer of its CLA group."""

    def __init__(self, cfg: ModelConfig, key: jax.Array, *, is_producer: bool):
        D, N, K, H, std = cfg.hidden_size, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim, cfg.init_std
        q_key, k_key, v_key, o_key = jax.random.split(key, 4)
        self.cfg = cfg
        self.is_producer = is_producer
        self.wq_DNH = params.normal(q_key, (D, N, H), ("embed", "heads", "head_dim"), std)
        self.wo_NHD = params.normal(o_key, (N, H, D), ("heads", "head_dim", "embed"), std)
        if is_producer:
            self.wk_DKH = params.normal(k_key, (D, K, H), ("embed", "kv_heads", "head_dim"), std)
            self.wv_DKH = params.normal(v_key, (D, K, H), ("embed", "kv_heads", "head_dim"), std)
        if cfg.attention_bias:
            self.bq_NH = params.zeros((N, H), ("heads", "head_dim"))
            self.bo_D = params.zeros((D,), ("norm",))
            if is_producer:
                self.bk_KH = params.zeros((K, H), ("kv_heads", "head_dim"))
                self.bv_KH = params.zeros((K, H), ("kv_heads", "head_dim"))
        if cfg.use_qk_norm:
            self.q_norm_H = params.ones((H,), ("head_dim",))
            self.k_norm_H = params.ones((H,), ("head_dim",))

    def keys_values(self, y_BTD: jax.Array, cos_sin_BTh: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """The group's keys, rotated and normalised without scale, and its values: two [B, T, K, H].  Producer only."""
        dtype = y_BTD.dtype
        k_BTKH = jnp.einsum("BTD,DKH->BTKH", y_BTD, self.wk_DKH[...].astype(dtype))
        v_BTKH = jnp.einsum("BTD,DKH->BTKH", y_BTD, self.wv_DKH[...].astype(dtype))
        if self.cfg.attention_bias:
            k_BTKH, v_BTKH = k_BTKH + self.bk_KH[...].astype(dtype), v_BTKH + self.bv_KH[...].astype(dtype)
        k_BTKH = rope.rotate(k_BTKH, cos_sin_BTh)
        return (rms_normalize(k_BTKH, self.cfg.rms_norm_eps) if self.cfg.use_qk_norm else k_BTKH), v_BTKH

    def __call__(
        self,
        y_BTD: jax.Array,
        k_BSKH: jax.Array,
        v_BSKH: jax.Array,
        cos_sin_BTh: tuple[jax.Array, jax.Array],
        mask_BTS: jax.Array,
        dropout_key: jax.Array | None,
    ) -> jax.Array:
        """Attends from y over the group's keys and values; returns [B, T, D].  dropout_key None = no attention dropout."""
        cfg, dtype = self.cfg, y_BTD.dtype
        q_BTNH = jnp.einsum("BTD,DNH->BTNH", y_BTD, self.wq_DNH[...].astype(dtype))
        if cfg.attention_bias:
            q_BTNH = q_BTNH + self.bq_NH[...].astype(dtype)
        q_BTNH = rope.rotate(q_BTNH, cos_sin_BTh)
        if cfg.use_qk_norm:
            scale_H = (self.q_norm_H[...] * self.k_norm_H[...]).astype(dtype)
            q_BTNH = rms_normalize(q_BTNH, cfg.rms_norm_eps) * scale_H
        out_BTNH = attend(q_BTNH, k_BSKH, v_BSKH, mask_BTS, cfg.attention_dropout, dropout_key)
        out_BTD = jnp.einsum("BTNH,NHD->BTD", out_BTNH, self.wo_NHD[...].astype(dtype))
        return out_BTD + self.bo_D[...].astype(dtype) if cfg.attention_bias else out_BTD


def attend(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask_BTS: jax.Array,
    dropout: float,
    dropout_key: jax.Array | None,
) -> jax.Array:
    """softmax(q k / sqrt(H)) v with query head n on kv head n // (N / K); softmax in float32, result [B, T, N, H] in q's dtype.

    A query whose mask row is empty (padding) attends to everything evenly, as the official code does; nothing reads it.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    scores_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32) * H**-0.5
    scores_BKGTS = jnp.where(mask_BTS[:, None, None], scores_BKGTS, jnp.finfo(jnp.float32).min)
    probs_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(q_BTNH.dtype)
    if dropout_key is not None:
        probs_BKGTS = drop(probs_BKGTS, dropout, dropout_key)
    return jnp.einsum("BKGTS,BSKH->BTKGH", probs_BKGTS, v_BSKH).reshape(B, T, N, H)


def causal_mask(query_slot_T: jax.Array, num_keys: int, query_segment_BT: jax.Array, key_segment_BS: jax.Array) -> jax.Array:
    """bool [B, T, S]: a query sees the keys at or before its own slot that belong to its segment; segment 0 is padding."""
    is_past_TS = jnp.arange(num_keys)[None, :] <= query_slot_T[:, None]
    is_same_BTS = query_segment_BT[:, :, None] == key_segment_BS[:, None, :]
    return is_past_TS & is_same_BTS & (key_segment_BS > 0)[:, None, :]


def drop(x: jax.Array, rate: float, key: jax.Array) -> jax.Array:
    """Inverted dropout: zero with probability `rate`, else scaled by 1 / (1 - rate)."""
    return jnp.where(jax.random.bernoulli(key, 1.0 - rate, x.shape), x / (1.0 - rate), 0).astype(x.dtype)
