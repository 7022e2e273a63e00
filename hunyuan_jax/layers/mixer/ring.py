"""Causal attention of a row that is spread over the chips of the mesh axis `context`.

    gather      every chip gets the keys and values of the whole row, once for all layers that
                share them, and attends from its own queries
    ring        keys and values travel from chip to chip; each step's result is merged into the
                others by its log-sum-exp
    all_to_all  every chip gets the whole row of some of the heads, and gives the results back
                (Ulysses, arXiv 2309.14509)

`context_facts.py` says what each costs.  All run inside an island.  The tokens are in
the order of `parallel/context.py`.

Letters: B batch, C chips, c tokens of a chunk, T = 2 c queries of this chip, R = C T tokens of the
row, N query heads, K kv heads, H head dim.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from hunyuan_jax.parallel import context, island
from pallas_kernels.flash_attention import attention_gradients, flash_attention

# Arguments of `flash_attention` that choose and run an implementation.
Options = dict[str, Any]


def gather_row(x_BT: jax.Array) -> jax.Array:
    """Returns the row's [B, R, ...], in its own order, of what each chip has of its tokens.

    The transpose is a reduce-scatter.
    """
    return context.row_order(island.gather(x_BT, "seq", dim=1), island.num_shards("seq"))


def over_gathered(
    q_BTNH: jax.Array,
    k_BRKH: jax.Array,
    v_BRKH: jax.Array,
    segment_BT: jax.Array,
    seed_BN: jax.Array | None,
    **options: Any,
) -> jax.Array:
    """Returns [B, T, N, H]: attention over the keys of the whole row.

    Args:
      q_BTNH, segment_BT: of this chip's tokens.
      k_BRKH, v_BRKH: from `gather_row`.
      seed_BN: for dropout, see `flash_attention`.
      options: of `flash_attention`.
    """
    segment_BR = gather_row(segment_BT)
    parts = zip(
        context.chunks_here(), context.halves(q_BTNH), context.halves(segment_BT), strict=True
    )
    out = [
        flash_attention(
            q_BcNH,
            k_BRKH,
            v_BRKH,
            segment_Bc,
            segment_BR,
            query_offset=chunk * q_BcNH.shape[1],
            dropout_seed=seed_BN,
            **options,
        )
        for chunk, q_BcNH, segment_Bc in parts
    ]
    return jnp.concatenate(out, axis=1)


def heads_to_row(x_BTNH: jax.Array) -> jax.Array:
    """Returns [B, R, N / C, H]: the whole row, in its own order, of this chip's part of the heads.

    The transpose is `row_to_heads`.
    """
    C = island.num_shards("seq")
    return context.row_order(island.exchange_dims(x_BTNH, "seq", 2, 1), C)


def row_to_heads(x_BRnH: jax.Array) -> jax.Array:
    """Inverse of `heads_to_row`."""
    C = island.num_shards("seq")
    return island.exchange_dims(context.chip_order(x_BRnH, C), "seq", 1, 2)


def over_heads(
    q_BTNH: jax.Array,
    k_BRnH: jax.Array,
    v_BRnH: jax.Array,
    segment_BT: jax.Array,
    seed_BN: jax.Array | None,
    **options: Any,
) -> jax.Array:
    """As `over_gathered`, with keys and values from `heads_to_row`."""
    segment_BR = gather_row(segment_BT)
    if seed_BN is not None:
        num_heads = seed_BN.shape[1] // island.num_shards("seq")
        first = island.shard_index("seq") * num_heads
        seed_BN = jax.lax.dynamic_slice_in_dim(seed_BN, first, num_heads, axis=1)
    return row_to_heads(
        flash_attention(
            heads_to_row(q_BTNH),
            k_BRnH,
            v_BRnH,
            segment_BR,
            segment_BR,
            dropout_seed=seed_BN,
            **options,
        )
    )


def over_ring(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_BT: jax.Array,
    **options: Any,
) -> jax.Array:
    """As `over_gathered`, with this chip's keys and values, and without dropout."""
    return _ring(tuple(options.items()), q_BTNH, k_BTKH, v_BTKH, segment_BT)


# In step 0 a chip attends to its own two chunks, which is causal attention over 2 c tokens.  In
# step s it has the chunks (j, 2 C - 1 - j) of chip j = i - s.  Of the four pairs of chunks two are
# visible in full and two not at all: its late chunk sees j's early one; and if j < i its early
# chunk sees j's early one, else its late chunk sees j's late one.  So a step is one call of two
# problems of c x c without a causal mask, on every chip.


class _Arrived(NamedTuple):
    """What travels around the ring: of the tokens of one chip."""

    k_BTKH: jax.Array
    v_BTKH: jax.Array
    segment_BT: jax.Array


def _send_on(tree: Any) -> Any:
    """Sends arrays to the next chip, and returns those of the one before."""
    return jax.tree.map(lambda x: island.send_to_next(x, "seq"), tree)


def _come_from_before(step: jax.Array) -> jax.Array:
    """Whether the keys of a step are those of a chip with a lower number, bool scalar."""
    return step <= island.shard_index("seq")


def _pairs_of_queries(is_before: jax.Array, x_BT: jax.Array) -> jax.Array:
    """Returns [2 B, c, ...]: the late chunk's, and those that the second problem is about."""
    early, late = context.halves(x_BT)
    return jnp.concatenate([late, jnp.where(is_before, early, late)])


def _pairs_of_keys(is_before: jax.Array, x_BT: jax.Array) -> jax.Array:
    """As `_pairs_of_queries`, of the keys: the early chunk's, and the second problem's."""
    early, late = context.halves(x_BT)
    return jnp.concatenate([early, jnp.where(is_before, early, late)])


def _sum_of_queries(is_before: jax.Array, pairs: jax.Array) -> jax.Array:
    """Transpose of `_pairs_of_queries`."""
    late, second = jnp.split(pairs, 2)
    zero = jnp.zeros_like(second)
    early = jnp.where(is_before, second, zero)
    return jnp.concatenate([early, late + jnp.where(is_before, zero, second)], axis=1)


def _sum_of_keys(is_before: jax.Array, pairs: jax.Array) -> jax.Array:
    """Transpose of `_pairs_of_keys`."""
    early, second = jnp.split(pairs, 2)
    zero = jnp.zeros_like(second)
    late = jnp.where(is_before, zero, second)
    return jnp.concatenate([early + jnp.where(is_before, second, zero), late], axis=1)


def _merge(out_BTNH, lse_BTN, new_BTNH, new_lse_BTN):
    """Merges the results over two sets of keys; all float32."""
    lse = jnp.logaddexp(lse_BTN, new_lse_BTN)
    finite = jnp.where(jnp.isneginf(lse), 0.0, lse)
    shares = (jnp.exp(x - finite)[..., None] for x in (lse_BTN, new_lse_BTN))
    return sum(x * share for x, share in zip((out_BTNH, new_BTNH), shares, strict=True)), lse


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(options, q_BTNH, k_BTKH, v_BTKH, segment_BT):
    return _ring_fwd(options, q_BTNH, k_BTKH, v_BTKH, segment_BT)[0]


def _ring_fwd(options, q_BTNH, k_BTKH, v_BTKH, segment_BT):
    attend = functools.partial(flash_attention, with_lse=True, **dict(options))

    def step(carry, number):
        arrived, out_BTNH, lse_BTN = carry
        is_before = _come_from_before(number)
        # The next keys travel while these are attended to.
        following = _send_on(arrived)
        queries = functools.partial(_pairs_of_queries, is_before)
        k, v, segment = (_pairs_of_keys(is_before, x) for x in arrived)
        out, lse = attend(queries(q_BTNH), k, v, queries(segment_BT), segment, causal=False)
        lse = lse.swapaxes(1, 2)
        for index in range(2):
            # The problems one after the other: both may be about the late chunk.
            part, part_lse = jnp.split(out, 2)[index], jnp.split(lse, 2)[index]
            is_early = is_before & (index == 1)
            part = jnp.concatenate([part, part], axis=1).astype(jnp.float32)
            hidden = jnp.full_like(part_lse, -jnp.inf)
            part_lse = jnp.concatenate(
                [jnp.where(is_early, part_lse, hidden), jnp.where(is_early, hidden, part_lse)],
                axis=1,
            )
            out_BTNH, lse_BTN = _merge(out_BTNH, lse_BTN, part, part_lse)
        return (following, out_BTNH, lse_BTN), None

    own = _Arrived(k_BTKH, v_BTKH, segment_BT)
    first = _send_on(own)
    out_BTNH, lse_BNT = attend(q_BTNH, k_BTKH, v_BTKH, segment_BT, segment_BT)
    carry = (first, out_BTNH.astype(jnp.float32), lse_BNT.swapaxes(1, 2))
    (_, out_BTNH, lse_BTN), _ = jax.lax.scan(step, carry, jnp.arange(1, island.num_shards("seq")))
    # Kept by a remat policy that keeps attention's result: the backward pass reads both.
    out_BTNH, lse_BTN = (
        checkpoint_name(x, "attended") for x in (out_BTNH.astype(q_BTNH.dtype), lse_BTN)
    )
    return out_BTNH, (q_BTNH, own, out_BTNH, lse_BTN)


def _ring_bwd(options, residuals, dout_BTNH):
    q_BTNH, own, out_BTNH, lse_BTN = residuals
    gradients = functools.partial(attention_gradients, **dict(options))

    def step(carry, number):
        arrived, dkv, dq_BTNH = carry
        is_before = _come_from_before(number)
        following = _send_on(arrived)
        k, v, segment = (_pairs_of_keys(is_before, x) for x in arrived)
        q, query_segment, out, lse, dout = (
            _pairs_of_queries(is_before, x)
            for x in (q_BTNH, own.segment_BT, out_BTNH, lse_BTN, dout_BTNH)
        )
        dq, *new = gradients(
            *(q, k, v, query_segment, segment, out, lse.swapaxes(1, 2), dout), causal=False
        )
        dq_BTNH = dq_BTNH + _sum_of_queries(is_before, dq.astype(jnp.float32))
        dkv = [
            x + _sum_of_keys(is_before, dx.astype(jnp.float32))
            for x, dx in zip(_send_on(dkv), new, strict=True)
        ]
        return (following, dkv, dq_BTNH), None

    first = _send_on(own)
    lse_BNT = lse_BTN.swapaxes(1, 2)
    segments = (own.segment_BT, own.segment_BT)
    dq_BTNH, *dkv = (
        x.astype(jnp.float32)
        for x in gradients(q_BTNH, own.k_BTKH, own.v_BTKH, *segments, out_BTNH, lse_BNT, dout_BTNH)
    )
    # The gradients of a chip's keys travel behind them, and one step further, home.
    steps = jnp.arange(1, island.num_shards("seq"))
    (_, dkv, dq_BTNH), _ = jax.lax.scan(step, (first, dkv, dq_BTNH), steps)
    dk_BTKH, dv_BTKH = (x.astype(q_BTNH.dtype) for x in _send_on(dkv))
    no_gradient = np.zeros(own.segment_BT.shape, jax.dtypes.float0)
    return dq_BTNH.astype(q_BTNH.dtype), dk_BTKH, dv_BTKH, no_gradient


_ring.defvjp(_ring_fwd, _ring_bwd)
