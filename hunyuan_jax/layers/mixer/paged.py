"""A cache in pages: rows share a pool of pages, and a table says which are whose.

An entry's arrays have the shape [P, B, S, ...] of the contiguous cache, with pages in place of
rows: R pages of S slots.  Page 0 belongs to nobody; what need not be kept is written there.
Letters: P CLA groups, R pages, S slots of a page, B rows, N pages of a row, T new tokens, K kv
heads, G queries of a kv head, H head dim, Q = G * T.
"""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.decode_attention.api import MAX_TOKENS, decode_attention

_MASKED = -1e30  # swallows any score in float32
# Up to so many tokens are written one after the other: XLA:CPU makes a loop of a scatter, which
# takes 200 us more for a token of four layers.
_FEW_TOKENS = 16
# Rows that share a loop over their pages.
_ROWS_OF_LOOP = 4


def write_pages(
    old_PRS: jax.Array,
    new_BT: jax.Array,
    group: jax.Array,
    table_BN: jax.Array,
    length_B: jax.Array,
) -> jax.Array:
    """old_PRS with new_BT behind the length_B tokens of each row, in one group.

    Both arrays may have further dims, the same ones.  T is less than S, or a multiple of it, and
    then every length too.  Tokens beyond the table go to page 0, or nowhere.
    """
    (B, T), S = new_BT.shape[:2], old_PRS.shape[2]
    new_BT = new_BT.astype(old_PRS.dtype)
    if T == 1 or T < S:
        slot_BT = length_B[:, None] + jnp.arange(T)
        page_BT = jnp.take_along_axis(table_BN, slot_BT // S, 1, mode="fill", fill_value=0)
        if B * T <= _FEW_TOKENS:
            rest = (0,) * (old_PRS.ndim - 3)
            for row, token in itertools.product(range(B), range(T)):
                start = (group, page_BT[row, token], slot_BT[row, token] % S, *rest)
                new = new_BT[None, row : row + 1, token : token + 1]
                old_PRS = jax.lax.dynamic_update_slice(old_PRS, new, start)
            return old_PRS
        return old_PRS.at[group, page_BT, slot_BT % S].set(new_BT)
    # Beyond the table lies padding: an index that is out of bounds writes nothing.
    place_Bn = (length_B // S)[:, None] + jnp.arange(T // S)
    page_Bn = jnp.take_along_axis(table_BN, place_Bn, 1, mode="fill")
    pages_BnS = new_BT.reshape(B, T // S, S, *new_BT.shape[2:])
    return old_PRS.at[group, page_Bn].set(pages_BnS, mode="drop")


def _gathered(pages_PRS: jax.Array, group: jax.Array, page: jax.Array) -> jax.Array:
    return pages_PRS[group, page]


def _sliced(pages_PRS: jax.Array, group: jax.Array, page_B: jax.Array) -> jax.Array:
    rest = pages_PRS.shape[2:]
    starts = ((group, page, *(0,) * len(rest)) for page in page_B)
    slices = [jax.lax.dynamic_slice(pages_PRS, start, (1, 1, *rest))[0] for start in starts]
    return jnp.concatenate(slices)


def read_pages(
    pages: tuple[jax.Array | None, ...],
    group: jax.Array,
    page: jax.Array,
    dtype: Any,
    take: Callable[..., jax.Array] = _gathered,
) -> tuple[jax.Array, jax.Array]:
    """Keys and values [*page.shape, S, K, H] of pages of one group, in `dtype` if they are in few
    bits.

    Args:
      pages: the arrays of `KeysValues`.
    """
    k_PRSKH, v_PRSKH, *scales = pages
    values = take(k_PRSKH, group, page), take(v_PRSKH, group, page)
    if scales[0] is None:
        return values
    return tuple(
        (x.astype(jnp.float32) * take(scale, group, page)[..., None]).astype(dtype)
        for x, scale in zip(values, scales, strict=True)
    )


def attend_pages(
    q_BTNH: jax.Array,
    read: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
    page_size: int,
    table_BN: jax.Array,
    end_BT: jax.Array,
    scale: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Attention of T tokens of each row to its pages: ([B, T, N, H] in q's dtype, the log-sum-exp
    of the scores [B, T, N], -inf where nothing is seen), softmax in float32.

    Neighbouring rows share a loop over pages, which ends with the longest of them: rows of similar
    lengths should be neighbours.  A page beyond a row's end changes none of its bits: it
    multiplies by one and adds zero.  What unused slots hold does not matter, NaN neither.

    Args:
      read: gives keys and values [B, S, K, H] of the pages page_B, one a row.
      end_BT: int32; a token sees the slots before it.
      scale: factor of the scores; None for H ** -0.5.
    """
    B, T, N, H = q_BTNH.shape
    S, length_B = page_size, end_BT.max(1)
    if B > _ROWS_OF_LOOP and B % _ROWS_OF_LOOP == 0:
        parts = zip(
            *(jnp.split(x, B // _ROWS_OF_LOOP) for x in (q_BTNH, table_BN, end_BT)), strict=True
        )
        found = [attend_pages(q, read, S, table, end, scale) for q, table, end in parts]
        return tuple(jnp.concatenate(x) for x in zip(*found, strict=True))
    K = jax.eval_shape(read, table_BN[:, 0])[0].shape[2]
    precision = "highest" if q_BTNH.dtype == jnp.float32 else None
    scale = H**-0.5 if scale is None else scale
    q_BKQH = q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4).reshape(B, K, -1, H)
    end_BQ = jnp.tile(end_BT, (1, N // K))

    def product(spec, a, b):
        return jnp.einsum(spec, a, b, precision=precision, preferred_element_type=jnp.float32)

    def one_page(i, carry):
        max_BKQ, sum_BKQ, acc_BKQH = carry
        k_BSKH, v_BSKH = read(jax.lax.dynamic_index_in_dim(table_BN, i, 1, keepdims=False))
        slot_S = i * S + jnp.arange(S)
        seen_B1QS = (slot_S < end_BQ[..., None])[:, None]
        score_BKQS = jnp.where(
            seen_B1QS, scale * product("BKQH,BSKH->BKQS", q_BKQH, k_BSKH), _MASKED
        )
        new_max_BKQ = jnp.maximum(max_BKQ, score_BKQS.max(-1))
        p_BKQS = jnp.where(seen_B1QS, jnp.exp(score_BKQS - new_max_BKQ[..., None]), 0)
        kept_BKQ = jnp.exp(max_BKQ - new_max_BKQ)
        is_filled_BS = slot_S < length_B[:, None]
        v_BSKH = jnp.where(is_filled_BS[..., None, None], v_BSKH, 0)  # 0 * NaN is NaN
        added_BKQH = product("BKQS,BSKH->BKQH", p_BKQS.astype(q_BTNH.dtype), v_BSKH)
        return (
            new_max_BKQ,
            sum_BKQ * kept_BKQ + p_BKQS.sum(-1),
            acc_BKQH * kept_BKQ[..., None] + added_BKQH,
        )

    zeros_BKQ = jnp.zeros(q_BKQH.shape[:3], jnp.float32)
    carry = (zeros_BKQ + _MASKED, zeros_BKQ, jnp.zeros(q_BKQH.shape, jnp.float32))
    num_pages = jnp.minimum(-(-length_B.max() // S), table_BN.shape[1])
    max_BKQ, sum_BKQ, acc_BKQH = jax.lax.fori_loop(0, num_pages, one_page, carry)
    out_BKQH = acc_BKQH / jnp.where(sum_BKQ > 0, sum_BKQ, 1)[..., None]
    lse_BKQ1 = (max_BKQ + jnp.log(sum_BKQ))[..., None]
    out_BTNH, lse_BTN1 = (
        x_BKQx.reshape(B, K, N // K, T, -1).transpose(0, 3, 1, 2, 4).reshape(B, T, N, -1)
        for x_BKQx in (out_BKQH, lse_BKQ1)
    )
    return out_BTNH.astype(q_BTNH.dtype), lse_BTN1[..., 0]


def paged_attention(
    q_BTNH: jax.Array,
    pages: tuple[jax.Array | None, ...],
    table_BN: jax.Array,
    group: jax.Array,
    end_BT: jax.Array,
    **options: Any,
) -> tuple[jax.Array, jax.Array]:
    """Attention of T tokens of each row to the pages of one group; as `attend_pages`.

    A few tokens run through the kernel of `decode_attention`, but on a CPU: there, its XLA version
    would gather whole tables.

    Args:
      pages: the arrays of `KeysValues`.
      end_BT: int32, of `attend_pages`; each of a few tokens sees one slot more than the one before
        it.
      options: of `kernel_options`.
    """
    k_PRSKH, v_PRSKH, k_scale_PRSK, v_scale_PRSK = pages
    if q_BTNH.shape[1] <= MAX_TOKENS and options["device_kind"] != "cpu":
        options |= {"k_scale_PnsK": k_scale_PRSK, "v_scale_PnsK": v_scale_PRSK}
        options |= {"table_Bm": table_BN, "with_lse": True}
        return decode_attention(q_BTNH, k_PRSKH, v_PRSKH, end_BT[:, -1], group=group, **options)

    # `append` holds a page's slots innermost, and a TPU gathers from row-major arrays only: it
    # would copy the whole cache, with heads padded to 128.
    take = _gathered if options["device_kind"] == "cpu" else _sliced

    def read(page_B):
        return read_pages(pages, group, page_B, q_BTNH.dtype, take)

    return attend_pages(q_BTNH, read, k_PRSKH.shape[2], table_BN, end_BT)
