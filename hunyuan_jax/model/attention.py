"""Grouped-query attention with cross-layer sharing (specification section 3).

Within a CLA group the raw K/V projection of the first layer serves all.  RoPE and the RMS division of a key do not depend on the
layer, only the key norm's scale does, and q . (g * khat) = (q * g) . khat: so each layer folds its key scale into its own query,
and one (khat, v) pair per group is computed, and cached.
Letters: B batch, T queries, S keys, D model, N query heads, K kv heads, G = N / K, H head dim, R = N * H.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from hunyuan_jax.config import ModelConfig
from hunyuan_jax.model import params, rope
from hunyuan_jax.model.linear import apart, linear
from hunyuan_jax.model.norm import rms_normalize
from hunyuan_jax.parallel import island
from hunyuan_jax.parallel.mesh import device_kind

# Sequences are attended to in turn, as many at a time as keep the float32 scores below this many elements (2 MB): they and their
# gradients then stay in a CPU's cache, and memory does not grow with the batch.
_SCORES_AT_A_TIME = 2**19
_ROWS, _ANGLES = ("batch", "seq", "embed"), ("batch", "seq", "head_dim")
_KV_HEADS = ("batch", "seq", "kv_heads", "head_dim")
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
            self.q_norm_H = params.ones((H,), ("norm",))
            self.k_norm_H = params.ones((H,), ("norm",))

    def keys_values(self, y_BTD: jax.Array, cos_sin_BTh: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """The group's keys, rotated and normalised without scale, and its values: two [B, T, K, H].  Producer only."""
        weights, logical = params.declared(self)
        fn = functools.partial(keys_values, cfg=self.cfg, logical=logical)
        in_logical = (_ROWS, (_ANGLES, _ANGLES))
        return island.island(fn, self.mesh, logical, in_logical, (_KV_HEADS, _KV_HEADS))(weights, y_BTD, cos_sin_BTh)

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
        weights, logical = params.declared(self)
        has_dropout = dropout_key is not None
        kernel = choose_kernel(self.mesh, y_BTD.shape[1], k_BSKH.shape[1], has_dropout)

        def fn(weights, y_BTD, k_BSKH, v_BSKH, cos_sin_BTh, visibility, key_data):
            dropout = {"dropout_key_data": key_data, "dropout": self.cfg.attention_dropout} if has_dropout else {}
            q_BTNH = queries(weights, y_BTD, cos_sin_BTh, cfg=self.cfg, logical=logical)
            out_BTNH = checkpoint_name(kernel(q_BTNH, k_BSKH, v_BSKH, visibility, **dropout), "attended")
            return project_out(weights, out_BTNH, cfg=self.cfg, logical=logical)

        in_logical = (_ROWS, _KV_HEADS, _KV_HEADS, (_ANGLES, _ANGLES), Visibility((), ("batch", "seq"), ("batch", "seq")), ())
        key_data = jax.random.key_data(dropout_key if has_dropout else jax.random.key(0))
        arrays = (y_BTD, k_BSKH, v_BSKH, cos_sin_BTh, visibility, key_data)
        return island.island(fn, self.mesh, logical, in_logical, _ROWS)(weights, *arrays)


def keys_values(
    weights: dict[str, jax.Array], y_BTD: jax.Array, cos_sin_BTh: tuple[jax.Array, jax.Array], *, cfg: ModelConfig, logical: dict
) -> tuple[jax.Array, jax.Array]:
    """`Attention.keys_values` on one shard: its sequences and its kv heads."""
    dtype = y_BTD.dtype
    k_BTKH, v_BTKH = (
        linear(y_BTD, island.whole_matrix(weights[name], logical[name], dtype, num_in=1)).reshape(*y_BTD.shape[:2], -1, cfg.head_dim)
        for name in ("wk_DKH", "wv_DKH")
    )
    if cfg.attention_bias:
        k_bias_KH, v_bias_KH = (island.whole(weights[name], logical[name], dtype) for name in ("bk_KH", "bv_KH"))
        k_BTKH, v_BTKH = k_BTKH + k_bias_KH, v_BTKH + v_bias_KH
    k_BTKH = rope.rotate(k_BTKH, cos_sin_BTh)
    return (rms_normalize(k_BTKH, cfg.rms_norm_eps) if cfg.use_qk_norm else k_BTKH), v_BTKH


def queries(
    weights: dict[str, jax.Array], y_BTD: jax.Array, cos_sin_BTh: tuple[jax.Array, jax.Array], *, cfg: ModelConfig, logical: dict
) -> jax.Array:
    """One shard's queries [B, T, N, H]: rotated, normalised and scaled, the key norm's scale included."""
    dtype = y_BTD.dtype
    q_BTR = linear(y_BTD, island.whole_matrix(weights["wq_DNH"], logical["wq_DNH"], dtype, num_in=1))
    q_BTNH = q_BTR.reshape(*y_BTD.shape[:2], -1, cfg.head_dim)
    if cfg.attention_bias:
        q_BTNH = q_BTNH + island.whole(weights["bq_NH"], logical["bq_NH"], dtype)
    q_BTNH = rope.rotate(q_BTNH, cos_sin_BTh)
    if cfg.use_qk_norm:
        q_BTNH = rms_normalize(q_BTNH, cfg.rms_norm_eps) * (weights["q_norm_H"] * weights["k_norm_H"]).astype(dtype)
    return q_BTNH


def project_out(weights: dict[str, jax.Array], out_BTNH: jax.Array, *, cfg: ModelConfig, logical: dict) -> jax.Array:
    """The heads' outputs back to [B, T, D], summed over the shards of the heads."""
    dtype = out_BTNH.dtype
    out_BTR = out_BTNH.reshape(*out_BTNH.shape[:2], -1)
    out_BTD = apart(linear(out_BTR, island.whole_matrix(weights["wo_NHD"], logical["wo_NHD"], dtype, num_in=2)))
    out_BTD = island.reduce_sum(out_BTD, "heads")
    return out_BTD + weights["bo_D"].astype(dtype) if cfg.attention_bias else out_BTD


def choose_kernel(mesh: Mesh, query_len: int, key_len: int, has_dropout: bool) -> Callable[..., jax.Array]:
    """The function that attends on this mesh: `splash` for whole sequences on TPUs, else `attend`."""
    is_tpu = device_kind(mesh).startswith("TPU")
    return splash if is_tpu and not has_dropout and query_len == key_len and query_len % 128 == 0 else attend


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


def splash(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, visibility: Visibility) -> jax.Array:
    """The same for whole sequences (T = S, no cache, no dropout), by jax's splash attention kernel for TPUs.

    T is a multiple of 128.  Padding attends to padding, which nothing reads.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention

    _, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    block = math.gcd(T, 512)
    sizes = ["block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute", "block_q_dq", "block_kv_dq"]
    # Positions last: heads of 80 would be padded to 128 in memory.
    layouts = dict.fromkeys(("q_layout", "k_layout", "v_layout"), splash_attention.QKVLayout.SEQ_MINOR)
    blocks = splash_attention.BlockSizes(**dict.fromkeys(sizes, block), **layouts)
    mask = splash_attention.MultiHeadMask([splash_attention.CausalMask((T, T))] * (N // K))
    kernel = splash_attention.make_splash_mqa_single_device(mask, block_sizes=blocks)

    def one_sequence(q_TNH, k_SKH, v_SKH, segment_T):
        q_KGTH = (q_TNH * H**-0.5).astype(q_TNH.dtype).reshape(T, K, N // K, H).transpose(1, 2, 0, 3)
        segments = splash_attention.SegmentIds(segment_T, segment_T)
        o_KGTH = jax.vmap(kernel, in_axes=(0, 0, 0, None))(q_KGTH, k_SKH.swapaxes(0, 1), v_SKH.swapaxes(0, 1), segments)
        return o_KGTH.transpose(2, 0, 1, 3).reshape(T, N, H)

    return jax.vmap(one_sequence)(q_BTNH, k_BSKH, v_BSKH, visibility.query_segment_BT)


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
