"""flash_attention on TPUs: scores are computed transposed, keys in sublanes and queries in lanes.

Scores^T[bk, bq] = k[bk, H] q^T[H, bq], so softmax statistics are lane vectors [1, bq] reduced over
sublanes, and out^T[H, bq] = v^T[H, bk] weights^T[bk, bq] streams H through the matrix unit, where
a multiple of 8 costs nothing extra; only the contraction over H in the scores is padded to the
matrix unit's size.  q, out and their gradients lie in memory as [.., H, T].

Letters: B batch, T queries, S keys, N query heads, K kv heads, H head dim; G query heads that
share one block of keys, J = N / (K G) such groups of a kv head, Z = K J groups in all; bq, bk
queries and keys of a block.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import chips, select
from pallas_kernels.flash_attention import dropout
from pallas_kernels.flash_attention.reference import (
    Settings,
    is_visible,
    lead_of,
    zero_padding,
)

_MASKED = -1e30  # swallows any score in float32
_LOG2E = math.log2(math.e)
_LANES = 128


@dataclasses.dataclass(frozen=True)
class Config:
    """Block sizes, multiples of 128.

    block_q, block_k: queries and keys of a block in the forward kernel.
    block_q_backward, block_k_backward: the same in the backward kernel.
    slice_k, slice_k_backward: keys of one matrix product.  The products of the next slice are
      issued before the softmax of this one, which keeps matrix and vector units busy together.
    heads: most query heads that share a block of keys.
    """

    block_q: int = 512
    block_k: int = 1024
    block_q_backward: int = 512
    block_k_backward: int = 1024
    slice_k: int = 128
    slice_k_backward: int = 128
    heads: int = 16


# Found 2026-11-23 by static cycles (bench.py) at head dim 80, libtpu 0.0.50.1; never run on a
# chip.  tpu7x cannot be profiled and takes v6e's, whose matrix units have the same size.
CONFIGS = {
    "v5e": Config(),
    "v5p": Config(),
    "v6e": Config(block_q=1024, slice_k=256, slice_k_backward=256),
    "tpu7x": Config(block_q=1024, slice_k=256, slice_k_backward=256),
}


class Problem(NamedTuple):
    """Static arguments of one call.

    vmem_bytes: vector memory of the chip.
    num_queries, num_keys: T and S before padding to whole blocks.

    `places` below are int32 [2]: the indices of query 0 among the keys and in its sequence.
    """

    settings: Settings
    config: Config
    vmem_bytes: int
    num_queries: int
    num_keys: int
    interpret: object

    @property
    def exp2_factor(self) -> float:
        """What turns a product q k into an exponent of 2."""
        return self.settings.scale * _LOG2E


def refuse(device_kind: str, q_BTNH, k_BSKH, settings: Settings) -> str | None:
    """Returns why this cannot run on the device, or None; see `select.choose`."""
    del k_BSKH, settings
    reason = select.only_on("TPU", device_kind) or select.refuse_head_dim(q_BTNH.shape[-1])
    chip = chips.of_device(device_kind)
    is_known = chip is not None and chip.name in CONFIGS
    return reason or (None if is_known else f"has no block sizes for {device_kind}")


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    query_segment_BT: jax.Array,
    key_segment_BS: jax.Array,
    seed_BN: jax.Array,
    settings: Settings,
    offset: jax.Array | None = None,
    *,
    device_kind: str,
    interpret: object = False,
    config: Config | None = None,
) -> tuple[jax.Array, jax.Array]:
    """As `reference.attention`; `config` is that of the chip if None."""
    B, T, N, H = q_BTNH.shape
    problem = _problem(q_BTNH, k_BSKH, settings, device_kind, interpret, config)
    segments = (query_segment_BT, key_segment_BS)
    arrays = _laid_out(problem, q_BTNH, k_BSKH, v_BSKH, *segments)
    out_BZGHT, lse_BZGT = _attend(problem, *arrays, seed_BN, offset)
    out_BTNH = out_BZGHT.reshape(B, N, H, -1).transpose(0, 3, 1, 2)[:, :T]
    return out_BTNH, lse_BZGT.reshape(B, N, -1)[:, :, :T]


def gradients(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    query_segment_BT: jax.Array,
    key_segment_BS: jax.Array,
    out_BTNH: jax.Array,
    lse_BNT: jax.Array,
    dout_BTNH: jax.Array,
    settings: Settings,
    *,
    device_kind: str,
    interpret: object = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `reference.gradients`."""
    (B, T, N, H), S = q_BTNH.shape, k_BSKH.shape[1]
    problem = _problem(q_BTNH, k_BSKH, settings, device_kind, interpret)
    segments = (query_segment_BT, key_segment_BS)
    q_BZGHT, *keys_segments = _laid_out(problem, q_BTNH, k_BSKH, v_BSKH, *segments)
    out_BZGHT, dout_BZGHT = (
        _queries_laid_out(problem, x, q_BZGHT.shape[2]) for x in (out_BTNH, dout_BTNH)
    )
    lse_BNT = jnp.pad(
        lse_BNT, ((0, 0), (0, 0), (0, q_BZGHT.shape[-1] - T)), constant_values=-jnp.inf
    )
    lse_BZGT = lse_BNT.reshape(*q_BZGHT.shape[:3], -1)
    no_seeds_BN = jnp.zeros((B, N), jnp.uint32)
    dq_BZGHT, dk_BKSH, dv_BKSH = _backward(
        problem,
        q_BZGHT,
        *keys_segments,
        no_seeds_BN,
        None,
        out_BZGHT,
        lse_BZGT,
        dout_BZGHT,
        jnp.zeros_like(lse_BZGT),
    )
    dq_BTNH = dq_BZGHT.reshape(B, N, H, -1).transpose(0, 3, 1, 2)[:, :T]
    return dq_BTNH, dk_BKSH.swapaxes(1, 2)[:, :S], dv_BKSH.swapaxes(1, 2)[:, :S]


def _problem(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    settings: Settings,
    device_kind: str,
    interpret: object,
    config: Config | None = None,
) -> Problem:
    T, S = q_BTNH.shape[1], k_BSKH.shape[1]
    chip = chips.of_device(device_kind)
    config = _fitted(config or CONFIGS[chip.name], T, S)
    return Problem(settings, config, chip.vmem_bytes, T, S, interpret)


def _laid_out(
    problem: Problem,
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    query_segment_BT: jax.Array,
    key_segment_BS: jax.Array,
) -> tuple[jax.Array, ...]:
    """Returns (q [B, Z, G, H, T], k and v [B, K, S, H], segments) in whole blocks, with zeros in
    the padding.
    """
    config, num_groups = problem.config, q_BTNH.shape[2] // k_BSKH.shape[2]
    G = max(g for g in range(1, config.heads + 1) if num_groups % g == 0)
    q_BTNH = zero_padding(q_BTNH, query_segment_BT)
    k_BSKH, v_BSKH = zero_padding(k_BSKH, key_segment_BS), zero_padding(v_BSKH, key_segment_BS)
    k_BSKH, v_BSKH, key_segment_BS = (
        _pad(x, math.lcm(config.block_k, config.block_k_backward))
        for x in (k_BSKH, v_BSKH, key_segment_BS)
    )
    return (
        _queries_laid_out(problem, q_BTNH, G),
        k_BSKH.swapaxes(1, 2),
        v_BSKH.swapaxes(1, 2),
        _pad(query_segment_BT, _queries_of_blocks(problem)),
        key_segment_BS,
    )


def _queries_laid_out(problem: Problem, x_BTNH: jax.Array, G: int) -> jax.Array:
    """Returns [B, Z, G, H, T] of queries, or of what has their shape, in whole blocks."""
    B, _, N, H = x_BTNH.shape
    x_BTNH = _pad(x_BTNH, _queries_of_blocks(problem))
    return x_BTNH.transpose(0, 2, 3, 1).reshape(B, N // G, G, H, -1)


def _queries_of_blocks(problem: Problem) -> int:
    """Returns the number of queries that whole blocks of both passes have a multiple of."""
    return math.lcm(problem.config.block_q, problem.config.block_q_backward)


def _fitted(config: Config, T: int, S: int) -> Config:
    """Shortens blocks to the arrays, in whole slices.

    libtpu fails on some other sizes for v6e, such as blocks of 384.
    """
    size = math.lcm(_LANES, config.slice_k, config.slice_k_backward)
    T, S = (-(-length // size) * size for length in (T, S))
    return dataclasses.replace(
        config,
        block_q=min(config.block_q, T),
        block_k=min(config.block_k, S),
        block_q_backward=min(config.block_q_backward, T),
        block_k_backward=min(config.block_k_backward, S),
    )


def _pad(x_BT: jax.Array, multiple: int) -> jax.Array:
    """Pads dim 1 with zeros to a multiple."""
    return jnp.pad(x_BT, ((0, 0), (0, -x_BT.shape[1] % multiple), *((0, 0),) * (x_BT.ndim - 2)))


class Visits(NamedTuple):
    """The blocks of keys that each block of queries visits, or the other way around.

    All are int32 and 1-D over (batch, block), for scalar memory.
    first, last: range of blocks that may have visible pairs; last < first if there are none.
    full_first, full_last: range within it in which every pair is visible.
    """

    first: jax.Array
    last: jax.Array
    full_first: jax.Array
    full_last: jax.Array

    def block(self, row: jax.Array, step: jax.Array) -> jax.Array:
        """Returns the block to load at a step: after the last one the same again, which loads
        nothing.
        """
        first = self.first[row]
        return jnp.minimum(first + step, jnp.maximum(self.last[row], first))


def visits(
    problem: Problem,
    query_segment_BT: jax.Array,
    key_segment_BS: jax.Array,
    offset: jax.Array | None,
    block_q: int,
    block_k: int,
) -> tuple[Visits, Visits, int, int]:
    """Returns (visits by block of queries, visits by block of keys, most steps of each)."""
    may_qk, all_qk = _causal_visibility(
        problem,
        lead_of(offset, problem.num_queries, problem.num_keys),
        query_segment_BT.shape[1] // block_q,
        key_segment_BS.shape[1] // block_k,
        block_q,
        block_k,
    )
    low_Bq, high_Bq, is_one_Bq = _segment_range(query_segment_BT, block_q)
    low_Bk, high_Bk, is_one_Bk = _segment_range(key_segment_BS, block_k)
    low_Bq1, high_Bq1, is_one_Bq1 = low_Bq[:, :, None], high_Bq[:, :, None], is_one_Bq[:, :, None]
    low_B1k, high_B1k, is_one_B1k = low_Bk[:, None], high_Bk[:, None], is_one_Bk[:, None]
    may_Bqk = may_qk & (low_Bq1 <= high_B1k) & (low_B1k <= high_Bq1)
    all_Bqk = all_qk & is_one_Bq1 & is_one_B1k & (low_Bq1 == low_B1k)
    num_steps = (
        [int(may_qk.sum(axis).max(initial=1)) for axis in (1, 0)]
        if offset is None
        else may_qk.shape[::-1]
    )
    return (
        _ranges(may_Bqk, all_Bqk),
        _ranges(may_Bqk.swapaxes(1, 2), all_Bqk.swapaxes(1, 2)),
        *num_steps,
    )


def _causal_visibility(
    problem: Problem, lead: jax.Array | int, num_q: int, num_k: int, block_q: int, block_k: int
) -> tuple[np.ndarray | jax.Array, np.ndarray | jax.Array]:
    """Returns bool [q, k] twice: whether causality shows any, and every pair of two blocks."""
    low_q1 = np.arange(num_q)[:, None] * block_q + lead
    high_q1 = low_q1 + block_q - 1
    low_k, high_k = np.arange(num_k) * block_k, np.arange(1, num_k + 1) * block_k - 1
    may_qk = np.ones((num_q, num_k), bool)
    all_qk = may_qk.copy()
    if problem.settings.causal:
        may_qk &= low_k <= high_q1
        all_qk &= high_k <= low_q1
    return may_qk, all_qk


def _segment_range(segment_BT: jax.Array, block: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns (lowest document, highest document, whether all slots have it), each [B, blocks].

    A block of padding only has lowest > highest.
    """
    segment_Bnb = segment_BT.reshape(segment_BT.shape[0], -1, block)
    low_Bn = jnp.where(segment_Bnb > 0, segment_Bnb, np.iinfo(np.int32).max).min(-1)
    high_Bn = segment_Bnb.max(-1)
    return low_Bn, high_Bn, segment_Bnb.min(-1) == high_Bn


def _ranges(may_Brc: jax.Array, all_Brc: jax.Array) -> Visits:
    """Returns each row's range of columns with any pair, and first run with every pair."""
    column = jnp.arange(may_Brc.shape[2], dtype=jnp.int32)
    num = np.int32(column.shape[0])
    first = jnp.where(may_Brc, column, num).min(-1)
    last = jnp.where(may_Brc, column, -1).max(-1)
    full_first = jnp.where(all_Brc, column, num).min(-1)
    full_last = jnp.where(~all_Brc & (column > full_first[..., None]), column, num).min(-1) - 1
    return Visits(
        *(x.reshape(-1) for x in (jnp.where(last < 0, 0, first), last, full_first, full_last))
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(problem, q_BZGHT, k_BKSH, v_BKSH, query_segment_BT, key_segment_BS, seed_BN, offset):
    """Returns (out [B, Z, G, H, T], log-sum-exp [B, Z, G, T]); T and S are whole blocks."""
    segments = (query_segment_BT, key_segment_BS)
    return _forward(problem, q_BZGHT, k_BKSH, v_BKSH, *segments, seed_BN, offset)


def _attend_fwd(problem, *arrays):
    out_BZGHT, lse_BZGT = _forward(problem, *arrays)
    return (out_BZGHT, lse_BZGT), (*arrays, out_BZGHT, lse_BZGT)


def _attend_bwd(problem, residuals, gradients):
    return *_backward(problem, *residuals, *gradients), None, None, None, None


_attend.defvjp(_attend_fwd, _attend_bwd)


def _dot(a, b, a_dim: int, b_dim: int):
    """Contracts one dim of each, accumulating in float32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a,
        b,
        (((a_dim,), (b_dim,)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )


def _places(problem: Problem, offset: jax.Array | None) -> jax.Array:
    """Returns the `places` of `Problem`."""
    lead = lead_of(offset, problem.num_queries, problem.num_keys)
    return jnp.stack([jnp.int32(lead), jnp.int32(0 if offset is None else offset)])


def _mask(problem: Problem, lead, query_block, key_block, query_segment_1q, key_segment_1k):
    """Returns float32 [bk, bq], 0 where visible, else _MASKED."""
    bq, bk = query_segment_1q.shape[1], key_segment_1k.shape[1]
    # From lanes into sublanes.
    key_segment_kq = jnp.broadcast_to(
        jnp.broadcast_to(key_segment_1k, (_LANES, bk)).T[:, :1], (bk, bq)
    )
    key_kq = key_block * bk + jax.lax.broadcasted_iota(jnp.int32, (bk, bq), 0)
    position_kq = query_block * bq + lead + jax.lax.broadcasted_iota(jnp.int32, (bk, bq), 1)
    visible_kq = is_visible(
        position_kq,
        key_kq,
        query_segment_1q,
        key_segment_kq,
        problem.settings.causal,
    )
    return jnp.where(visible_kq, 0.0, _MASKED)


def _mask_and_kept(
    problem: Problem,
    is_masked,
    places_ref,
    query_block,
    key_block,
    query_segment_ref,
    key_segment_ref,
    seed,
):
    """Returns (mask_kq, kept) for `forward_step`; seed: head -> its dropout seed."""
    bq, bk = query_segment_ref.shape[1], key_segment_ref.shape[1]
    mask_kq = (
        _mask(
            problem,
            places_ref[0],
            query_block,
            key_block,
            query_segment_ref[...],
            key_segment_ref[...],
        )
        if is_masked
        else None
    )

    def kept(g, keys):
        first_key, num_keys = key_block * bk + keys.start, keys.stop - keys.start
        key_k1 = first_key + jax.lax.broadcasted_iota(jnp.int32, (num_keys, 1), 0)
        first_query = query_block * bq + places_ref[1]
        query_1q = first_query + jax.lax.broadcasted_iota(jnp.int32, (1, bq), 1)
        return dropout.is_kept(
            seed(g).astype(jnp.uint32), query_1q, key_k1, problem.settings.dropout_rate
        )

    return mask_kq, kept


def _when_visible(visits: Visits, row, block, step):
    """Runs step(is_masked) if the block is to be visited; unmasked if every pair is visible."""
    is_full = (visits.full_first[row] <= block) & (block <= visits.full_last[row])
    is_visited = block <= visits.last[row]
    pl.when(is_visited & is_full)(lambda: step(False))
    pl.when(is_visited & ~is_full)(lambda: step(True))


def _forward(problem, q_BZGHT, k_BKSH, v_BKSH, query_segment_BT, key_segment_BS, seed_BN, offset):
    (B, Z, G, H, T), K = q_BZGHT.shape, k_BKSH.shape[1]
    bq, bk, J = problem.config.block_q, problem.config.block_k, np.int32(Z // K)
    table, _, num_steps, _ = visits(problem, query_segment_BT, key_segment_BS, offset, bq, bk)
    num_q = T // bq

    def at_query(*dims):
        return pl.BlockSpec(
            (None, None, *dims, bq), lambda b, z, i, j, *_: (b, z, *(0,) * len(dims), i)
        )

    def key_index(b, i, j, prefetched):
        return Visits(*prefetched[:4]).block(b * num_q + i, j)

    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=6,
        grid=(B, Z, num_q, num_steps),
        in_specs=[
            at_query(G, H),
            pl.BlockSpec(
                (None, None, bk, H),
                lambda b, z, i, j, *pre: (b, jax.lax.div(z, J), key_index(b, i, j, pre), 0),
            ),
            pl.BlockSpec(
                (None, None, H, bk),
                lambda b, z, i, j, *pre: (b, jax.lax.div(z, J), 0, key_index(b, i, j, pre)),
            ),
            pl.BlockSpec((None, 1, bq), lambda b, z, i, j, *_: (b, 0, i)),
            pl.BlockSpec((None, 1, bk), lambda b, z, i, j, *pre: (b, 0, key_index(b, i, j, pre))),
        ],
        out_specs=[at_query(G, H), at_query(G, 1)],
        scratch_shapes=[pltpu.VMEM((G, H, bq), jnp.float32)]
        + [pltpu.VMEM((G, 1, bq), jnp.float32)] * 2,
    )
    out_BZGHT, lse_BZG1T = pl.pallas_call(
        functools.partial(_forward_kernel, problem=problem),
        grid_spec=grid_spec,
        out_shape=[
            jax.ShapeDtypeStruct(q_BZGHT.shape, q_BZGHT.dtype),
            jax.ShapeDtypeStruct((B, Z, G, 1, T), jnp.float32),
        ],
        compiler_params=_compiler_params(problem, "parallel"),
        cost_estimate=_cost(problem, q_BZGHT, k_BKSH, num_products=2),
        interpret=problem.interpret,
        name="flash_attention_forward",
    )(
        *table,
        _flat(seed_BN),
        _places(problem, offset),
        q_BZGHT,
        k_BKSH,
        v_BKSH.swapaxes(2, 3),
        query_segment_BT[:, None],
        key_segment_BS[:, None],
    )
    return out_BZGHT, lse_BZG1T[:, :, :, 0]


def _flat(seed_BN):
    """Returns the seeds as int32 [B * N], which a TPU can prefetch."""
    return jax.lax.bitcast_convert_type(seed_BN, jnp.int32).reshape(-1)


def _cost(problem: Problem, q_BZGHT, k_BKSH, num_products: int) -> pl.CostEstimate:
    """Returns the kernel's cost for XLA's scheduler; pairs hidden by segments count."""
    num_scores = (
        q_BZGHT.size // q_BZGHT.shape[3] * k_BKSH.shape[2] // (2 if problem.settings.causal else 1)
    )
    num_bytes = num_products * (q_BZGHT.size + k_BKSH.size) * q_BZGHT.dtype.itemsize
    return pl.CostEstimate(
        flops=2 * num_products * q_BZGHT.shape[3] * num_scores,
        bytes_accessed=num_bytes,
        transcendentals=num_scores,
    )


def _compiler_params(problem: Problem, third: str):
    # The compiler wants room of its own: at 7/8 v5p ran out although the blocks need 10 MB.
    semantics = ("parallel", "parallel", third, "arbitrary")
    return pltpu.CompilerParams(
        dimension_semantics=semantics, vmem_limit_bytes=problem.vmem_bytes // 2
    )


def _forward_kernel(*refs, problem: Problem):
    (
        *table,
        seed_ref,
        places_ref,
        q_ref,
        k_ref,
        v_ref,
        query_segment_ref,
        key_segment_ref,
        out_ref,
        lse_ref,
        sum_ref,
        max_ref,
        norm_ref,
    ) = refs
    table = Visits(*table)
    G = q_ref.shape[0]
    b, z, i, j = (pl.program_id(dim) for dim in range(4))
    row = b * pl.num_programs(2) + i
    block = table.first[row] + j

    def seed(g):
        return seed_ref[(b * pl.num_programs(1) + z) * G + g]

    @pl.when(j == 0)
    def _():
        sum_ref[...] = jnp.zeros(sum_ref.shape, jnp.float32)
        max_ref[...] = jnp.full(max_ref.shape, _MASKED, jnp.float32)
        norm_ref[...] = jnp.zeros(norm_ref.shape, jnp.float32)

    def step(is_masked):
        mask_and_kept = _mask_and_kept(
            problem, is_masked, places_ref, i, block, query_segment_ref, key_segment_ref, seed
        )
        forward_step(problem, q_ref, k_ref, v_ref, sum_ref, max_ref, norm_ref, *mask_and_kept)

    _when_visible(table, row, block, step)

    @pl.when(j == pl.num_programs(3) - 1)
    def _():
        # A query whose keys were all hidden has summed masked scores, if anything.
        has_keys_G1q = max_ref[...] > _MASKED / 2
        norm_G1q = jnp.where(has_keys_G1q, norm_ref[...], 1.0)
        factor_G1q = jnp.where(
            has_keys_G1q, 1 / ((1 - problem.settings.dropout_rate) * norm_G1q), 0.0
        )
        out_ref[...] = (sum_ref[...] * factor_G1q).astype(out_ref.dtype)
        lse_G1q = max_ref[...] * (problem.exp2_factor / _LOG2E) + jnp.log(norm_G1q)
        lse_ref[...] = jnp.where(has_keys_G1q, lse_G1q, -jnp.inf)


def _slices(length: int, size: int) -> list[slice]:
    """Cuts 0..length-1 into slices of `size`, which divides it."""
    return [slice(start, start + size) for start in range(0, length, size)]


def forward_step(
    problem: Problem, q_ref, k_ref, v_ref, sum_ref, max_ref, norm_ref, mask_kq=None, kept=None
):
    """Attends with one block of queries of all G heads to one block of keys.

    Args:
      q_ref: [G, H, bq].
      k_ref, v_ref: [bk, H] and [H, bk].
      sum_ref, max_ref, norm_ref: float32 [G, H, bq], [G, 1, bq] and [G, 1, bq], updated: weighted
        sum of values, highest score, sum of weights.
      mask_kq: added to the scores, or None.
      kept: (head, slice of keys) -> bool [slice, bq], False where dropped; called with dropout.
    """
    G = q_ref.shape[0]
    slices = _slices(k_ref.shape[0], problem.config.slice_k)

    def scores(g, keys):
        return _dot(k_ref[keys], q_ref[g], 1, 0)

    def head(g, scores_kq):
        max_1q, norm_1q = max_ref[g], norm_ref[g]
        for keys, next_keys in zip(slices, [*slices[1:], None], strict=True):
            next_scores_kq = (
                scores(g, next_keys) if next_keys else scores(jnp.minimum(g + 1, G - 1), slices[0])
            )
            if mask_kq is not None:
                scores_kq += mask_kq[keys]
            old_max_1q, max_1q = max_1q, jnp.maximum(max_1q, scores_kq.max(0, keepdims=True))
            weights_kq = jnp.exp2((scores_kq - max_1q) * problem.exp2_factor)
            decay_1q = jnp.exp2((old_max_1q - max_1q) * problem.exp2_factor)
            norm_1q = norm_1q * decay_1q + weights_kq.sum(0, keepdims=True)
            if problem.settings.dropout_rate:
                weights_kq = jnp.where(kept(g, keys), weights_kq, 0.0)
            v_Hk = v_ref[:, keys]
            sum_ref[g] = sum_ref[g] * decay_1q + _dot(v_Hk, weights_kq.astype(v_Hk.dtype), 1, 0)
            scores_kq = next_scores_kq
        max_ref[g], norm_ref[g] = max_1q, norm_1q
        return scores_kq

    jax.lax.fori_loop(0, G, head, scores(0, slices[0]))


def _backward(
    problem,
    q_BZGHT,
    k_BKSH,
    v_BKSH,
    query_segment_BT,
    key_segment_BS,
    seed_BN,
    offset,
    out_BZGHT,
    lse_BZGT,
    dout_BZGHT,
    dlse_BZGT,
):
    """Returns the gradients of q, k and v in their layouts."""
    (B, Z, G, H, _), (_, K, S, _) = q_BZGHT.shape, k_BKSH.shape
    bq, bk, J = problem.config.block_q_backward, problem.config.block_k_backward, np.int32(Z // K)
    _, table, _, num_steps = visits(problem, query_segment_BT, key_segment_BS, offset, bq, bk)
    num_k = S // bk

    # A query without keys has weights of 2^-1e30 = 0, and its gradients, which may be NaN, are not
    # used.
    has_keys_BZGT = ~jnp.isneginf(lse_BZGT)
    delta_BZGT = (out_BZGHT.astype(jnp.float32) * dout_BZGHT.astype(jnp.float32)).sum(
        3
    ) - dlse_BZGT
    delta_BZGT = jnp.where(has_keys_BZGT, delta_BZGT, 0.0)
    lse2_BZGT = jnp.where(has_keys_BZGT, lse_BZGT * _LOG2E, -_MASKED)
    dout_BZGHT = jnp.where(
        has_keys_BZGT[:, :, :, None], dout_BZGHT, jnp.zeros((), dout_BZGHT.dtype)
    )

    def query_index(b, i, j, prefetched):
        return Visits(*prefetched[:4]).block(b * num_k + i, j)

    def at_query(*dims):
        return pl.BlockSpec(
            (None, None, *dims, bq),
            lambda b, z, i, j, *pre: (b, z, *(0,) * len(dims), query_index(b, i, j, pre)),
        )

    in_hbm = pl.BlockSpec(memory_space=pl.ANY)
    by_rows = pl.BlockSpec(
        (None, None, bk, H), lambda b, z, i, j, *_: (b, jax.lax.div(z, J), i, 0)
    )
    gradient_spec = pl.BlockSpec((None, None, H, bk), lambda b, z, i, j, *_: (b, z, 0, i))
    gradient_shape = jax.ShapeDtypeStruct((B, Z, H, S), jnp.float32)
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=6,
        grid=(B, Z, num_k, num_steps),
        in_specs=[
            *(at_query(G, H), at_query(G, H), at_query(G, 1), at_query(G, 1)),
            *(
                by_rows,
                pl.BlockSpec(
                    (None, None, H, bk), lambda b, z, i, j, *_: (b, jax.lax.div(z, J), 0, i)
                ),
                by_rows,
            ),
            pl.BlockSpec(
                (None, 1, bq), lambda b, z, i, j, *pre: (b, 0, query_index(b, i, j, pre))
            ),
            pl.BlockSpec((None, 1, bk), lambda b, z, i, j, *_: (b, 0, i)),
            in_hbm,
        ],
        out_specs=[in_hbm, gradient_spec, gradient_spec],
        scratch_shapes=[pltpu.VMEM((G, H, bq), jnp.float32)] * 2
        + [pltpu.SMEM((1,), jnp.int32), pltpu.SemaphoreType.DMA],
    )
    k_BKHS = k_BKSH.swapaxes(2, 3)
    rows = (x[:, :, :, None] for x in (lse2_BZGT, delta_BZGT))
    segments = (query_segment_BT[:, None], key_segment_BS[:, None])
    inputs = (
        *table,
        _flat(seed_BN),
        _places(problem, offset),
        q_BZGHT,
        dout_BZGHT,
        *rows,
        k_BKSH,
        k_BKHS,
        v_BKSH,
        *segments,
        jnp.zeros(q_BZGHT.shape, jnp.float32),
    )
    dq_BZGHT, dk_BZHS, dv_BZHS = pl.pallas_call(
        functools.partial(_backward_kernel, problem=problem),
        grid_spec=grid_spec,
        out_shape=[
            jax.ShapeDtypeStruct(q_BZGHT.shape, jnp.float32),
            gradient_shape,
            gradient_shape,
        ],
        input_output_aliases={len(inputs) - 1: 0},
        compiler_params=_compiler_params(problem, "arbitrary"),
        cost_estimate=_cost(problem, q_BZGHT, k_BKSH, num_products=5),
        interpret=problem.interpret,
        name="flash_attention_backward",
    )(*inputs)
    scale = problem.settings.scale
    dk_BKSH, dv_BKSH = (
        x.reshape(B, K, -1, H, S).sum(2).swapaxes(2, 3) for x in (dk_BZHS * scale, dv_BZHS)
    )
    return (
        (dq_BZGHT * scale).astype(q_BZGHT.dtype),
        dk_BKSH.astype(k_BKSH.dtype),
        dv_BKSH.astype(v_BKSH.dtype),
    )


def _backward_kernel(*refs, problem: Problem):
    (
        *table,
        seed_ref,
        places_ref,
        q_ref,
        dout_ref,
        lse2_ref,
        delta_ref,
        k_ref,
        kt_ref,
        v_ref,
        query_segment_ref,
        key_segment_ref,
        _,
    ) = refs[:16]
    dq_hbm_ref, dk_ref, dv_ref, dq_ref, sum_ref, is_writing_ref, semaphore = refs[16:]
    table = Visits(*table)
    G, _, bq = q_ref.shape
    b, z, i, j = (pl.program_id(dim) for dim in range(4))
    row = b * pl.num_programs(2) + i
    block = table.first[row] + j

    def seed(g):
        return seed_ref[(b * pl.num_programs(1) + z) * G + g]

    in_hbm = dq_hbm_ref.at[b, z, :, :, pl.ds(pl.multiple_of(block * bq, _LANES), bq)]

    @pl.when(j == 0)
    def _():
        dk_ref[...] = jnp.zeros(dk_ref.shape, jnp.float32)
        dv_ref[...] = jnp.zeros(dv_ref.shape, jnp.float32)

    @pl.when((i == 0) & (j == 0))
    def _():
        is_writing_ref[0] = 0

    def finish_write():
        @pl.when(is_writing_ref[0] == 1)
        def _():
            pltpu.make_async_copy(sum_ref, in_hbm, semaphore).wait()
            is_writing_ref[0] = 0

    def step(is_masked):
        mask_and_kept = _mask_and_kept(
            problem, is_masked, places_ref, block, i, query_segment_ref, key_segment_ref, seed
        )
        # dq is summed over blocks of keys in HBM.  The first half of the heads hides the previous
        # step's write, the second half this step's read.
        refs = (q_ref, dout_ref, lse2_ref, delta_ref, k_ref, kt_ref, v_ref, dq_ref, dk_ref, dv_ref)
        half = (G + 1) // 2
        backward_step(problem, (0, half), *refs, *mask_and_kept)
        finish_write()
        read = pltpu.make_async_copy(in_hbm, sum_ref, semaphore)
        read.start()
        backward_step(problem, (half, G), *refs, *mask_and_kept)
        read.wait()
        sum_ref[...] += dq_ref[...]
        pltpu.make_async_copy(sum_ref, in_hbm, semaphore).start()
        is_writing_ref[0] = 1

    _when_visible(table, row, block, step)

    @pl.when((i == pl.num_programs(2) - 1) & (j == pl.num_programs(3) - 1))
    def _():
        finish_write()


def backward_step(
    problem: Problem,
    heads,
    q_ref,
    dout_ref,
    lse2_ref,
    delta_ref,
    k_ref,
    kt_ref,
    v_ref,
    dq_ref,
    dk_ref,
    dv_ref,
    mask_kq=None,
    kept=None,
):
    """Backward pass of one block of queries and one block of keys, for some heads.

    Args:
      heads: (first, end) of the G heads.
      q_ref, dout_ref: [G, H, bq].
      lse2_ref, delta_ref: float32 [G, 1, bq]: log-sum-exp to base 2; sum of out * dout minus the
        gradient of the log-sum-exp.
      k_ref, kt_ref, v_ref: [bk, H], [H, bk], [bk, H].
      dq_ref: float32 [G, H, bq], written.
      dk_ref, dv_ref: float32 [H, bk], added to.  dq and dk lack the factor `scale`.
      mask_kq, kept: as in forward_step.
    """
    settings = problem.settings
    slices = _slices(k_ref.shape[0], problem.config.slice_k_backward)

    def products(g, keys):
        return _dot(k_ref[keys], q_ref[g], 1, 0), _dot(v_ref[keys], dout_ref[g], 1, 0)

    def head(g, scores_dweights):
        q_Hq, dout_Hq, lse2_1q, delta_1q = q_ref[g], dout_ref[g], lse2_ref[g], delta_ref[g]
        dq_Hq = jnp.zeros(q_Hq.shape, jnp.float32)
        for keys, next_keys in zip(slices, [*slices[1:], None], strict=True):
            scores_kq, dweights_kq = scores_dweights
            scores_dweights = (
                products(g, next_keys)
                if next_keys
                else products(jnp.minimum(g + 1, heads[1] - 1), slices[0])
            )
            exponent_kq = scores_kq * problem.exp2_factor - lse2_1q
            weights_kq = jnp.exp2(exponent_kq if mask_kq is None else exponent_kq + mask_kq[keys])
            kept_weights_kq = weights_kq
            if settings.dropout_rate:
                factor_kq = jnp.where(kept(g, keys), 1 / (1 - settings.dropout_rate), 0.0)
                kept_weights_kq, dweights_kq = weights_kq * factor_kq, dweights_kq * factor_kq
            dscores_kq = weights_kq * (dweights_kq - delta_1q)
            kept_weights_kq, dscores_kq = (
                kept_weights_kq.astype(q_Hq.dtype),
                dscores_kq.astype(q_Hq.dtype),
            )
            dv_ref[:, keys] += _dot(dout_Hq, kept_weights_kq, 1, 1)
            dk_ref[:, keys] += _dot(q_Hq, dscores_kq, 1, 1)
            dq_Hq += _dot(kt_ref[:, keys], dscores_kq, 1, 0)
        dq_ref[g] = dq_Hq
        return scores_dweights

    if heads[0] < heads[1]:
        jax.lax.fori_loop(*heads, head, products(heads[0], slices[0]))
