"""Flash attention's forward pass on Hopper GPUs in Pallas Mosaic GPU; the backward pass is
`triton.py`'s.  Never ran on a GPU.

Letters: B batch, T queries, S keys, N query heads, K kv heads, H head dim.

A block takes 128 queries of one head.  Two warp-groups compute 64 of them each; a third copies
keys and values into a ring of stages.  Barriers keep the two half a step apart, so that one
multiplies while the other computes exponentials.  `triton.ranges_of` decides beforehand which
blocks of keys are visited, and which of those need no mask.  Head dims are cut into pieces of 64
and 16 (80 = 64 + 16), so that nothing is multiplied by padding: 64 has the widest swizzle, 16 the
narrowest.  Each piece is an array of its own in global memory, because the copy engine's tiles
must divide the array; XLA cuts them while it clears the padding.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper, select
from pallas_kernels.flash_attention import triton
from pallas_kernels.flash_attention.reference import Settings, is_visible
from pallas_kernels.flash_attention.triton import Blocks

_CONSUMERS = 2  # warp-groups that compute
_BLOCKS = Blocks(queries=128, keys=128, num_warps=12, num_stages=2)  # not measured
_HALF = _BLOCKS.queries // _CONSUMERS
_LOG2E = math.log2(math.e)
_MASKED = -1e30


def refuse(
    device_kind: str, q_BTNH: jax.Array, k_BSKH: jax.Array, settings: Settings
) -> str | None:
    """Returns why this cannot serve the problem on the device, or None."""
    del k_BSKH
    if reason := select.only_on_hopper(device_kind) or select.refuse_head_dim(q_BTNH.shape[-1]):
        return reason
    if q_BTNH.dtype != jnp.bfloat16:
        return f"needs bfloat16, not {q_BTNH.dtype}"
    if q_BTNH.shape[-1] > 128:
        return f"needs a head dim of at most 128, not {q_BTNH.shape[-1]}"
    if settings.has_offset:
        return "takes no query offset"
    return "has no dropout" if settings.dropout_rate else None


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
    """As `reference.attention`; the backward pass is Triton's."""
    del device_kind, offset
    return triton.with_backward(
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


def _forward(q_BTNH, k_BSKH, v_BSKH, query_segment_BT, key_segment_BS, seed_BN, problem):
    del seed_BN
    B, T, N, H = q_BTNH.shape
    ranges = triton.ranges_of(query_segment_BT, key_segment_BS, _BLOCKS, problem, by_query=True)
    pieces, stages = _pieces(H), _BLOCKS.num_stages
    operands = [
        x[..., piece.start : piece.start + piece.size]
        for x in (q_BTNH, k_BSKH, v_BSKH)
        for piece in pieces
    ]
    outputs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands[: len(pieces)]]
    keys = [_tiled((stages, _BLOCKS.keys, piece.size)) for piece in pieces]
    arrived = {"num_arrivals": len(pieces)}
    scratch = (
        [_tiled((_CONSUMERS, _HALF, piece.size)) for piece in pieces],
        keys,
        keys,
        plgpu.Barrier(num_barriers=_CONSUMERS, **arrived),
        *[plgpu.Barrier(num_barriers=stages, **arrived)] * 2,
        *[plgpu.Barrier(num_barriers=stages, num_arrivals=_CONSUMERS)] * 2,
        plgpu.Barrier(num_arrivals=_CONSUMERS),
    )
    *out, lse_BNT = plgpu.kernel(
        functools.partial(_kernel, problem, len(pieces)),
        out_type=(*outputs, jax.ShapeDtypeStruct((B, N, T), jnp.float32)),
        scratch_types=scratch,
        grid=(N, T // _BLOCKS.queries, B),
        grid_names=("head", "block", "batch"),
        num_threads=_CONSUMERS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=problem.interpret or None,
    )(*operands, query_segment_BT, key_segment_BS, ranges)
    return jnp.concatenate(out, axis=-1), lse_BNT


def _kernel(problem, num_pieces, *refs):
    q_refs, k_refs, v_refs = (refs[i * num_pieces : (i + 1) * num_pieces] for i in range(3))
    query_segment_ref, key_segment_ref, ranges_ref, *refs = refs[3 * num_pieces :]
    out_refs, lse_ref, scratch = refs[:num_pieces], refs[num_pieces], refs[num_pieces + 1 :]
    q_smem, k_smem, v_smem, q_full, k_full, v_full, k_free, v_free, turn = scratch
    batch, head, warpgroup = (
        lax.axis_index("batch"),
        lax.axis_index("head"),
        lax.axis_index("warpgroup"),
    )
    # The last block first: if causal it has the most work, and small blocks fill the end.
    block = lax.axis_size("block") - 1 - lax.axis_index("block")
    kv_head = lax.div(head, q_refs[0].shape[2] // k_refs[0].shape[2])
    edges = [ranges_ref[batch, block, i] for i in range(4)]

    @pl.when(warpgroup == _CONSUMERS)
    def _():
        plgpu.set_max_registers(24, action="decrease")

        def slot_of(j):
            return lax.rem(j - edges[0], _BLOCKS.num_stages)

        def fetch(j, _):
            slot, columns = slot_of(j), pl.ds(j * _BLOCKS.keys, _BLOCKS.keys)
            for sources, buffers, full, free in (
                (k_refs, k_smem, k_full, k_free),
                (v_refs, v_smem, v_full, v_free),
            ):
                pl.when(j - edges[0] >= _BLOCKS.num_stages)(
                    functools.partial(plgpu.barrier_wait, free.at[slot])
                )
                for source, buffer in zip(sources, buffers, strict=True):
                    plgpu.copy_gmem_to_smem(
                        source.at[batch, columns, kv_head], buffer.at[slot], full.at[slot]
                    )

        def await_free(j, _):
            plgpu.barrier_wait(k_free.at[slot_of(j)])
            plgpu.barrier_wait(v_free.at[slot_of(j)])

        lax.fori_loop(edges[0], edges[3], fetch, None)
        # Leaves the barriers as they were found.
        lax.fori_loop(lax.max(edges[3] - _BLOCKS.num_stages, edges[0]), edges[3], await_free, None)

    @pl.when(warpgroup < _CONSUMERS)
    def _():
        plgpu.set_max_registers(240, action="increase")
        first = block * _BLOCKS.queries + warpgroup * _HALF
        rows = pl.ds(first, _HALF)
        for source, buffer in zip(q_refs, q_smem, strict=True):
            plgpu.copy_gmem_to_smem(
                source.at[batch, rows, head], buffer.at[warpgroup], q_full.at[warpgroup]
            )
        query_segment = hopper.load(
            query_segment_ref.at[batch, rows], plgpu.Layout.WGMMA.reduce(1)
        )
        plgpu.barrier_wait(q_full.at[warpgroup])

        def visible(j):
            shape = (_HALF, _BLOCKS.keys)
            position, key = (
                plgpu.broadcasted_iota(jnp.int32, shape, dim, layout=plgpu.Layout.WGMMA)
                for dim in (0, 1)
            )
            key_segment = hopper.load(
                key_segment_ref.at[batch, pl.ds(j * _BLOCKS.keys, _BLOCKS.keys)],
                plgpu.Layout.WGMMA.reduce(0),
            )
            segments = (
                lax.broadcast_in_dim(query_segment, shape, [0]),
                lax.broadcast_in_dim(key_segment, shape, [1]),
            )
            return is_visible(
                position + (first + problem.offset),
                key + j * _BLOCKS.keys,
                *segments,
                problem.settings.causal,
            )

        def step(is_masked, j, carry):
            accumulators, top, total = carry
            slot = lax.rem(j - edges[0], _BLOCKS.num_stages)
            plgpu.barrier_wait(k_full.at[slot])

            def multiply_keys(sums):
                for q, k in zip(q_smem, k_smem, strict=True):
                    plgpu.wgmma(sums, q.at[warpgroup], k.at[slot].transpose((1, 0)))
                _take_turns(turn)  # These scores are under way: let the other multiply.
                return sums[...]

            scores = pl.run_scoped(multiply_keys, plgpu.ACC((_HALF, _BLOCKS.keys), jnp.float32))
            plgpu.barrier_arrive(k_free.at[slot])
            scores = scores * (problem.settings.scale * _LOG2E)
            if is_masked:
                is_seen = visible(j)
                scores = jnp.where(is_seen, scores, _MASKED)
            new_top = jnp.maximum(top, scores.max(axis=1))
            weights = jnp.exp2(scores - lax.broadcast_in_dim(new_top, scores.shape, [0]))
            if is_masked:
                weights = jnp.where(is_seen, weights, 0.0)  # `top` is masked before the first key
            decay = jnp.exp2(top - new_top)
            total = total * decay + weights.sum(axis=1)
            plgpu.barrier_wait(v_full.at[slot])
            _take_turns(turn)
            values = _times_values(weights.astype(jnp.bfloat16), [v.at[slot] for v in v_smem])
            plgpu.barrier_arrive(v_free.at[slot])
            accumulators = [
                old * lax.broadcast_in_dim(decay, new.shape, [0]) + new
                for old, new in zip(accumulators, values, strict=True)
            ]
            return accumulators, new_top, total

        zeros = plgpu.layout_cast(jnp.zeros((_HALF,), jnp.float32), plgpu.Layout.WGMMA.reduce(1))
        accumulators = [
            plgpu.layout_cast(jnp.zeros((_HALF, v.shape[2]), jnp.float32), plgpu.Layout.WGMMA)
            for v in v_smem
        ]
        carry = accumulators, zeros + _MASKED, zeros
        pl.when(warpgroup == 1)(
            functools.partial(_take_turns, turn)
        )  # half a step behind the other
        for i, is_masked in enumerate((True, False, True)):
            carry = lax.fori_loop(
                edges[i], edges[i + 1], functools.partial(step, is_masked), carry
            )
        pl.when(warpgroup == 0)(functools.partial(_take_turns, turn))

        accumulators, top, total = carry
        has_keys = total > 0
        total = jnp.where(has_keys, total, 1.0)
        lse_ref[batch, head, rows] = jnp.where(has_keys, top / _LOG2E + jnp.log(total), -jnp.inf)
        for buffer, value in zip(q_smem, accumulators, strict=True):
            buffer[warpgroup] = (value / lax.broadcast_in_dim(total, value.shape, [0])).astype(
                buffer.dtype
            )
        plgpu.commit_smem()
        for out_ref, buffer in zip(out_refs, q_smem, strict=True):
            plgpu.copy_smem_to_gmem(buffer.at[warpgroup], out_ref.at[batch, rows, head])
        plgpu.wait_smem_to_gmem(0)


def _times_values(weights: jax.Array, values: list[Any]) -> list[jax.Array]:
    """Multiplies the weights, in registers, with each piece of the values."""

    def multiply(*sums):
        for total, value in zip(sums, values, strict=True):
            plgpu.wgmma(total, weights, value)
        return [total[...] for total in sums]

    return pl.run_scoped(
        multiply, *[plgpu.ACC((weights.shape[0], value.shape[1]), jnp.float32) for value in values]
    )


def _take_turns(barrier: Any) -> None:
    """Waits until both warp-groups have arrived, each at its own place in the step."""
    plgpu.barrier_arrive(barrier)
    plgpu.barrier_wait(barrier)


def _pieces(size: int) -> list[Any]:
    """Cuts the head dim into slices of 64, then of 16."""
    sizes = [64] * (size // 64) + [16] * (size % 64 // 16)
    return [pl.ds(sum(sizes[:i]), piece) for i, piece in enumerate(sizes)]


def _tiled(shape: tuple[int, ...]) -> Any:
    """bfloat16 shared memory whose swizzle covers the last dim."""
    return hopper.tiled_smem(shape, jnp.bfloat16, swizzle=2 * shape[-1])
