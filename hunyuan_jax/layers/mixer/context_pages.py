"""Attention to a cache in pages whose slots are spread over the chips of the mesh axis `context`.

A page of C S slots has S on each of C chips: those of chunks i and 2 C - 1 - i of the page's 2 C
chunks, the tokens that chip i computes of a piece of a prompt (parallel/context.py).  A chip's
slots keep their order, so what a token sees of them is again the first so many.  Each chip attends
from all tokens of the call to its own slots, and the results are merged by their log-sum-exp.
Any number of tokens is spread evenly, and nobody who plans pages notices.

All run inside an island.  Letters: B rows, T tokens of this chip, R tokens of the call, N query
heads, H head dim, S slots of a page on this chip, n pages of a row.
"""

from typing import Any

import jax
import jax.numpy as jnp

from hunyuan_jax.layers.mixer import paged, ring
from hunyuan_jax.parallel import context, island


def attend(
    q_BTNH: jax.Array,
    pages: tuple[jax.Array | None, ...],
    table_Bn: jax.Array,
    group: jax.Array,
    length_B: jax.Array,
    **options: Any,
) -> jax.Array:
    """Returns [B, T, N, H] in q's dtype: attention of the R tokens behind the first length_B of
    each row to the pages of one group, which include them.

    Args:
      q_BTNH: of this chip's tokens; a single one (R = 1) is on every chip.
      pages: the arrays of `KeysValues`.
      options: of `kernel_options`.
    """
    C, is_single = island.num_shards("slots"), q_BTNH.shape[1] == 1
    q_BRNH = q_BTNH if C == 1 or is_single else ring.gather_row(q_BTNH)
    end_BR = length_B[:, None] + 1 + jnp.arange(q_BRNH.shape[1])
    seen_BR = slots_here(end_BR, pages[0].shape[2])
    out_BRNH, lse_BRN = paged.paged_attention(q_BRNH, pages, table_Bn, group, seen_BR, **options)
    if C == 1:
        return out_BRNH
    largest_BRN = island.reduce_max(lse_BRN, "slots")
    share_BRN1 = jnp.exp(lse_BRN - jnp.where(jnp.isneginf(largest_BRN), 0, largest_BRN))[..., None]
    out_BRNH = out_BRNH.astype(jnp.float32) * share_BRN1
    parts_BRNx = jnp.concatenate([out_BRNH, share_BRN1], axis=-1)
    if is_single:
        sum_BTNx = island.reduce_sum(parts_BRNx, "slots")
    else:
        sum_BTNx = island.reduce_scatter(context.chip_order(parts_BRNx, C), "slots", dim=1)
    out_BTNH, share_BTN1 = sum_BTNx[..., :-1], sum_BTNx[..., -1:]
    return (out_BTNH / jnp.where(share_BTN1 > 0, share_BTN1, 1)).astype(q_BTNH.dtype)


def written_here(
    table_Bn: jax.Array, length_B: jax.Array, num_tokens: int, page_slots: int
) -> tuple[jax.Array, jax.Array]:
    """Returns (the table, how many of this chip's slots are filled), for tokens that are written
    behind the first length_B of each row.  A single token is on every chip and belongs to one: the
    others write to page 0, which is nobody's.

    Args:
      num_tokens: T, 1 or S.
      page_slots: S.
    """
    start_B = slots_here(length_B, page_slots)
    if island.num_shards("slots") > 1 and num_tokens == 1:
        is_here_B = slots_here(length_B + 1, page_slots) > start_B
        table_Bn = jnp.where(is_here_B[:, None], table_Bn, 0)
    return table_Bn, start_B


def slots_here(end: jax.Array, page_slots: int) -> jax.Array:
    """Returns how many of a row's first `end` slots this chip has, which are its first ones; int32
    as `end`.

    page_slots: S.
    """
    C, chunk_slots = island.num_shards("slots"), page_slots // 2
    if C == 1:
        return end
    num_pages, rest = end // (C * page_slots), end % (C * page_slots)
    here = (jnp.clip(rest - i * chunk_slots, 0, chunk_slots) for i in context.chunks_here())
    return num_pages * page_slots + sum(here)
