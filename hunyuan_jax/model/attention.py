"""Grouped-query attention with cross-layer sharing (specification section 3).

Within a CLA group the raw K/V projection of the first layer serves all.  RoPE and the RMS division of a key do not depend on the
layer, only the key norm's scale does, and q . (g * khat) = (q * g) . khat: so each layer folds its key scale into its own query,
and one (khat, v) pair per group is computed, and cached.
Letters: B batch, T queries, S keys, D model, N query heads, K kv heads, G = N / K, H head dim.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from hunyuan_jax.config import ModelConfig
from hunyuan_jax.model import params, rope
from hunyuan_jax.model.linear import linear
from hunyuan_jax.model.norm import rms_normalize
from hunyuan_jax.parallel import island

# Sequences are attended to in turn, as many at a time as keep the float32 scores below this many elements (2 MB): they and their
# gradients then stay in a CPU's cache, and memory does not grow with the batch.
_SCORES_AT_A_TIME = 2**19
_MASKED = -1e30  # swallows any score in float32, so that a row without keys comes out even and not NaN


class Attention(nnx.Module):
    """One layer's query and output projections, and the K/V projections if it is the producer of its CLA group."""

    def __init__(self, cfg: ModelConfig, mesh: Mesh, key: jax.Array, *, is_producer: bool):
        D, N, K, H, std = cfg.hidden_size, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim, cfg.init_std
        q_key, k_key, v_key, o_key = jax.random.split(key, 4)
        self.cfg = cfg
        self.mesh = mesh
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
        k_BTKH = linear(y_BTD, self.wk_DKH[...])
        v_BTKH = linear(y_BTD, self.wv_DKH[...])
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
        visibility: "Visibility",
        dropout_key: jax.Array | None,
    ) -> jax.Array:
        """Attends from y over the group's keys and values; returns [B, T, D].  dropout_key None = no attention dropout."""
        cfg, dtype = self.cfg, y_BTD.dtype
        q_BTNH = linear(y_BTD, self.wq_DNH[...])
        if cfg.attention_bias:
            q_BTNH = q_BTNH + self.bq_NH[...].astype(dtype)
        q_BTNH = rope.rotate(q_BTNH, cos_sin_BTh)
        if cfg.use_qk_norm:
            scale_H = (self.q_norm_H[...] * self.k_norm_H[...]).astype(dtype)
            q_BTNH = rms_normalize(q_BTNH, cfg.rms_norm_eps) * scale_H
        out_BTNH = checkpoint_name(self._attend(q_BTNH, k_BSKH, v_BSKH, visibility, dropout_key), "attended")
        out_BTD = linear(out_BTNH, self.wo_NHD[...], num_in=2)
        return out_BTD + self.bo_D[...].astype(dtype) if cfg.attention_bias else out_BTD

    def _attend(self, q_BTNH, k_BSKH, v_BSKH, visibility, dropout_key):
        # An island, because a loop over sequences (and a kernel) must see one shard's sequences and heads only.
        heads, kv_heads = ("batch", "seq", "heads", "head_dim"), ("batch", "seq", "kv_heads", "head_dim")
        fn = functools.partial(attend, dropout=0.0 if dropout_key is None else self.cfg.attention_dropout)
        in_logical = [heads, kv_heads, kv_heads, Visibility((), ("batch", "seq"), ("batch", "seq"))]
        args = [q_BTNH, k_BSKH, v_BSKH, visibility]
        if dropout_key is not None:
            in_logical.append(())
            args.append(jax.random.key_data(dropout_key))
        return island.island(fn, self.mesh, tuple(in_logical), heads)(*args)


class Visibility(NamedTuple):
    """Which keys a query sees: those at or before its own slot, of its own segment; segment 0 is padding.

    query_slot_T, query_segment_BT, key_segment_BS: int32; key s lies in slot s.
    """

    query_slot_T: jax.Array
    query_segment_BT: jax.Array
    key_segment_BS: jax.Array


def attend(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    visibility: Visibility,
    dropout_key_data: jax.Array | None = None,
    *,
    dropout: float = 0.0,
) -> jax.Array:
    """softmax(q k / sqrt(H)) v with query head n on kv head n // (N / K); softmax in float32, result [B, T, N, H] in q's dtype.

    The scores are computed again in the backward pass, not kept.  A query that sees no key (padding) attends to everything evenly,
    as the official code does; nothing reads it.  Runs inside an island: arrays are one shard's.
    """
    B, T, N, _ = q_BTNH.shape

    @jax.checkpoint
    def one_sequence(per_sequence):
        q_TNH, k_SKH, v_SKH, query_segment_T, key_segment_S, keys_K = per_sequence
        mask_TS = causal_mask(visibility.query_slot_T, query_segment_T, key_segment_S)
        return _attend_one(q_TNH, k_SKH, v_SKH, mask_TS, dropout, keys_K)

    keys_BK = None
    if dropout_key_data is not None:
        # One key per sequence and kv head by their global indices, so a run drops the same on every mesh.
        K = k_BSKH.shape[2]
        sequence_B = island.shard_index("batch") * B + jnp.arange(B)
        head_K = island.shard_index("kv_heads") * K + jnp.arange(K)
        key = jax.random.wrap_key_data(dropout_key_data)
        keys_BK = jax.vmap(lambda b: jax.vmap(lambda h: jax.random.fold_in(jax.random.fold_in(key, b), h))(head_K))(sequence_B)
    at_a_time = max(1, min(B, _SCORES_AT_A_TIME // (N * T * k_BSKH.shape[1])))
    per_sequence = (q_BTNH, k_BSKH, v_BSKH, visibility.query_segment_BT, visibility.key_segment_BS, keys_BK)
    if at_a_time == B:
        return jax.vmap(one_sequence)(per_sequence)
    return jax.lax.map(one_sequence, per_sequence, batch_size=at_a_time)


def causal_mask(query_slot_T: jax.Array, query_segment_T: jax.Array, key_segment_S: jax.Array) -> jax.Array:
    """bool [T, S] of one sequence: what `Visibility` says."""
    is_past_TS = jnp.arange(key_segment_S.shape[0])[None, :] <= query_slot_T[:, None]
    return is_past_TS & (query_segment_T[:, None] == key_segment_S[None, :]) & (key_segment_S > 0)[None, :]


def _attend_one(q_TNH, k_SKH, v_SKH, mask_TS, dropout, keys_K):
    """Attention of one sequence, [T, N, H]."""
    T, N, H = q_TNH.shape
    S, K, _ = k_SKH.shape
    # Query heads of one kv head are folded into rows, so that each kv head is one matrix product.
    q_KRH = q_TNH.reshape(T, K, N // K, H).transpose(1, 2, 0, 3).reshape(K, N // K * T, H)
    scores_KRS = jnp.einsum("KRH,SKH->KRS", q_KRH, k_SKH, preferred_element_type=jnp.float32)
    scores_KGTS = scores_KRS.reshape(K, N // K, T, S) * H**-0.5 + jnp.where(mask_TS, 0.0, _MASKED)
    weights_KGTS = jnp.exp(scores_KGTS - jax.lax.stop_gradient(scores_KGTS.max(-1, keepdims=True)))
    sum_KR1 = weights_KGTS.sum(-1).reshape(K, N // K * T, 1)
    if keys_K is not None:
        weights_KGTS = jax.vmap(lambda weights_GTS, key: drop(weights_GTS, dropout, key))(weights_KGTS, keys_K)
    weights_KRS = weights_KGTS.astype(q_TNH.dtype).reshape(K, N // K * T, S)
    out_KRH = jnp.einsum("KRS,SKH->KRH", weights_KRS, v_SKH, preferred_element_type=jnp.float32) / sum_KR1
    return out_KRH.astype(q_TNH.dtype).reshape(K, N // K, T, H).transpose(2, 0, 1, 3).reshape(T, N, H)


def drop(x: jax.Array, rate: float, key: jax.Array) -> jax.Array:
    """Inverted dropout: zero with probability `rate`, else scaled by 1 / (1 - rate)."""
    return jnp.where(jax.random.bernoulli(key, 1.0 - rate, x.shape), x / (1.0 - rate), 0).astype(x.dtype)
