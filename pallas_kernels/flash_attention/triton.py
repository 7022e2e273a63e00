"""Flash attention for NVIDIA GPUs in Pallas Triton, forward and backward; never ran on a GPU.

Letters: B batch, T queries, S keys, N query heads, K kv heads, G = N / K, H head dim.

Triton's blocks are powers of two, so a head dim that is none is cut into pieces that are: 80 = 64
+ 16.  A matrix product becomes several, and nothing is multiplied by padding.  XLA computes
beforehand which blocks of keys each block of queries visits, and which of those need no mask
(`ranges_of`).  The loops run over these ranges: a hidden block is neither loaded nor computed, and
the inner loop has no branch.  The backward pass recomputes the weights.  One kernel computes dq,
another dk and dv; the latter sums over the G query heads of a kv head and works on transposed
scores, as both of its products want them.

jax 0.12 warns that Pallas' Triton backend is deprecated whenever one of these kernels is lowered.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import select
from pallas_kernels.flash_attention import dropout
from pallas_kernels.flash_attention.reference import Settings, is_visible, zero_padding

_LOG2E = math.log2(math.e)
_MASKED = -1e30
_PIECE = 16  # Triton's smallest side of a matrix product


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Queries and keys of one kernel's blocks, its warps, and the loads it keeps in flight."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int


@dataclasses.dataclass(frozen=True)
class Config:
    """Blocks of the three kernels, chosen 2026-11 to fit Hopper's shared memory; not measured."""

    forward: Blocks
    dq: Blocks
    dkv: Blocks


_CONFIGS = {
    "bfloat16": Config(Blocks(128, 64, 8, 3), Blocks(128, 64, 8, 2), Blocks(64, 128, 8, 2)),
    "float32": Config(Blocks(64, 32, 4, 2), Blocks(32, 32, 4, 1), Blocks(32, 32, 4, 1)),
}


class _Problem(NamedTuple):
    """Static arguments of the kernels; `offset` is S - T before padding."""

    settings: Settings
    offset: int
    config: Config
    interpret: Any

    @property
    def kernels(self) -> tuple[Blocks, ...]:
        """Blocks of the forward pass, dq, and dk and dv."""
        return self.config.forward, self.config.dq, self.config.dkv


def refuse(
    device_kind: str, q_BTNH: jax.Array, k_BSKH: jax.Array, settings: Settings
) -> str | None:
    """Returns why this cannot serve the problem on the device, or None."""
    del k_BSKH
    if reason := select.only_on("NVIDIA", device_kind) or select.refuse_head_dim(q_BTNH.shape[-1]):
        return reason
    if settings.has_offset:
        return "takes no query offset"
    return (
        None
        if q_BTNH.shape[-1] <= 256
        else f"needs a head dim of at most 256, not {q_BTNH.shape[-1]}"
    )


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
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """As `reference.attention`."""
    del device_kind, offset
    return with_backward(
        _forward,
        q_BTNH,
        k_BSKH,
        v_BSKH,
        query_segment_BT,
        key_segment_BS,
        seed_BN,
        settings,
        interpret,
    )


def with_backward(
    forward, q_BTNH, k_BSKH, v_BSKH, query_segment_BT, key_segment_BS, seed_BN, settings, interpret
):
    """Returns `attention` computed by `forward`, with this file's backward pass.

    forward: (*arrays padded to whole blocks, problem) -> (out, lse).
    """
    _, T, _, H = q_BTNH.shape
    problem = _problem(q_BTNH, k_BSKH, settings, interpret)
    arrays = _padded(problem, q_BTNH, k_BSKH, v_BSKH, query_segment_BT, key_segment_BS)
    out_BTNH, lse_BNT = _attention(*arrays, seed_BN, problem, forward)
    return out_BTNH[:, :T, :, :H], lse_BNT[:, :, :T]


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
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `reference.gradients`."""
    del device_kind
    (B, T, N, H), S = q_BTNH.shape, k_BSKH.shape[1]
    problem = _problem(q_BTNH, k_BSKH, settings, interpret)
    segments = (query_segment_BT, key_segment_BS)
    arrays = _padded(problem, q_BTNH, k_BSKH, v_BSKH, *segments)
    multiple = max(blocks.queries for blocks in problem.kernels)
    (out_BTNH, _), (dout_BTNH, _) = (
        _pad(x, query_segment_BT, multiple) for x in (out_BTNH, dout_BTNH)
    )
    missing = ((0, 0), (0, 0), (0, arrays[0].shape[1] - T))
    lse_BNT = jnp.pad(lse_BNT, missing, constant_values=-jnp.inf)
    residuals = (*arrays, jnp.zeros((B, N), jnp.uint32), out_BTNH, lse_BNT)
    cotangents = (dout_BTNH, jnp.zeros_like(lse_BNT))
    dq_BTNH, dk_BSKH, dv_BSKH, *_ = _attention_bwd(problem, None, residuals, cotangents)
    return dq_BTNH[:, :T, :, :H], dk_BSKH[:, :S, :, :H], dv_BSKH[:, :S, :, :H]


def _problem(q_BTNH: jax.Array, k_BSKH: jax.Array, settings: Settings, interpret: Any) -> _Problem:
    config = _CONFIGS[jnp.dtype(q_BTNH.dtype).name]
    return _Problem(settings, k_BSKH.shape[1] - q_BTNH.shape[1], config, interpret)


def _padded(
    problem: _Problem,
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    query_segment_BT: jax.Array,
    key_segment_BS: jax.Array,
) -> tuple[jax.Array, ...]:
    """Returns the arrays with slots for whole blocks of all kernels, see `_pad`."""
    q_BTNH, query_segment_BT = _pad(
        q_BTNH, query_segment_BT, max(blocks.queries for blocks in problem.kernels)
    )
    keys = max(blocks.keys for blocks in problem.kernels)
    (k_BSKH, _), (v_BSKH, key_segment_BS) = (
        _pad(k_BSKH, key_segment_BS, keys),
        _pad(v_BSKH, key_segment_BS, keys),
    )
    return q_BTNH, k_BSKH, v_BSKH, query_segment_BT, key_segment_BS


def _pad(x_BTNH: jax.Array, segment_BT: jax.Array, multiple: int) -> tuple[jax.Array, jax.Array]:
    """Zeroes the padding and adds more, to a multiple of slots and a head dim of 16's multiple."""
    _, T, _, H = x_BTNH.shape
    more = -T % multiple
    x_BTNH = jnp.pad(
        zero_padding(x_BTNH, segment_BT), ((0, 0), (0, more), (0, 0), (0, -H % _PIECE))
    )
    return x_BTNH, jnp.pad(segment_BT, ((0, 0), (0, more)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _attention(
    q_BTNH, k_BSKH, v_BSKH, query_segment_BT, key_segment_BS, seed_BN, problem, forward
):
    return forward(q_BTNH, k_BSKH, v_BSKH, query_segment_BT, key_segment_BS, seed_BN, problem)


def _attention_fwd(*args):
    results = _attention(*args)
    return results, (*args[:6], *results)


def _forward(q_BTNH, k_BSKH, v_BSKH, query_segment_BT, key_segment_BS, seed_BN, problem):
    (B, T, N, _), blocks = q_BTNH.shape, problem.config.forward
    ranges = ranges_of(query_segment_BT, key_segment_BS, blocks, problem, by_query=True)
    operands = (q_BTNH, k_BSKH, v_BSKH, query_segment_BT, key_segment_BS, seed_BN)
    outputs = [
        jax.ShapeDtypeStruct(q_BTNH.shape, q_BTNH.dtype),
        jax.ShapeDtypeStruct((B, N, T), jnp.float32),
    ]
    return tuple(
        _call(
            _forward_kernel,
            (T // blocks.queries, N, B),
            blocks,
            problem,
            outputs,
            "flash_attention_forward",
        )(*operands, ranges)
    )


def _attention_bwd(problem, forward, residuals, cotangents):
    del forward
    *operands, out_BTNH, lse_BNT = residuals
    q_BTNH, k_BSKH, v_BSKH, query_segment_BT, key_segment_BS, _ = operands
    dout_BTNH, dlse_BNT = cotangents
    (B, T, N, _), (S, K) = q_BTNH.shape, k_BSKH.shape[1:3]
    # d score = weight * (d weight - delta); the log-sum-exp's own gradient is weight * dlse.
    delta_BNT = (
        jnp.einsum("BTNH,BTNH->BNT", dout_BTNH, out_BTNH, preferred_element_type=jnp.float32)
        - dlse_BNT
    )
    # All weights of a query without keys are masked.
    lse_BNT = jnp.where(jnp.isneginf(lse_BNT), 0.0, lse_BNT)
    operands = (*operands, dout_BTNH, lse_BNT, delta_BNT)

    blocks = problem.config.dq
    ranges = ranges_of(query_segment_BT, key_segment_BS, blocks, problem, by_query=True)
    out = jax.ShapeDtypeStruct(q_BTNH.shape, q_BTNH.dtype)
    (dq_BTNH,) = _call(
        _dq_kernel, (T // blocks.queries, N, B), blocks, problem, [out], "flash_attention_dq"
    )(*operands, ranges)

    blocks = problem.config.dkv
    ranges = ranges_of(query_segment_BT, key_segment_BS, blocks, problem, by_query=False)
    outputs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k_BSKH, v_BSKH)]
    dk_BSKH, dv_BSKH = _call(
        _dkv_kernel, (S // blocks.keys, K, B), blocks, problem, outputs, "flash_attention_dkv"
    )(*operands, ranges)
    return dq_BTNH, dk_BSKH, dv_BSKH, None, None, None


_attention.defvjp(_attention_fwd, _attention_bwd)


def _call(
    kernel: Callable,
    grid: tuple[int, ...],
    blocks: Blocks,
    problem: _Problem,
    outputs: Sequence[Any],
    name: str,
) -> Callable:
    return pl.pallas_call(
        functools.partial(kernel, blocks, problem),
        grid=grid,
        out_shape=outputs,
        compiler_params=plgpu.CompilerParams(
            num_warps=blocks.num_warps, num_stages=blocks.num_stages
        ),
        interpret=problem.interpret,
        name=name,
    )


def ranges_of(
    query_segment_BT: jax.Array,
    key_segment_BS: jax.Array,
    blocks: Blocks,
    problem: _Problem,
    *,
    by_query: bool,
) -> jax.Array:
    """Returns int32 [B, blocks, 4]: the blocks of keys that each block of queries visits.

    Without `by_query`: the blocks of queries that each block of keys visits.  Of the four numbers
    a, b, c, d: blocks a..b and c..d need a mask, b..c need none, the others are hidden.  Hidden
    blocks between a and d are visited too; there are none if every document is one run of slots.
    """
    (settings, offset), (_, T), S = problem[:2], query_segment_BT.shape, key_segment_BS.shape[1]
    low_q, high_q = _extremes(query_segment_BT, blocks.queries)
    low_k, high_k = (x[:, None, :] for x in _extremes(key_segment_BS, blocks.keys))
    low_q, high_q = low_q[:, :, None], high_q[:, :, None]
    first_q = jnp.arange(0, T, blocks.queries, dtype=jnp.int32)[:, None] + offset
    first_k = jnp.arange(0, S, blocks.keys, dtype=jnp.int32)
    last_q, last_k = first_q + blocks.queries - 1, first_k + blocks.keys - 1
    is_seen = (low_q <= high_k) & (low_k <= high_q) & (high_q > 0) & (high_k > 0)
    is_full = (low_q == high_q) & (low_k == high_k) & (low_q == low_k) & (low_q > 0)
    if settings.causal:
        is_seen, is_full = is_seen & (first_k <= last_q), is_full & (last_k <= first_q)
    if not by_query:
        is_seen, is_full = is_seen.swapaxes(1, 2), is_full.swapaxes(1, 2)
    index = jnp.arange(is_seen.shape[2], dtype=jnp.int32)
    end = jnp.int32(is_seen.shape[2])
    start = jnp.min(jnp.where(is_seen, index, end), axis=2)
    stop = jnp.max(jnp.where(is_seen, index + 1, 0), axis=2)
    full_start = jnp.min(jnp.where(is_full, index, stop[..., None]), axis=2)
    full_stop = jnp.min(
        jnp.where(~is_full & (index > full_start[..., None]), index, stop[..., None]), axis=2
    )
    return jnp.stack([jnp.minimum(start, stop), full_start, full_stop, stop], axis=2)


def _extremes(segment_BT: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """Returns the lowest and highest segment of each block."""
    blocks = segment_BT.reshape(segment_BT.shape[0], -1, size)
    return blocks.min(2), blocks.max(2)


# The kernels.  References are to whole arrays in global memory.


def _forward_kernel(
    blocks,
    problem,
    q_ref,
    k_ref,
    v_ref,
    query_segment_ref,
    key_segment_ref,
    seed_ref,
    ranges_ref,
    out_ref,
    lse_ref,
):
    settings = problem.settings
    block, head, batch = _reversed_block(), pl.program_id(1), pl.program_id(2)
    kv_head = lax.div(head, q_ref.shape[2] // k_ref.shape[2])
    rows, query = _slots(block, blocks.queries)
    q, query_segment = _load(q_ref, batch, rows, head), query_segment_ref[batch, rows]

    def step(is_masked, j, carry):
        accumulators, top, total = carry
        columns, key = _slots(j, blocks.keys)
        scores = _product(q, _load(k_ref, batch, columns, kv_head)) * (settings.scale * _LOG2E)
        if is_masked:
            visible = _visible(
                query[:, None],
                key[None, :],
                query_segment[:, None],
                key_segment_ref[batch, columns][None, :],
                problem,
            )
            scores = jnp.where(visible, scores, _MASKED)
        new_top = jnp.maximum(top, scores.max(1))
        weights = jnp.exp2(scores - new_top[:, None])
        if is_masked:
            weights = jnp.where(visible, weights, 0.0)  # `top` is masked before the first key
        decay = jnp.exp2(top - new_top)
        total = total * decay + weights.sum(1)
        weights = _dropped(weights, seed_ref[batch, head], query[:, None], key[None, :], settings)
        values = _load(v_ref, batch, columns, kv_head)
        accumulators = [
            old * decay[:, None] + _dot(weights.astype(value.dtype), value)
            for old, value in zip(accumulators, values, strict=True)
        ]
        return accumulators, new_top, total

    zeros = jnp.zeros(blocks.queries, jnp.float32)
    carry = _zeros(blocks.queries, q), zeros + _MASKED, zeros
    accumulators, top, total = _loop(ranges_ref, batch, block, step, carry)
    has_keys, total = total > 0, jnp.where(total > 0, total, 1.0)
    lse_ref[batch, head, rows] = jnp.where(has_keys, (top + jnp.log2(total)) / _LOG2E, -jnp.inf)
    _store(out_ref, batch, rows, head, [x / total[:, None] for x in accumulators])


def _dq_kernel(blocks, problem, *refs):
    (
        q_ref,
        k_ref,
        v_ref,
        query_segment_ref,
        key_segment_ref,
        seed_ref,
        dout_ref,
        lse_ref,
        delta_ref,
        ranges_ref,
        dq_ref,
    ) = refs
    settings = problem.settings
    block, head, batch = _reversed_block(), pl.program_id(1), pl.program_id(2)
    kv_head = lax.div(head, q_ref.shape[2] // k_ref.shape[2])
    rows, query = _slots(block, blocks.queries)
    q, dout = _load(q_ref, batch, rows, head), _load(dout_ref, batch, rows, head)
    lse, delta = lse_ref[batch, head, rows] * _LOG2E, delta_ref[batch, head, rows]
    query_segment = query_segment_ref[batch, rows]

    def step(is_masked, j, dq):
        columns, key = _slots(j, blocks.keys)
        k = _load(k_ref, batch, columns, kv_head)
        scores = _product(q, k) * (settings.scale * _LOG2E)
        weights = jnp.exp2(scores - lse[:, None])
        if is_masked:
            visible = _visible(
                query[:, None],
                key[None, :],
                query_segment[:, None],
                key_segment_ref[batch, columns][None, :],
                problem,
            )
            weights = jnp.where(visible, weights, 0.0)
        dweights = _product(dout, _load(v_ref, batch, columns, kv_head))
        dweights = _dropped(
            dweights, seed_ref[batch, head], query[:, None], key[None, :], settings
        )
        dscores = (weights * (dweights - delta[:, None])).astype(k_ref.dtype)
        return [old + _dot(dscores, piece) for old, piece in zip(dq, k, strict=True)]

    dq = _loop(ranges_ref, batch, block, step, _zeros(blocks.queries, q))
    _store(dq_ref, batch, rows, head, [x * settings.scale for x in dq])


def _dkv_kernel(blocks, problem, *refs):
    (
        q_ref,
        k_ref,
        v_ref,
        query_segment_ref,
        key_segment_ref,
        seed_ref,
        dout_ref,
        lse_ref,
        delta_ref,
        ranges_ref,
        dk_ref,
        dv_ref,
    ) = refs
    settings, group = problem.settings, q_ref.shape[2] // k_ref.shape[2]
    block, kv_head, batch = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    columns, key = _slots(block, blocks.keys)
    k, v = _load(k_ref, batch, columns, kv_head), _load(v_ref, batch, columns, kv_head)
    key_segment = key_segment_ref[batch, columns]

    def step(head, is_masked, i, carry):
        dk, dv = carry
        rows, query = _slots(i, blocks.queries)
        q, dout = _load(q_ref, batch, rows, head), _load(dout_ref, batch, rows, head)
        scores = _product(k, q) * (settings.scale * _LOG2E)
        weights = jnp.exp2(scores - lse_ref[batch, head, rows][None, :] * _LOG2E)
        if is_masked:
            visible = _visible(
                query[None, :],
                key[:, None],
                query_segment_ref[batch, rows][None, :],
                key_segment[:, None],
                problem,
            )
            weights = jnp.where(visible, weights, 0.0)
        drop = functools.partial(
            _dropped,
            seed=seed_ref[batch, head],
            query=query[None, :],
            key=key[:, None],
            settings=settings,
        )
        kept = drop(weights).astype(q_ref.dtype)
        dweights = drop(_product(v, dout))
        delta = delta_ref[batch, head, rows]
        dscores = (weights * (dweights - delta[None, :])).astype(q_ref.dtype)
        dv = [old + _dot(kept, piece) for old, piece in zip(dv, dout, strict=True)]
        dk = [old + _dot(dscores, piece) for old, piece in zip(dk, q, strict=True)]
        return dk, dv

    def heads(g, carry):
        return _loop(ranges_ref, batch, block, functools.partial(step, kv_head * group + g), carry)

    dk, dv = lax.fori_loop(0, group, heads, (_zeros(blocks.keys, k), _zeros(blocks.keys, v)))
    _store(dk_ref, batch, columns, kv_head, [x * settings.scale for x in dk])
    _store(dv_ref, batch, columns, kv_head, dv)


# What the kernels share.


def _reversed_block() -> jax.Array:
    """Returns this program's block of queries: the last one first.

    If causal it has the most work, and small blocks fill the end.
    """
    return pl.num_programs(0) - 1 - pl.program_id(0)


def _slots(block: jax.Array, size: int) -> tuple[Any, jax.Array]:
    """Returns the slice of a block's slots and their int32 indices."""
    return pl.ds(block * size, size), block * size + jnp.arange(size, dtype=jnp.int32)


def _loop(ranges_ref: Any, batch: jax.Array, block: jax.Array, step: Callable, carry: Any) -> Any:
    """Runs step(is_masked, j, carry) over the three ranges of a block."""
    edges = [ranges_ref[batch, block, i] for i in range(4)]
    for i, is_masked in enumerate((True, False, True)):
        carry = lax.fori_loop(edges[i], edges[i + 1], functools.partial(step, is_masked), carry)
    return carry


def _pieces(size: int) -> list[Any]:
    """Cuts the head dim into slices that are powers of two, the largest first."""
    starts = [0]
    while starts[-1] < size:
        starts.append(starts[-1] + 2 ** int(math.log2(size - starts[-1])))
    return [pl.ds(start, stop - start) for start, stop in itertools.pairwise(starts)]


def _load(ref: Any, batch: jax.Array, slots: Any, head: jax.Array) -> list[jax.Array]:
    return [ref[batch, slots, head, piece] for piece in _pieces(ref.shape[3])]


def _store(
    ref: Any, batch: jax.Array, slots: Any, head: jax.Array, values: Sequence[jax.Array]
) -> None:
    for piece, value in zip(_pieces(ref.shape[3]), values, strict=True):
        ref[batch, slots, head, piece] = value.astype(ref.dtype)


def _zeros(size: int, like: Sequence[jax.Array]) -> list[jax.Array]:
    return [jnp.zeros((size, piece.shape[1]), jnp.float32) for piece in like]


def _dot(left: jax.Array, right: jax.Array) -> jax.Array:
    """Returns left @ right in float32; float32 operands are not rounded to TF32."""
    precision = lax.Precision.HIGHEST if left.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot(left, right, precision=precision, preferred_element_type=jnp.float32)


def _product(left: Sequence[jax.Array], right: Sequence[jax.Array]) -> jax.Array:
    """Returns left @ right^T, summed over the pieces of the head dim."""
    return functools.reduce(lax.add, [_dot(a, b.T) for a, b in zip(left, right, strict=True)])


def _visible(
    query: jax.Array,
    key: jax.Array,
    query_segment: jax.Array,
    key_segment: jax.Array,
    problem: _Problem,
) -> jax.Array:
    return is_visible(
        query + problem.offset,
        key,
        query_segment,
        key_segment,
        problem.settings.causal,
    )


def _dropped(
    weights: jax.Array, seed: jax.Array, query: jax.Array, key: jax.Array, settings: Settings
) -> jax.Array:
    """Sets dropped weights to 0 and scales up the others."""
    if not settings.dropout_rate:
        return weights
    return jnp.where(
        dropout.is_kept(seed, query, key, settings.dropout_rate),
        weights * (1 / (1 - settings.dropout_rate)),
        0.0,
    )
