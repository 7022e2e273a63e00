"""Decode attention on NVIDIA GPUs in Pallas Triton: programs compute splits, XLA merges them.

Shape letters: dims.md; n pages, s slots of a page, m pages of a row; i splits, b slots of a block,
R = G * T: query rows of a kv head.  Never ran on a GPU: the Config is a guess from the sizes of
shared memory and of a wave.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import select
from pallas_kernels.decode_attention import splits


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the kernel.

    block_rows: query rows of a program.
    block_slots: slots of the cache of one step.
    num_splits: ranges of slots, each a program of its own.
    num_warps, num_stages: warps of a program, and blocks of the cache in flight.
    """

    block_rows: int
    block_slots: int
    num_splits: int
    num_warps: int
    num_stages: int


def config(
    q_shape: tuple[int, ...],
    k_shape: tuple[int, ...],
    pages_of_row: int = 1,
    num_cores: int = 132,
) -> Config:
    """Returns a Config with eight programs per multiprocessor, of at least four blocks each.

    A block lies within one page.  About two programs fit on a multiprocessor at a time; num_cores:
    number of multiprocessors.
    """
    (B, num_tokens, num_heads, _), (_, _, page_slots, num_kv_heads, head_dim) = q_shape, k_shape
    num_rows = num_heads // num_kv_heads * num_tokens
    block_rows = min(max(pl.next_power_of_2(num_rows), 16), 64)
    block_slots = 64 if head_dim <= 128 else 32
    if pages_of_row > 1:
        block_slots = math.gcd(block_slots, page_slots)
    num_programs = B * num_kv_heads * pl.cdiv(num_rows, block_rows)
    num_slots = pages_of_row * page_slots
    num_splits = min(pl.cdiv(8 * num_cores, num_programs), pl.cdiv(num_slots, 4 * block_slots))
    return Config(block_rows, block_slots, num_splits, num_warps=4, num_stages=3)


def refuse(
    device_kind: str, head_dim: int, page_slots: int, table_shape: tuple[int, int] | None
) -> str | None:
    """Returns why the kernel cannot run, or None."""
    if reason := select.only_on("NVIDIA", device_kind) or select.refuse_head_dim(head_dim):
        return reason
    if table_shape is not None and table_shape[1] > 1 and page_slots % 16:
        return f"needs pages whose slots are a multiple of 16, not {page_slots}"
    return None


def _kernel(
    length_ref,
    start_ref,
    group_ref,
    table_ref,
    q_ref,
    k_ref,
    v_ref,
    *rest,
    cfg: Config,
    num_kv_heads: int,
    num_rows: int,
    num_tokens: int,
    page_slots: int,
    head_dim: int,
    scale,
):
    """Grid: (row blocks x kv heads, splits, sequences).

    Neighbouring programs read neighbouring heads of the same slots.
    """
    scale_refs, (acc_ref, max_ref, sum_ref) = rest[:-3], rest[-3:]
    row_R = jax.lax.div(pl.program_id(0), num_kv_heads) * cfg.block_rows + jnp.arange(
        cfg.block_rows
    )
    is_row_R = row_R < num_rows
    is_dim_1H = (jnp.arange(q_ref.shape[1]) < head_dim)[None]
    length, start, group = length_ref[...], start_ref[...], group_ref[...]
    first, end = splits.blocks_of_split(
        pl.program_id(1), start, length, cfg.block_slots, cfg.num_splits
    )
    q_RH = plgpu.load(q_ref, mask=is_row_R[:, None] & is_dim_1H, other=0.0)
    dtype = q_RH.dtype
    dot = functools.partial(
        plgpu.dot, precision=jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    )

    def attend(block, state):
        acc_RH, max_R, sum_R = state
        first_slot = block * cfg.block_slots
        page = table_ref[jax.lax.div(first_slot, page_slots)]
        slots = pl.ds(jax.lax.rem(first_slot, page_slots), cfg.block_slots)
        slot_b = block * cfg.block_slots + jnp.arange(cfg.block_slots)
        is_filled_b = (slot_b >= start) & (slot_b < length)
        # The mask keeps unfilled slots and the padding of a head from being read at all.
        k_bH, v_bH = (
            plgpu.load(
                ref.at[group, page, slots, :], mask=is_filled_b[:, None] & is_dim_1H, other=0
            ).astype(dtype)
            for ref in (k_ref, v_ref)
        )
        scale_1b = [
            plgpu.load(ref.at[group, page, slots], mask=is_filled_b, other=0.0)[None]
            for ref in scale_refs
        ]
        score_Rb = dot(q_RH, k_bH, trans_b=True) * (scale * splits.LOG2_E)
        if scale_refs:
            score_Rb *= scale_1b[0]
        seen_Rb = (slot_b >= start)[None] & (
            slot_b[None] < (length - num_tokens + 1 + jax.lax.rem(row_R, num_tokens))[:, None]
        )
        score_Rb = jnp.where(seen_Rb, score_Rb, splits.NO_SCORE)
        new_max_R = jnp.maximum(max_R, score_Rb.max(1))
        p_Rb = jnp.where(seen_Rb, jnp.exp2(score_Rb - new_max_R[:, None]), 0.0)
        shrink_R = jnp.exp2(max_R - new_max_R)
        sum_R = shrink_R * sum_R + p_Rb.sum(1)
        if scale_refs:
            p_Rb *= scale_1b[1]
        return shrink_R[:, None] * acc_RH + dot(p_Rb.astype(dtype), v_bH), new_max_R, sum_R

    nothing_R = jnp.zeros(cfg.block_rows, jnp.float32)
    state = (jnp.zeros(q_RH.shape, jnp.float32), nothing_R + splits.NO_SCORE, nothing_R)
    acc_RH, max_R, sum_R = jax.lax.fori_loop(first, end, attend, state)
    plgpu.store(acc_ref, acc_RH, mask=is_row_R[:, None] & is_dim_1H)
    plgpu.store(max_ref, max_R, mask=is_row_R)
    plgpu.store(sum_ref, sum_R, mask=is_row_R)


def run(
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
    *,
    cfg: Config,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """As `api.decode_attention` with its log-sum-exp."""
    (B, T, _, H), (P, n, page_slots, K) = q_BTNH.shape, k_PnsKH.shape[:4]
    q_BKRH = splits.rows_of_heads(q_BTNH, K)
    R = q_BKRH.shape[2]
    padded_H = pl.next_power_of_2(H)
    padded_slots = pl.cdiv(page_slots, cfg.block_slots) * cfg.block_slots
    scales = [] if k_scale_PnsK is None else [k_scale_PnsK, v_scale_PnsK]
    if table_Bm is None:
        table_Bm = jnp.arange(B, dtype=jnp.int32)[:, None]
    one_int = pl.BlockSpec((None,), lambda r, i, b: (b,))
    # All pages of one kv head: the kernel reads the group's and the row's.
    cache = pl.BlockSpec((P, n, padded_slots, None, padded_H), lambda r, i, b: (0, 0, 0, r % K, 0))
    scale_spec = pl.BlockSpec((P, n, padded_slots, None), lambda r, i, b: (0, 0, 0, r % K))
    acc_iBKRH, max_iBKR, sum_iBKR = pl.pallas_call(
        functools.partial(
            _kernel,
            cfg=cfg,
            num_kv_heads=K,
            num_rows=R,
            num_tokens=T,
            page_slots=page_slots,
            head_dim=H,
            scale=scale,
        ),
        grid=(pl.cdiv(R, cfg.block_rows) * K, cfg.num_splits, B),
        in_specs=[
            one_int,
            one_int,
            pl.BlockSpec((None,), lambda r, i, b: (0,)),
            pl.BlockSpec((None, table_Bm.shape[1]), lambda r, i, b: (b, 0)),
            pl.BlockSpec(
                (None, None, cfg.block_rows, padded_H), lambda r, i, b: (b, r % K, r // K, 0)
            ),
            cache,
            cache,
            *[scale_spec] * len(scales),
        ],
        out_specs=[
            pl.BlockSpec(
                (None, None, None, cfg.block_rows, padded_H),
                lambda r, i, b: (i, b, r % K, r // K, 0),
            ),
            *[
                pl.BlockSpec(
                    (None, None, None, cfg.block_rows), lambda r, i, b: (i, b, r % K, r // K)
                )
            ]
            * 2,
        ],
        out_shape=[
            jax.ShapeDtypeStruct((cfg.num_splits, B, K, R, *dims), jnp.float32)
            for dims in ((H,), (), ())
        ],
        compiler_params=plgpu.CompilerParams(num_warps=cfg.num_warps, num_stages=cfg.num_stages),
        interpret=interpret,
        name="decode_attention",
    )(
        length_B,
        start_B,
        jnp.asarray(group, jnp.int32).reshape(1),
        table_Bm,
        q_BKRH,
        k_PnsKH,
        v_PnsKH,
        *scales,
    )
    return splits.merge(acc_iBKRH, max_iBKR, sum_iBKR, T, q_BTNH.dtype)
