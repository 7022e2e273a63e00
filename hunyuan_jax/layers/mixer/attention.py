"""Grouped-query attention with cross-layer sharing (docs/model.md, Attention).

Within a CLA group the raw K/V projection of the first layer serves all.  RoPE and the RMS division
of a key do not depend on the layer, only the key norm's scale does, and q . (g * khat) = (q * g) .
khat: so each layer folds its key scale into its own query, and one (khat, v) pair per group is
computed, and cached.  With the norm before RoPE the scale does not commute with the rotation: the
key has its own, and layers do not share it.
Letters: B batch, T queries, S keys, D model, N query heads, K kv heads, G =
N / K, H head dim, R = N * H.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from hunyuan_jax.config import ModelConfig
from hunyuan_jax.layers import lora, rope
from hunyuan_jax.layers.kernels import kernel_options
from hunyuan_jax.layers.linear import linear
from hunyuan_jax.layers.mixer import context_facts, context_pages, kv_cache, paged, ring
from hunyuan_jax.layers.mixer.kv_cache import CacheDtype, KeysValues
from hunyuan_jax.layers.mixer.spark_attention import spark_attention
from hunyuan_jax.layers.norm import rms_normalize
from hunyuan_jax.layers.protocols import LayerCache, Sequence
from hunyuan_jax.parallel import context, island, rules
from hunyuan_jax.parallel.xla_workarounds import fusion_barrier
from hunyuan_jax.params import declare as params
from pallas_kernels.decode_attention.api import MAX_TOKENS, decode_attention
from pallas_kernels.flash_attention import flash_attention, head_seeds

_ROWS, _ANGLES = ("batch", "seq", "embed"), ("batch", "seq", "head_dim")
_KV_HEADS = ("batch", "seq", "kv_heads", "head_dim")
# What the layers of a group attend to, by the form of attention over several chips.
_SEEN = {
    "gather": ("context", "batch", "row", "kv_heads", "head_dim"),
    "ring": _KV_HEADS,
    "all_to_all": ("batch", "row", "context_kv_heads", "head_dim"),
}
_SEQUENCE = Sequence(
    (_ANGLES, _ANGLES), ("batch", "seq"), ("batch",), ("batch",), ("batch", "row")
)


class Attention(nnx.Module):
    """One layer's query and output projections, and the K/V projections unless it shares those of
    its CLA group's producer.
    """

    attribute = "attn"

    def __init__(self, cfg: ModelConfig, mesh: Mesh, key: jax.Array, *, shares: bool):
        D, N, K, H, std = (
            cfg.hidden_size,
            cfg.num_heads,
            cfg.num_kv_heads,
            cfg.head_dim,
            cfg.init_std,
        )
        if cfg.spark.attention_top_k:
            context.refuse(mesh, "config.model.spark.attention_top_k")
        q_key, k_key, v_key, o_key = jax.random.split(key, 4)
        self.cfg = cfg
        self.mesh = mesh
        self.is_producer = not shares

        def matrix(key, shape, *dims):
            return params.param(shape, dims, params.normal(key, std), params.Role.MATRIX)

        def bias(shape, *dims):
            return params.param(shape, dims, params.zeros, params.Role.BIAS)

        self.wq_DNH = matrix(q_key, (D, N, H), "embed", "heads", "head_dim")
        self.wo_NHD = matrix(o_key, (N, H, D), "heads", "head_dim", "embed")
        if not shares:
            self.wk_DKH = matrix(k_key, (D, K, H), "embed", "kv_heads", "head_dim")
            self.wv_DKH = matrix(v_key, (D, K, H), "embed", "kv_heads", "head_dim")
        if cfg.attention_bias:
            self.bq_NH = bias((N, H), "heads", "head_dim")
            self.bo_D = bias((D,), "norm")
            if not shares:
                self.bk_KH = bias((K, H), "kv_heads", "head_dim")
                self.bv_KH = bias((K, H), "kv_heads", "head_dim")
        if cfg.use_qk_norm:
            self.q_norm_H = params.param((H,), ("norm",), params.ones, params.Role.NORM)
            self.k_norm_H = params.param((H,), ("norm",), params.ones, params.Role.NORM)
        lora.declare(self, cfg, jax.random.fold_in(key, 4))

    def keys_values(
        self, y_BTD: jax.Array, cos_sin_BTh: tuple[jax.Array, jax.Array], form: str
    ) -> tuple[jax.Array, jax.Array]:
        """The group's keys, rotated and normalised (without scale unless the norm comes first),
        and its values: two [B, T, K, H], or with a form as `_SEEN` has them.  Producer only.
        """
        weights, logical = params.declared(self)

        def fn(weights, y_BTD, cos_sin_BTh):
            new = keys_values(weights, y_BTD, cos_sin_BTh, cfg=self.cfg, logical=logical)
            if form == "gather":
                return tuple(ring.gather_row(x_BTKH)[None] for x_BTKH in new)
            if form == "all_to_all":
                return tuple(ring.heads_to_row(x_BTKH) for x_BTKH in new)
            return new

        in_logical, dims = (_ROWS, (_ANGLES, _ANGLES)), _SEEN[form] if form else _KV_HEADS
        run = island.island(fn, self.mesh, logical, in_logical, (dims, dims))
        return run(weights, y_BTD, cos_sin_BTh)

    def _form(self, y_BTD: jax.Array) -> str:
        """Returns the form of attention over the chips of a row; "" if it is on one."""
        num_chips = context.num_chips(self.mesh)
        if num_chips == 1:
            return ""
        num_rows = y_BTD.shape[0] // rules.num_shards(self.mesh, "batch")
        num_tensor = rules.num_shards(self.mesh, "heads")
        sizes = (num_rows, y_BTD.shape[1], num_chips, num_tensor)
        return context_facts.choose(self.cfg, *sizes).name

    @staticmethod
    def new_cache(
        cfg: ModelConfig, batch_size: int, num_slots: int, few_bits: CacheDtype | None = None
    ) -> KeysValues:
        """An empty cache, in the compute dtype or in few bits."""
        shape = (cfg.num_groups, batch_size, num_slots, cfg.num_kv_heads, cfg.head_dim)
        return kv_cache.empty(shape, cfg.dtype, few_bits)

    def __call__(
        self, y_BTD: jax.Array, sequence: Sequence, cache: LayerCache, key: jax.Array | None
    ) -> tuple[jax.Array, LayerCache]:
        """(attention's output [B, T, D], the cache with the tokens' keys and values)."""
        if self.is_producer:
            form = "" if sequence.table_BN is not None else self._form(y_BTD)
            new, entry = self.keys_values(y_BTD, sequence.cos_sin_BTh, form), cache.entry
            if entry is not None:
                entry = entry.append(cache.group, new, sequence, self.mesh)
            seen = new
            if sequence.table_BN is not None:
                seen = entry
            elif sequence.length_B is not None:
                seen = entry.view(cache.group)
            cache = LayerCache(entry, cache.group, seen)
        if sequence.table_BN is not None:
            return self.attend_pages(y_BTD, cache.seen, cache.group, sequence), cache
        dropout_key = key if self.cfg.attention_dropout else None
        return self.attend(y_BTD, *cache.seen, sequence, dropout_key), cache

    def attend_pages(
        self,
        y_BTD: jax.Array,
        pages: KeysValues,
        group: jax.Array,
        sequence: Sequence,
    ) -> jax.Array:
        """As `attend`, over the pages of one group."""
        weights, logical = params.declared(self)
        options = kernel_options(self.cfg, self.mesh)

        def fn(weights, y_BTD, pages, group, sequence):
            q_BTNH = queries(weights, y_BTD, sequence.cos_sin_BTh, cfg=self.cfg, logical=logical)
            if top_k := self.cfg.spark.attention_top_k:
                rows = (
                    x_BNSKH.reshape(len(x_BNSKH), -1, *x_BNSKH.shape[3:])
                    for x_BNSKH in paged.read_pages(pages, group, sequence.table_BN, y_BTD.dtype)
                )
                out_BTNH = spark_attention(q_BTNH, *rows, sequence, top_k)
            else:
                where = (sequence.table_BN, group, sequence.length_B)
                out_BTNH = context_pages.attend(q_BTNH, pages, *where, **options)
            return project_out(weights, out_BTNH, cfg=self.cfg, logical=logical)

        in_logical = (_ROWS, kv_cache.DIMS, (), _SEQUENCE)
        arrays = (y_BTD, pages, jnp.asarray(group), sequence)
        return island.island(fn, self.mesh, logical, in_logical, _ROWS)(weights, *arrays)

    def attend(
        self,
        y_BTD: jax.Array,
        k_BSKH: jax.Array,
        v_BSKH: jax.Array,
        sequence: Sequence,
        dropout_key: jax.Array | None,
    ) -> jax.Array:
        """Attends from y over the group's keys and values, from `keys_values` or a cache; returns
        [B, T, D].  dropout_key None: no attention dropout.
        """
        weights, logical = params.declared(self)
        options = kernel_options(self.cfg, self.mesh)
        form, seed_BN = self._form(y_BTD), None
        if dropout_key is not None:
            options["dropout_rate"] = self.cfg.attention_dropout
            # One for each sequence and head, drawn before they are split over the mesh: a run
            # drops the same on every mesh.
            seed_BN = head_seeds(
                jax.random.key_data(dropout_key), y_BTD.shape[0], self.cfg.num_heads
            )

        def fn(weights, y_BTD, k_BSKH, v_BSKH, sequence, seed_BN):
            q_BTNH = queries(weights, y_BTD, sequence.cos_sin_BTh, cfg=self.cfg, logical=logical)
            if top_k := self.cfg.spark.attention_top_k:
                out_BTNH = spark_attention(q_BTNH, k_BSKH, v_BSKH, sequence, top_k)
            elif form == "gather":
                row = (k_BSKH[0], v_BSKH[0], sequence.segment_BT)
                out_BTNH = ring.over_gathered(q_BTNH, *row, seed_BN, **options)
            elif form == "all_to_all":
                row = (k_BSKH, v_BSKH, sequence.segment_BT)
                out_BTNH = ring.over_heads(q_BTNH, *row, seed_BN, **options)
            elif form == "ring":
                out_BTNH = ring.over_ring(q_BTNH, k_BSKH, v_BSKH, sequence.segment_BT, **options)
            else:
                out_BTNH = attend(q_BTNH, k_BSKH, v_BSKH, sequence, seed_BN, **options)
            out_BTNH = checkpoint_name(out_BTNH, "attended")
            return project_out(weights, out_BTNH, cfg=self.cfg, logical=logical)

        dims = _SEEN[form] if form else _KV_HEADS
        in_logical = (_ROWS, dims, dims, _SEQUENCE, ("batch", "heads"))
        arrays = (y_BTD, k_BSKH, v_BSKH, sequence, seed_BN)
        return island.island(fn, self.mesh, logical, in_logical, _ROWS)(weights, *arrays)


def keys_values(
    weights: dict[str, jax.Array],
    y_BTD: jax.Array,
    cos_sin_BTh: tuple[jax.Array, jax.Array],
    *,
    cfg: ModelConfig,
    logical: dict,
) -> tuple[jax.Array, jax.Array]:
    """`Attention.keys_values` on one shard: its sequences and its kv heads."""
    dtype = y_BTD.dtype
    k_BTKH, v_BTKH = (
        _project(weights, logical, target, y_BTD, cfg, num_in=1).reshape(
            *y_BTD.shape[:2], -1, cfg.head_dim
        )
        for target in "kv"
    )
    if cfg.attention_bias:
        k_bias_KH, v_bias_KH = (
            island.gather_param(weights[name], logical[name], dtype) for name in ("bk_KH", "bv_KH")
        )
        k_BTKH, v_BTKH = k_BTKH + k_bias_KH, v_BTKH + v_bias_KH
    if cfg.norm_before_rope:
        k_BTKH = rms_normalize(k_BTKH, cfg.rms_norm_eps) * weights["k_norm_H"].astype(dtype)
        return rope.rotate(k_BTKH, cos_sin_BTh), v_BTKH
    k_BTKH = rope.rotate(k_BTKH, cos_sin_BTh)
    return (rms_normalize(k_BTKH, cfg.rms_norm_eps) if cfg.use_qk_norm else k_BTKH), v_BTKH


def queries(
    weights: dict[str, jax.Array],
    y_BTD: jax.Array,
    cos_sin_BTh: tuple[jax.Array, jax.Array],
    *,
    cfg: ModelConfig,
    logical: dict,
) -> jax.Array:
    """One shard's queries [B, T, N, H]: rotated, normalised and scaled, the key norm's scale
    included unless the norm comes before the rotation.
    """
    dtype = y_BTD.dtype
    q_BTNH = _project(weights, logical, "q", y_BTD, cfg, num_in=1).reshape(
        *y_BTD.shape[:2], -1, cfg.head_dim
    )
    if cfg.attention_bias:
        q_BTNH = q_BTNH + island.gather_param(weights["bq_NH"], logical["bq_NH"], dtype)
    if cfg.norm_before_rope:
        q_BTNH = rms_normalize(q_BTNH, cfg.rms_norm_eps) * weights["q_norm_H"].astype(dtype)
        return rope.rotate(q_BTNH, cos_sin_BTh)
    q_BTNH = rope.rotate(q_BTNH, cos_sin_BTh)
    if cfg.use_qk_norm:
        q_BTNH = rms_normalize(q_BTNH, cfg.rms_norm_eps) * (
            weights["q_norm_H"] * weights["k_norm_H"]
        ).astype(dtype)
    return q_BTNH


def project_out(
    weights: dict[str, jax.Array], out_BTNH: jax.Array, *, cfg: ModelConfig, logical: dict
) -> jax.Array:
    """The heads' outputs back to [B, T, D], summed over the shards of the heads."""
    dtype = out_BTNH.dtype
    out_BTR = out_BTNH.reshape(*out_BTNH.shape[:2], -1)
    out_BTD = fusion_barrier(_project(weights, logical, "o", out_BTR, cfg, num_in=2))
    out_BTD = island.reduce_sum(out_BTD, "heads")
    return out_BTD + weights["bo_D"].astype(dtype) if cfg.attention_bias else out_BTD


def _project(
    weights: dict[str, jax.Array],
    logical: dict,
    target: str,
    x_BTI: jax.Array,
    cfg: ModelConfig,
    num_in: int,
) -> jax.Array:
    """[B, T, O] of the projection q, k, v or o, whose first num_in dims are the input, and of its
    adapter.
    """
    name = lora.names(target)[0]
    out_BTO = linear(
        x_BTI, island.gather_matrix(weights[name], logical[name], x_BTI.dtype, num_in=num_in)
    )
    return (
        out_BTO + lora.added(x_BTI, weights, logical, target, cfg)
        if cfg.lora.rank and target in cfg.lora.targets
        else out_BTO
    )


def attend(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    sequence: Sequence,
    seed_BN: jax.Array | None = None,
    **options: Any,
) -> jax.Array:
    """softmax(q k / sqrt(H)) v with query head n on kv head n // (N / K); softmax in float32,
    result [B, T, N, H] in q's dtype.

    A query sees the keys up to its own slot, of its own segment.  One that sees no key (padding)
    gets zeros.  Runs inside an island: arrays are one shard's.

    Args:
      q_BTNH, k_BSKH, v_BSKH: arrays of one dtype; of tokens that continue a cache, keys and values
        are those of the cache, the tokens' own included, else those of the tokens alone.
      sequence: whose tokens these are.
      seed_BN: for dropout of attention weights, see `flash_attention`.
      options: of `kernel_options`, and dropout_rate.
    """
    if sequence.length_B is None:
        segments = (sequence.segment_BT, sequence.segment_BT)
        return flash_attention(q_BTNH, k_BSKH, v_BSKH, *segments, dropout_seed=seed_BN, **options)
    length_B, start_B = sequence.length_B + q_BTNH.shape[1], sequence.start_B
    if q_BTNH.shape[1] <= MAX_TOKENS:
        cache = (k_BSKH[None], v_BSKH[None], length_B)
        return decode_attention(q_BTNH, *cache, group=0, start_B=start_B, **options)
    return extend_attention(q_BTNH, k_BSKH, v_BSKH, length_B, start_B, **options)


def extend_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    length_B: jax.Array,
    start_B: jax.Array,
    **options: Any,
) -> jax.Array:
    """As `decode_attention`, for any number of new tokens, by flash attention.

    Flash attention takes one offset for the whole batch, S - T: the last query at the last key.
    So each row's slots are shifted until its last token is in the last slot, which costs one copy.
    """
    num_slots = k_BSKH.shape[1]
    # Slot of every key after the shift; negative numbers are slots before the first.
    slot_BS = jnp.arange(num_slots) - (num_slots - length_B)[:, None]
    segment_BS = (slot_BS >= start_B[:, None]).astype(jnp.int32)
    k_BSKH, v_BSKH = (
        jnp.take_along_axis(x_BSKH, jnp.maximum(slot_BS, 0)[..., None, None], axis=1)
        for x_BSKH in (k_BSKH, v_BSKH)
    )
    ones_BT = jnp.ones(q_BTNH.shape[:2], jnp.int32)
    return flash_attention(q_BTNH, k_BSKH, v_BSKH, ones_BT, segment_BS, **options)
