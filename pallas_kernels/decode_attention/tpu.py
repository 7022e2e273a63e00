"""Decode attention on a TPU: one pass over the cache with an online softmax.

Shape letters: dims.md; i splits, b the slots of one block, R = G * T: the query rows of one kv
head, padded to whole tiles.

The kernel reads the cache as [B, K, H, S], slots along the lanes, as XLA stores a [B, S, K, 80]
array on a TPU: nothing is padded.  With the 80 of a head along the lanes, HBM traffic would be 1.6
times as large.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import chips, select
from pallas_kernels.decode_attention import splits

_MIB = 2**20
VMEM_LIMIT_BYTES = 32 * _MIB


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the kernel.

    block_slots: slots of the cache of one grid step.
    num_splits: ranges of slots that cores can attend to at the same time.
    """

    block_slots: int
    num_splits: int


def config(
    device_kind: str, q_shape: tuple[int, ...], k_shape: tuple[int, ...], cache_dtype: Any
) -> Config:
    """Returns two splits for the two cores of v4 and v5p, and blocks of up to 2048 slots.

    Blocks are smaller if they and their scores do not fit in VMEM.  Static cycles per slot on v6e,
    libtpu 0.0.50.1, K = 8, G = 10, H = 80, bfloat16; HBM needs 2.73.

    | slots of a block | 256 | 512 | 1024 | 2048 | 4096 |
    |---|---|---|---|---|---|
    | T = 1 | | | 2.49 | 1.85 | 2.04 |
    | T = 8 | | 6.19 | 3.09 | 2.47 | |
    | T = 16 | 11.72 | 12.29 | 5.98 | 4.36 | |
    """
    (_, num_tokens, num_heads, _), (_, num_slots, num_kv_heads, head_dim) = q_shape, k_shape
    chip = chips.of_device(device_kind)
    name = chip.name if chip else None
    slot_bytes = num_kv_heads * head_dim * jnp.dtype(cache_dtype).itemsize
    score_bytes = 4 * num_kv_heads * (-(-num_heads // num_kv_heads * num_tokens // 16) * 16)
    block_slots = 2048
    while block_slots > 128 and (
        block_slots * slot_bytes > (2 if name == "v4" else 3) * _MIB
        or block_slots * score_bytes > 12 * _MIB
    ):
        block_slots //= 2
    return Config(
        num_slots if num_slots <= block_slots else block_slots, 2 if name in ("v4", "v5p") else 1
    )


def refuse(device_kind: str, head_dim: int) -> str | None:
    """Returns why the kernel cannot run, or None."""
    return select.only_on("TPU", device_kind) or select.refuse_head_dim(head_dim)


def attend(
    q_KRH: jax.Array,
    k_KHb: jax.Array,
    v_KHb: jax.Array,
    scales: tuple[jax.Array, ...],
    state: tuple[jax.Array, ...],
    seen: tuple[jax.Array, jax.Array] | None,
    scale: float,
) -> tuple[jax.Array, ...]:
    """Returns the state of the online softmax after one more block of the cache.

    Args:
      scales: (k_scale_K1b, v_scale_K1b) of an int8 cache, else ().
      state: (acc_KRH, max_KR1, sum_KR1) of `splits.merge`, float32.
      seen: (slots seen by each row [1, R, b], slots that are filled [1, 1, b]), or None if every
        row sees every slot.
    """
    acc_KRH, max_KR1, sum_KR1 = state
    precision = jax.lax.Precision.HIGHEST if q_KRH.dtype == jnp.float32 else None
    dot = functools.partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)
    score_KRb = dot("KRH,KHb->KRb", q_KRH, k_KHb.astype(q_KRH.dtype)) * (scale * splits.LOG2_E)
    if scales:
        score_KRb *= scales[0]
    if seen is not None:
        score_KRb = jnp.where(seen[0], score_KRb, splits.NO_SCORE)
    new_max_KR1 = jnp.maximum(max_KR1, score_KRb.max(2, keepdims=True))
    p_KRb = jnp.exp2(score_KRb - new_max_KR1)
    if seen is not None:
        p_KRb = jnp.where(seen[0], p_KRb, 0)  # before its first slot a row has score - max = 0
    shrink_KR1 = jnp.exp2(max_KR1 - new_max_KR1)
    sum_KR1 = shrink_KR1 * sum_KR1 + p_KRb.sum(2, keepdims=True)
    if scales:
        p_KRb *= scales[1] if seen is None else jnp.where(seen[1], scales[1], 0)
    if seen is not None:
        v_KHb = jnp.where(seen[1], v_KHb, jnp.zeros_like(v_KHb))  # 0 * NaN is NaN
    # One head after another: libtpu 0.0.50.1 cannot profile the batched product for v5e and v5p.
    # The cost is the same.
    out_KRH = jnp.stack(
        [
            dot("Rb,Hb->RH", p.astype(q_KRH.dtype), v.astype(q_KRH.dtype))
            for p, v in zip(p_KRb, v_KHb, strict=True)
        ]
    )
    return shrink_KR1 * acc_KRH + out_KRH, new_max_KR1, sum_KR1


def _kernel(
    length_ref, start_ref, q_ref, k_ref, v_ref, *rest, cfg: Config, num_tokens: int, scale: float
):
    """Grid: (splits, sequences, blocks of a split); the state stays in VMEM during a split."""
    scale_refs, state_refs = rest[:-3], rest[-3:]
    split, row, step = (pl.program_id(axis) for axis in range(3))
    length, start = length_ref[row], start_ref[row]
    first, end = splits.blocks_of_split(split, start, length, cfg.block_slots, cfg.num_splits)
    slot = (first + step) * cfg.block_slots

    @pl.when(step == 0)
    def _():
        for ref, value in zip(state_refs, (0.0, splits.NO_SCORE, 0.0), strict=True):
            ref[...] = jnp.full_like(ref, value)

    def update(seen):
        scales = tuple(ref[...][:, None] for ref in scale_refs)
        state = attend(
            q_ref[...],
            k_ref[...],
            v_ref[...],
            scales,
            tuple(ref[...] for ref in state_refs),
            seen,
            scale,
        )
        for ref, value in zip(state_refs, state, strict=True):
            ref[...] = value

    def update_edge():
        slot_11b = slot + jax.lax.broadcasted_iota(jnp.int32, (1, 1, cfg.block_slots), 2)
        token_1R1 = jax.lax.rem(
            jax.lax.broadcasted_iota(jnp.int32, (1, q_ref.shape[1], 1), 1), num_tokens
        )
        seen_1Rb = (slot_11b >= start) & (slot_11b < length - num_tokens + 1 + token_1R1)
        update((seen_1Rb, (slot_11b >= start) & (slot_11b < length)))

    is_visible = first + step < end
    is_seen_by_all = (slot >= start) & (slot + cfg.block_slots <= length - num_tokens + 1)
    pl.when(is_visible & is_seen_by_all)(lambda: update(None))
    pl.when(is_visible & ~is_seen_by_all)(update_edge)


def run(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    length_B: jax.Array,
    start_B: jax.Array,
    k_scale_BSK: jax.Array | None,
    v_scale_BSK: jax.Array | None,
    scale: float,
    *,
    cfg: Config,
    interpret: Any = False,
) -> jax.Array:
    """As `api.decode_attention`."""
    (B, T, _, H), (S, K) = q_BTNH.shape, k_BSKH.shape[1:3]
    q_BKRH = splits.rows_of_heads(q_BTNH, K)
    num_rows = q_BKRH.shape[2]
    # Rows are padded to tiles of 16; the padding sees slots like other rows and is dropped.
    q_BKRH = jnp.pad(q_BKRH, ((0, 0), (0, 0), (0, -num_rows % 16), (0, 0)))
    R = q_BKRH.shape[2]
    caches = [x_BSKH.transpose(0, 2, 3, 1) for x_BSKH in (k_BSKH, v_BSKH)]
    scales = (
        []
        if k_scale_BSK is None
        else [x_BSK.transpose(0, 2, 1) for x_BSK in (k_scale_BSK, v_scale_BSK)]
    )

    def visible_block(i, b, step, length_ref, start_ref):
        """Steps after the last block stay at it, so that nothing is fetched."""
        first, end = splits.blocks_of_split(
            i, start_ref[b], length_ref[b], cfg.block_slots, cfg.num_splits
        )
        return jnp.maximum(jnp.minimum(first + step, end - 1), 0)

    state_shapes = [(K, R, H), (K, R, 1), (K, R, 1)]
    state_iBKRx = pl.pallas_call(
        functools.partial(_kernel, cfg=cfg, num_tokens=T, scale=scale),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(cfg.num_splits, B, pl.cdiv(pl.cdiv(S, cfg.block_slots), cfg.num_splits)),
            in_specs=[
                pl.BlockSpec((None, K, R, H), lambda i, b, step, *_: (b, 0, 0, 0)),
                *[
                    pl.BlockSpec(
                        (None, K, H, cfg.block_slots),
                        lambda i, b, *where: (b, 0, 0, visible_block(i, b, *where)),
                    )
                ]
                * 2,
                *[
                    pl.BlockSpec(
                        (None, K, cfg.block_slots),
                        lambda i, b, *where: (b, 0, visible_block(i, b, *where)),
                    )
                ]
                * len(scales),
            ],
            out_specs=[
                pl.BlockSpec((None, None, *shape), lambda i, b, *_: (i, b, 0, 0, 0))
                for shape in state_shapes
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((cfg.num_splits, B, *shape), jnp.float32)
            for shape in state_shapes
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=VMEM_LIMIT_BYTES,
        ),
        interpret=interpret,
        name="decode_attention",
    )(length_B, start_B, q_BKRH, *caches, *scales)
    acc_iBKRH, max_iBKR1, sum_iBKR1 = (x[:, :, :, :num_rows] for x in state_iBKRx)
    return splits.heads_of_rows(
        splits.merge(acc_iBKRH, max_iBKR1[..., 0], sum_iBKR1[..., 0]), T
    ).astype(q_BTNH.dtype)
