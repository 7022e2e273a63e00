"""Decode attention on a TPU: one pass over the cache with an online softmax.

Shape letters: dims.md; n pages, s slots of a page, m pages of a row; b the slots of a block, c the
copies that bring it, i splits, W blocks of a split; R = G * T: the query rows of one kv head,
padded to whole tiles.

The kernel reads the cache as [P, n, K, H, s], slots along the lanes, as XLA stores a
[P, n, s, K, 80] array on a TPU: nothing is padded.  With the 80 of a head along the lanes, HBM
traffic would be 1.6 times as large.

A list of all rows' blocks, made before the kernel, is its grid, so that short rows cost no empty
steps.  The splits, one for each core, share the list evenly.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import chips, select
from pallas_kernels.decode_attention import splits

_MIB = 2**20
VMEM_LIMIT_BYTES = 32 * _MIB
# Half of the scalar memory of v5e and later, which holds the list of blocks.
_MAX_ENTRIES = 2**17


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the kernel.

    copy_slots: slots of one copy from HBM: of a page, or a part of it.
    num_copies: copies for a grid step, for each of keys and values.
    num_splits: shares of the work that cores can do at the same time.
    """

    copy_slots: int
    num_copies: int
    num_splits: int

    @property
    def block_slots(self) -> int:
        """Slots of a grid step."""
        return self.copy_slots * self.num_copies


def config(
    device_kind: str,
    q_shape: tuple[int, ...],
    k_shape: tuple[int, ...],
    cache_dtype: Any,
    pages_of_row: int = 1,
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
    (_, num_tokens, num_heads, _), (_, _, page_slots, num_kv_heads, head_dim) = q_shape, k_shape
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
    num_splits = 2 if name in ("v4", "v5p") else 1
    if page_slots <= block_slots:
        return Config(page_slots, min(block_slots // page_slots, pages_of_row), num_splits)
    while pages_of_row > 1 and page_slots % block_slots:
        block_slots -= 128
    return Config(block_slots, 1, num_splits)


def refuse(
    device_kind: str, head_dim: int, page_slots: int, table_shape: tuple[int, int] | None
) -> str | None:
    """Returns why the kernel cannot run, or None."""
    if reason := select.only_on("TPU", device_kind) or select.refuse_head_dim(head_dim):
        return reason
    if table_shape is None:
        return None
    if table_shape[1] > 1 and page_slots % 128:
        return f"needs pages whose slots are a multiple of 128, not {page_slots}"
    num_entries = table_shape[0] * table_shape[1]
    if num_entries > _MAX_ENTRIES:
        return f"needs a table of at most {_MAX_ENTRIES} entries, not {num_entries}; larger pages"
    return None


class Work(NamedTuple):
    """The blocks that each split attends to, in order of rows.

    row_iW: whose they are.
    block_iW: numbers of the blocks within their rows.
    copy_iWc: copies that bring them: page * copies of a page + copy within the page.  A copy
      without a visible slot is the one before it, which is not fetched twice.
    num_blocks: of the longest split, at least 1; all later entries may be anything.
    end_i: numbers of blocks of the splits.
    """

    row_iW: jax.Array
    block_iW: jax.Array
    copy_iWc: jax.Array
    num_blocks: jax.Array
    end_i: jax.Array


def list_work(
    cfg: Config,
    page_slots: int,
    table_Bm: jax.Array,
    length_B: jax.Array,
    start_B: jax.Array,
) -> Work:
    """Lists the visible blocks of all rows."""
    B, m = table_Bm.shape
    first_B, count_B = visible_blocks(cfg, length_B, start_B)
    last_B = jnp.cumsum(count_B)
    most = pl.cdiv(B * pl.cdiv(m * page_slots, cfg.block_slots), cfg.num_splits)
    each = jax.lax.div(last_B[-1] + cfg.num_splits - 1, cfg.num_splits)
    end_i = jnp.clip(last_B[-1] - each * jnp.arange(cfg.num_splits), 0, each)
    # A split's last block stands for all that follow it.
    step_iW = jnp.minimum(jnp.arange(most), jnp.maximum(end_i - 1, 0)[:, None])
    place_iW = step_iW + each * jnp.arange(cfg.num_splits)[:, None]
    row_iW = jnp.minimum((place_iW[..., None] >= last_B).sum(-1), B - 1)
    block_iW = first_B[row_iW] + place_iW - (last_B - count_B)[row_iW]
    slot_iWc = block_iW[..., None] * cfg.block_slots + cfg.copy_slots * jnp.arange(cfg.num_copies)
    page_iWc = table_Bm[row_iW[..., None], jnp.clip(slot_iWc // page_slots, 0, m - 1)]
    copies_of_page = pl.cdiv(page_slots, cfg.copy_slots)
    copy_iWc = page_iWc * copies_of_page + slot_iWc % page_slots // cfg.copy_slots
    is_visible_iWc = (slot_iWc < length_B[row_iW][..., None]) & (
        slot_iWc + cfg.copy_slots > start_B[row_iW][..., None]
    )
    latest_iWc = jax.lax.cummax(jnp.where(is_visible_iWc, jnp.arange(most)[:, None], -1), axis=1)
    copy_iWc = jnp.where(
        latest_iWc < 0, 0, jnp.take_along_axis(copy_iWc, jnp.maximum(latest_iWc, 0), axis=1)
    )
    return Work(row_iW, block_iW, copy_iWc, jnp.maximum(each, 1), end_i)


def visible_blocks(
    cfg: Config, length_B: jax.Array, start_B: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns each row's first block with a visible slot, and the number of such blocks."""
    first_B = start_B // cfg.block_slots
    return first_B, jnp.maximum(pl.cdiv(length_B, cfg.block_slots) - first_B, 0)


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
    length_ref,
    start_ref,
    row_ref,
    block_ref,
    copy_ref,
    end_ref,
    group_ref,
    q_ref,
    *rest,
    cfg: Config,
    list_size: int,
    num_tokens: int,
    scale: float,
):
    """Grid: (splits, blocks of a split); a row's state stays in VMEM from block to block."""
    del copy_ref, group_ref
    split, step = pl.program_id(0), pl.program_id(1)
    place = split * list_size + step
    row = row_ref[place]
    length, start = length_ref[row], start_ref[row]
    slot = block_ref[place] * cfg.block_slots
    cache_refs, state_refs = rest[:-3], rest[-3:]

    @pl.when((step == 0) | (row != row_ref[jnp.maximum(place - 1, 0)]))
    def _():
        for ref, value in zip(state_refs, (0.0, splits.NO_SCORE, 0.0), strict=True):
            ref[...] = jnp.full_like(ref, value)

    def update_edge():
        slot_11b = slot + jax.lax.broadcasted_iota(jnp.int32, (1, 1, cfg.block_slots), 2)
        token_1R1 = jax.lax.rem(
            jax.lax.broadcasted_iota(jnp.int32, (1, q_ref.shape[1], 1), 1), num_tokens
        )
        seen_1Rb = (slot_11b >= start) & (slot_11b < length - num_tokens + 1 + token_1R1)
        filled_11b = (slot_11b >= start) & (slot_11b < length)
        update(cfg, q_ref, cache_refs, state_refs, (seen_1Rb, filled_11b), scale)

    is_visible = step < end_ref[split]
    is_seen_by_all = (slot >= start) & (slot + cfg.block_slots <= length - num_tokens + 1)

    @pl.when(is_visible & is_seen_by_all)
    def _():
        update(cfg, q_ref, cache_refs, state_refs, None, scale)

    pl.when(is_visible & ~is_seen_by_all)(update_edge)


def update(
    cfg: Config,
    q_ref: Any,
    cache_refs: tuple[Any, ...],
    state_refs: tuple[Any, ...],
    seen: tuple[jax.Array, jax.Array] | None,
    scale: float,
) -> None:
    """Attends to the block that lies in `cache_refs`: the copies of k, v and their scales."""
    k_KHb, v_KHb, *scales = (
        jnp.concatenate([ref[...] for ref in cache_refs[at : at + cfg.num_copies]], axis=-1)
        for at in range(0, len(cache_refs), cfg.num_copies)
    )
    scales = tuple(scale_Kb[:, None] for scale_Kb in scales)
    state = tuple(ref[...] for ref in state_refs)
    state = attend(q_ref[...], k_KHb, v_KHb, scales, state, seen, scale)
    for ref, value in zip(state_refs, state, strict=True):
        ref[...] = value


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
    (B, T), (page_slots, K) = q_BTNH.shape[:2], k_PnsKH.shape[2:4]
    q_BKRH = splits.rows_of_heads(q_BTNH, K)
    num_rows = q_BKRH.shape[2]
    # Rows are padded to tiles of 16; the padding sees slots like other rows and is dropped.
    q_BKRH = jnp.pad(q_BKRH, ((0, 0), (0, 0), (0, -num_rows % 16), (0, 0)))
    caches = [x_PnsKH.transpose(0, 1, 3, 4, 2) for x_PnsKH in (k_PnsKH, v_PnsKH)]
    if k_scale_PnsK is not None:
        caches += [x_PnsK.transpose(0, 1, 3, 2) for x_PnsK in (k_scale_PnsK, v_scale_PnsK)]
    if table_Bm is None:
        table_Bm = jnp.arange(B, dtype=jnp.int32)[:, None]
    work = list_work(cfg, page_slots, table_Bm, length_B, start_B)
    list_size = work.row_iW.shape[1]
    state_iBKRx = call(
        functools.partial(_kernel, cfg=cfg, list_size=list_size, num_tokens=T, scale=scale),
        (cfg.num_splits, work.num_blocks),
        cfg,
        list_size,
        (
            length_B,
            start_B,
            work.row_iW.reshape(-1),
            work.block_iW.reshape(-1),
            work.copy_iWc.reshape(-1),
            work.end_i,
            jnp.asarray(group, jnp.int32).reshape(1),
        ),
        q_BKRH,
        caches,
        interpret,
    )
    # The kernel writes no state of a row without a block in a split.
    _, count_B = visible_blocks(cfg, length_B, start_B)
    last_B, begin_i1 = jnp.cumsum(count_B), (work.num_blocks * jnp.arange(cfg.num_splits))[:, None]
    has_block_iB = (last_B > begin_i1) & (last_B - count_B < begin_i1 + work.end_i[:, None])
    has_block_iB &= count_B > 0
    acc_iBKRH, max_iBKR1, sum_iBKR1 = (
        jnp.where(has_block_iB[..., None, None, None], x_iBKRx[:, :, :, :num_rows], nothing)
        for x_iBKRx, nothing in zip(state_iBKRx, (0.0, splits.NO_SCORE, 0.0), strict=True)
    )
    return splits.merge(acc_iBKRH, max_iBKR1[..., 0], sum_iBKR1[..., 0], T, q_BTNH.dtype)


def call(
    kernel: Callable,
    grid: tuple[Any, Any],
    cfg: Config,
    list_size: int,
    scalars: tuple[jax.Array, ...],
    q_BKRH: jax.Array,
    caches: list[jax.Array],
    interpret: Any = False,
) -> list[jax.Array]:
    """Runs a kernel over the listed blocks; returns `splits.merge`'s arguments, [i, B, K, R, ...].

    Args:
      scalars: of `_kernel`.
      caches: k and v [P, n, K, H, s], and for int8 their scales [P, n, K, s].
    """
    B, K, R, H = q_BKRH.shape
    copies_of_page = pl.cdiv(caches[0].shape[-1], cfg.copy_slots)

    def copy_spec(number, cache):
        def where(split, step, length, start, row, block, copy, end, group):
            place = copy[(split * list_size + step) * cfg.num_copies + number]
            page, part = place, 0
            if copies_of_page > 1:
                page = jax.lax.div(place, copies_of_page)
                part = place - page * copies_of_page
            return group[0], page, *(0,) * (cache.ndim - 3), part

        return pl.BlockSpec((None, None, *cache.shape[2:-1], cfg.copy_slots), where)

    def row_of(split, step, length, start, row, *_):
        return row[split * list_size + step]

    specs = [
        (copy_spec(number, cache), cache) for cache in caches for number in range(cfg.num_copies)
    ]
    state_shapes = [(K, R, H), (K, R, 1), (K, R, 1)]
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=grid,
            in_specs=[
                pl.BlockSpec((None, K, R, H), lambda *where: (row_of(*where), 0, 0, 0)),
                *(spec for spec, _ in specs),
            ],
            out_specs=[
                pl.BlockSpec(
                    (None, None, *shape), lambda i, *where: (i, row_of(i, *where), 0, 0, 0)
                )
                for shape in state_shapes
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((cfg.num_splits, B, *shape), jnp.float32)
            for shape in state_shapes
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=VMEM_LIMIT_BYTES,
        ),
        interpret=interpret,
        name="decode_attention",
    )(*scalars, q_BKRH, *(cache for _, cache in specs))
