"""Writes new tokens into the pages of one group, in place on every device.

Shape letters: dims.md; n pages, s slots of a page, m pages of a row; W blocks that may be written,
a block being 128 slots.

On a TPU a scatter, and a loop of dynamic_update_slices too, make XLA change the layout of the
cache, which takes copies of all of it.  A kernel whose result is its argument's memory does not.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import select

MAX_TOKENS = 16
_BLOCK = 128


def append(
    caches: tuple[jax.Array, ...],
    new: tuple[jax.Array, ...],
    *,
    group: jax.Array | int,
    table_Bm: jax.Array,
    slot_B: jax.Array,
    device_kind: str,
    implementation: str | Sequence[str] | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, ...]:
    """Writes T tokens of each row from slot_B[b] on into the pages that the table names.

    A token whose page is negative or past the table is not written.  No two rows may write to one
    page.  Donate the caches, so that they stay where they are.

    Args:
      caches: arrays [P, n, s, ...]: keys and values [..., K, H], an int8 cache's scales [..., K].
      new: their new entries [B, T, ...]; cast to the dtype of the cache.
      group: int32 scalar, the entry of P to write to.
      table_Bm: int32 numbers of each row's pages.
      slot_B: int32 slots of each row's first token.  "pallas_tpu" takes up to 16 tokens at any
        slot, or a multiple of 128 tokens from a multiple of 128 on.
      device_kind: jax's name of the mesh's devices, such as "TPU v5".
      implementation: None, a name ("pallas_tpu", "xla") or a list of names in order of preference.
      interpret: passed to pallas_call.

    Returns:
      The caches.
    """
    num_tokens, page_slots = new[0].shape[1], caches[0].shape[2]
    chosen = select.choose(
        "append", _IMPLEMENTATIONS, implementation, device_kind, num_tokens, page_slots
    )
    new = tuple(x.astype(cache.dtype) for x, cache in zip(new, caches, strict=True))
    return chosen.run(caches, new, jnp.asarray(group, jnp.int32), table_Bm, slot_B, interpret)


def _xla(caches, new, group, table_Bm, slot_B, interpret):
    del interpret
    num_pages, page_slots = caches[0].shape[1:3]
    slot_BT = slot_B[:, None] + jnp.arange(new[0].shape[1])
    page_BT = jnp.take_along_axis(
        table_Bm, slot_BT // page_slots, axis=1, mode="fill", fill_value=-1
    )
    page_BT = jnp.where(page_BT < 0, num_pages, page_BT)
    return tuple(
        cache.at[group, page_BT, slot_BT % page_slots].set(x, mode="drop")
        for cache, x in zip(caches, new, strict=True)
    )


def _refuse(device_kind: str, num_tokens: int, page_slots: int) -> str | None:
    if reason := select.only_on("TPU", device_kind):
        return reason
    if page_slots % _BLOCK:
        return f"needs pages whose slots are a multiple of {_BLOCK}, not {page_slots}"
    if num_tokens > MAX_TOKENS and num_tokens % _BLOCK:
        return f"takes up to {MAX_TOKENS} tokens or a multiple of {_BLOCK}, not {num_tokens}"
    return None


def _kernel(group_ref, block_ref, base_ref, *rest, num_caches: int, num_tokens: int):
    """Grid: the blocks that may be written, a row's one after another.

    block_ref: numbers of the blocks in memory.  base_ref: position of the block's first slot
    relative to the row's first new token; a number that no token reaches where nothing is written,
    and then the block is the one before it, or the next that is written.
    """
    del group_ref
    step = pl.program_id(0)
    is_new = (step == 0) | (block_ref[step] != block_ref[jnp.maximum(step - 1, 0)])
    base = base_ref[step]
    new_refs, old_refs, out_refs = (rest[i * num_caches : (i + 1) * num_caches] for i in range(3))
    for new_ref, old_ref, out_ref in zip(new_refs, old_refs, out_refs, strict=True):

        @pl.when(is_new)
        def _(old_ref=old_ref, out_ref=out_ref):
            out_ref[...] = old_ref[...]

        @pl.when((base > -_BLOCK) & (base < num_tokens))
        def _(new_ref=new_ref, out_ref=out_ref):
            if num_tokens > MAX_TOKENS:
                out_ref[...] = new_ref[...]
                return
            place = base + jax.lax.broadcasted_iota(
                jnp.int32, (1,) * (out_ref.ndim - 1) + (_BLOCK,), out_ref.ndim - 1
            )
            block = out_ref[...]
            for token in range(num_tokens):
                block = jnp.where(place == token, new_ref[..., token : token + 1], block)
            out_ref[...] = block


def _tpu(caches, new, group, table_Bm, slot_B, interpret):
    num_tokens, page_slots = new[0].shape[1], caches[0].shape[2]
    B = table_Bm.shape[0]
    is_aligned = num_tokens > MAX_TOKENS
    blocks_of_row = num_tokens // _BLOCK if is_aligned else 1 + (num_tokens > 1)
    blocks_of_page = page_slots // _BLOCK
    # [B, blocks of a row], then flat.
    number = slot_B[:, None] // _BLOCK + jnp.arange(blocks_of_row)
    base = number * _BLOCK - slot_B[:, None]
    page = jnp.take_along_axis(
        table_Bm, number // blocks_of_page, axis=1, mode="fill", fill_value=-1
    )
    is_written_W = ((page >= 0) & (base < num_tokens)).reshape(-1)
    block_W = (page * blocks_of_page + number % blocks_of_page).reshape(-1)
    place_W = jnp.arange(is_written_W.size)
    before_W = jax.lax.cummax(jnp.where(is_written_W, place_W, -1))
    source_W = jnp.where(before_W < 0, jnp.argmax(is_written_W), before_W)
    block_W = jnp.maximum(block_W[source_W], 0)
    base_W = jnp.where(is_written_W, base.reshape(-1), num_tokens)

    def new_spec(x):
        inner = x.shape[2:]
        width = _BLOCK if is_aligned else num_tokens
        return pl.BlockSpec(
            (None, *inner, width),
            lambda w, *_: (
                jax.lax.div(w, blocks_of_row),
                *(0,) * len(inner),
                jax.lax.rem(w, blocks_of_row) if is_aligned else 0,
            ),
        )

    def cache_spec(cache):
        inner = cache.shape[3:]

        def where(w, group_ref, block_ref, _):
            block = block_ref[w]
            page = jax.lax.div(block, blocks_of_page)
            return group_ref[0], page, *(0,) * len(inner), block - page * blocks_of_page

        return pl.BlockSpec((None, None, *inner, _BLOCK), where)

    specs, new_specs = [cache_spec(cache) for cache in caches], [new_spec(x) for x in new]
    new = [jnp.moveaxis(x, 1, -1) for x in new]
    caches = [jnp.moveaxis(cache, 2, -1) for cache in caches]
    written = pl.pallas_call(
        functools.partial(
            _kernel,
            num_caches=len(caches),
            num_tokens=num_tokens,
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(B * blocks_of_row,),
            in_specs=[*new_specs, *specs],
            out_specs=specs,
        ),
        out_shape=[jax.ShapeDtypeStruct(cache.shape, cache.dtype) for cache in caches],
        input_output_aliases={3 + len(new) + i: i for i in range(len(caches))},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        interpret=interpret,
        name="append",
    )(group.reshape(1), block_W.astype(jnp.int32), base_W.astype(jnp.int32), *new, *caches)
    return tuple(jnp.moveaxis(cache, -1, 2) for cache in written)


_IMPLEMENTATIONS = (
    select.Implementation("pallas_tpu", _refuse, _tpu),
    select.Implementation("xla", lambda *_: None, _xla),
)
