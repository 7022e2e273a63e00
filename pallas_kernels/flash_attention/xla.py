"""flash_attention in plain XLA: one chunk of queries after another, over the keys it can see.

The gradient recomputes a chunk's weights from the log-sum-exp, as the kernels do.
Letters: B batch, T queries, S keys, N query heads, K kv heads, G = N / K, H head dim, c queries of
a chunk, R = G * c rows of one kv head, x chunks.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.flash_attention import dropout
from pallas_kernels.flash_attention.reference import (
    Settings,
    is_visible,
    lead_of,
    zero_padding,
)

# Scores at a time, 4 MB of float32: of all sequences if they fit, else of a few.  XLA:CPU fuses
# the slices of a loop over sequences with what reads them, which then is not vectorised: 45 ms of
# CPU time in such a loop, 26 ms without (forward and backward; 8 sequences of 256 queries, 8 heads
# of 32; EPYC with AVX-512, jax 0.10.2).
_SCORES_AT_A_TIME = 2**20
# Chunks of fewer queries skip more of what causality hides, and make poor matrix products.
_MIN_QUERIES = 64
# The queries form at most this many pieces, each with its own number of keys.  More pieces would
# take longer to compile.
_NUM_PIECES = 8
_MASKED = -1e30  # swallows any score in float32


def attention(
    q_BTNH,
    k_BSKH,
    v_BSKH,
    query_segment_BT,
    key_segment_BS,
    seed_BN,
    settings: Settings,
    offset: jax.Array | None = None,
):
    """As `reference.attention`, with matrix products in the inputs' dtype and linear memory."""
    q_BTNH = zero_padding(q_BTNH, query_segment_BT)
    k_BSKH, v_BSKH = zero_padding(k_BSKH, key_segment_BS), zero_padding(v_BSKH, key_segment_BS)
    arrays = (q_BTNH, k_BSKH, v_BSKH, query_segment_BT, key_segment_BS, seed_BN)
    return _map_sequences(lambda *arrays: _sequence(settings, *arrays, offset), arrays)


def gradients(
    q_BTNH,
    k_BSKH,
    v_BSKH,
    query_segment_BT,
    key_segment_BS,
    out_BTNH,
    lse_BNT,
    dout_BTNH,
    settings: Settings,
):
    """As `reference.gradients`."""
    q_BTNH = zero_padding(q_BTNH, query_segment_BT)
    k_BSKH, v_BSKH = zero_padding(k_BSKH, key_segment_BS), zero_padding(v_BSKH, key_segment_BS)

    def one_sequence(*arrays):
        *operands, out_TNH, lse_NT, dout_TNH = arrays
        no_seeds_N = jnp.zeros(q_BTNH.shape[2], jnp.uint32)
        residuals = (*operands, no_seeds_N, None, out_TNH, lse_NT.T)
        return _bwd(settings, residuals, (dout_TNH, jnp.zeros_like(lse_NT)))[:3]

    operands = (q_BTNH, k_BSKH, v_BSKH, query_segment_BT, key_segment_BS)
    return _map_sequences(one_sequence, (*operands, out_BTNH, lse_BNT, dout_BTNH))


def _map_sequences(fn: Callable, arrays: tuple[jax.Array, ...]) -> Any:
    """fn of each sequence, of as many at a time as _SCORES_AT_A_TIME allows; the arrays begin with
    q and k.
    """
    (B, T, N, _), S = arrays[0].shape, arrays[1].shape[1]
    at_a_time = max(1, _SCORES_AT_A_TIME // (N * min(T, _MIN_QUERIES) * S))
    if at_a_time >= B:
        return jax.vmap(fn)(*arrays)
    return jax.lax.map(lambda xs: fn(*xs), arrays, batch_size=at_a_time)


class _Keys(NamedTuple):
    """The first S keys of a sequence."""

    k_SKH: jax.Array
    v_SKH: jax.Array
    segment_S: jax.Array
    seed_N: jax.Array

    def first(self, num_keys: int) -> "_Keys":
        return self._replace(
            k_SKH=self.k_SKH[:num_keys],
            v_SKH=self.v_SKH[:num_keys],
            segment_S=self.segment_S[:num_keys],
        )


class _Queries(NamedTuple):
    """The queries of a chunk; `index_c` numbers them in the sequence, from the offset on."""

    q_cNH: jax.Array
    segment_c: jax.Array
    index_c: jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sequence(settings, q_TNH, k_SKH, v_SKH, query_segment_T, key_segment_S, seed_N, offset):
    """Returns (out [T, N, H], log-sum-exp [N, T]) of one sequence."""
    return _fwd(settings, q_TNH, k_SKH, v_SKH, query_segment_T, key_segment_S, seed_N, offset)[0]


def _fwd(settings, q_TNH, k_SKH, v_SKH, query_segment_T, key_segment_S, seed_N, offset):
    keys = _Keys(k_SKH, v_SKH, key_segment_S, seed_N)
    T = len(q_TNH)
    pieces = []
    for num_keys, queries in _pieces(settings, T, len(k_SKH), (q_TNH, query_segment_T), offset):
        attend = functools.partial(
            _attend, keys=keys.first(num_keys), lead=_lead(offset, T, keys), settings=settings
        )
        pieces.append(_map_chunks(lambda chunk, attend=attend: attend(_Queries(*chunk)), queries))
    out_xcNH, lse_xcN = (jnp.concatenate(parts) for parts in zip(*pieces, strict=True))
    # Kept by a remat policy that keeps attention's result: the backward pass reads both.
    out_TNH, lse_TN = (
        checkpoint_name(a.reshape(-1, *a.shape[2:])[:T], "attended") for a in (out_xcNH, lse_xcN)
    )
    operands = (q_TNH, k_SKH, v_SKH, query_segment_T, key_segment_S, seed_N, offset)
    return (out_TNH, lse_TN.T), (*operands, out_TNH, lse_TN)


def _bwd(settings, residuals, cotangents):
    q_TNH, k_SKH, v_SKH, query_segment_T, key_segment_S, seed_N, offset, out_TNH, lse_TN = (
        residuals
    )
    dout_TNH, dlse_NT = cotangents
    keys = _Keys(k_SKH, v_SKH, key_segment_S, seed_N)
    (T, _, _), S = q_TNH.shape, len(k_SKH)
    # A score's gradient is weight * (gradient of the weight - this).
    shift_TN = (out_TNH.astype(jnp.float32) * dout_TNH.astype(jnp.float32)).sum(-1) - dlse_NT.T
    lse_TN = jnp.where(lse_TN == -jnp.inf, -_MASKED, lse_TN)  # a query without keys: weights of 0
    arrays = (q_TNH, query_segment_T, dout_TNH, lse_TN, shift_TN)
    dq, dkv_SKH = [], jnp.zeros((2, *k_SKH.shape), jnp.float32)
    for num_keys, chunks in _pieces(settings, T, S, arrays, offset):
        pullback = functools.partial(
            _pull_back, keys=keys.first(num_keys), lead=_lead(offset, T, keys), settings=settings
        )

        def add_chunk(total, chunk, pullback=pullback):
            q_cNH, segment_c, dout_cNH, lse_cN, shift_cN, index_c = chunk
            queries = _Queries(q_cNH, segment_c, index_c)
            dq_cNH, dkv = pullback(queries, dout_cNH, lse_cN, shift_cN)
            return total + dkv, dq_cNH

        total, dq_xcNH = _scan_chunks(add_chunk, dkv_SKH[:, :num_keys], chunks)
        dkv_SKH = dkv_SKH.at[:, :num_keys].set(total)
        dq.append(dq_xcNH)
    dq_TNH = jnp.concatenate(dq).reshape(-1, *q_TNH.shape[1:])[:T]
    dk_SKH, dv_SKH = dkv_SKH.astype(k_SKH.dtype)
    # Integer arguments have the empty cotangent type.
    no_gradients = jax.tree.map(
        lambda a: np.zeros(a.shape, jax.dtypes.float0),
        (query_segment_T, key_segment_S, seed_N, offset),
    )
    return dq_TNH, dk_SKH, dv_SKH, *no_gradients


_sequence.defvjp(_fwd, _bwd)


def _lead(offset: jax.Array | None, T: int, keys: _Keys) -> jax.Array | int:
    """Returns what is added to `index_c` for the last key that a query sees."""
    return lead_of(None, T, len(keys.segment_S)) if offset is None else 0


def _pieces(
    settings: Settings, T: int, S: int, arrays_T: tuple, offset: jax.Array | None
) -> list[tuple[int, list]]:
    """Splits the queries into [(number of keys that a piece may see, its arrays [x, c, ...])].

    The queries' numbers follow the arrays.  Queries that fill up the last chunk are zero: they
    have segment 0.
    """
    chunk = min(T, _MIN_QUERIES)
    num_chunks = -(-T // chunk)
    pad = num_chunks * chunk - T
    by_chunk = [
        jnp.pad(x, ((0, pad), *[(0, 0)] * (x.ndim - 1))).reshape(num_chunks, chunk, *x.shape[1:])
        for x in (*arrays_T, jnp.arange(T) + (0 if offset is None else offset))
    ]
    per_piece = -(-num_chunks // _NUM_PIECES)
    pieces = []
    for first in range(0, num_chunks, per_piece):
        stop = min(first + per_piece, num_chunks)
        # As many as the last of these queries sees, at least one.
        is_bounded = settings.causal and offset is None
        num_keys = min(max(stop * chunk + S - T, 1), S) if is_bounded else S
        pieces.append((num_keys, [x[first:stop] for x in by_chunk]))
    return pieces


def _map_chunks(fn: Callable, chunks: list[jax.Array]) -> Any:
    return _scan_chunks(lambda carry, chunk: (carry, fn(chunk)), None, chunks)[1]


def _scan_chunks(fn: Callable, carry: Any, chunks: list[jax.Array]) -> tuple[Any, Any]:
    """`jax.lax.scan`, without a loop for one chunk."""
    if len(chunks[0]) > 1:
        return jax.lax.scan(fn, carry, chunks)
    carry, result = fn(carry, [x[0] for x in chunks])
    return carry, jax.tree.map(lambda x: x[None], result)


def _attend(queries: _Queries, keys: _Keys, lead: int, settings: Settings):
    """Returns (out [c, N, H], log-sum-exp [c, N]) of a chunk of queries over some keys."""
    dtype = queries.q_cNH.dtype
    scores_KGcS = _scores(queries, keys, lead, settings)
    max_KGc1 = scores_KGcS.max(-1, keepdims=True)
    weights_KGcS = jnp.exp(scores_KGcS - max_KGc1)
    # A row without keys has the weights of its masked scores.
    has_keys_KGc1 = max_KGc1 > _MASKED / 2
    sum_KGc1 = weights_KGcS.sum(-1, keepdims=True)
    lse_KGc1 = jnp.where(has_keys_KGc1, max_KGc1 + jnp.log(sum_KGc1), -jnp.inf)
    weights_KGcS = _drop(weights_KGcS, queries, keys, settings)
    out_KRH = _product("KRS,SKH->KRH", _as_rows(weights_KGcS.astype(dtype)), keys.v_SKH)
    out_KGcH = out_KRH.reshape(*sum_KGc1.shape[:3], -1) * jnp.where(
        has_keys_KGc1, 1 / sum_KGc1, 0.0
    )
    return _unfold(out_KGcH).astype(dtype), _unfold(lse_KGc1)[..., 0]


def _pull_back(queries: _Queries, dout_cNH, lse_cN, shift_cN, *, keys: _Keys, lead, settings):
    """Returns the gradients of q [c, N, H] and, float32, of k and v [2, S, K, H]."""
    dtype, K = queries.q_cNH.dtype, keys.k_SKH.shape[1]
    weights_KGcS = jnp.exp(_scores(queries, keys, lead, settings) - _fold(lse_cN[..., None], K))
    q_KRH, dout_KRH = (_as_rows(_fold(x, K)) for x in (queries.q_cNH, dout_cNH))
    dweights_KGcS = _product("KRH,SKH->KRS", dout_KRH, keys.v_SKH).reshape(weights_KGcS.shape)
    dweights_KGcS = _drop(dweights_KGcS, queries, keys, settings)
    dscores_KGcS = weights_KGcS * (dweights_KGcS - _fold(shift_cN[..., None], K))
    dscores_KRS = _as_rows(dscores_KGcS.astype(dtype))
    dropped_KRS = _as_rows(_drop(weights_KGcS, queries, keys, settings).astype(dtype))
    dq_KRH = _product("KRS,SKH->KRH", dscores_KRS, keys.k_SKH) * settings.scale
    dk_SKH = _product("KRS,KRH->SKH", dscores_KRS, q_KRH) * settings.scale
    dv_SKH = _product("KRS,KRH->SKH", dropped_KRS, dout_KRH)
    dq_cNH = _unfold(dq_KRH.reshape(*weights_KGcS.shape[:3], -1)).astype(dtype)
    return dq_cNH, jnp.stack([dk_SKH, dv_SKH])


def _scores(queries: _Queries, keys: _Keys, lead: int, settings: Settings) -> jax.Array:
    """Returns the scaled scores [K, G, c, S], float32; -1e30 where a query does not see a key."""
    K = keys.k_SKH.shape[1]
    q_KGcH = _fold(queries.q_cNH, K)
    scores_KRS = _product("KRH,SKH->KRS", _as_rows(q_KGcH), keys.k_SKH)
    visible_cS = is_visible(
        queries.index_c[:, None] + lead,
        jnp.arange(len(keys.segment_S)),
        queries.segment_c[:, None],
        keys.segment_S,
        settings.causal,
    )
    return scores_KRS.reshape(*q_KGcH.shape[:3], -1) * settings.scale + jnp.where(
        visible_cS, 0.0, _MASKED
    )


def _drop(x_KGcS: jax.Array, queries: _Queries, keys: _Keys, settings: Settings) -> jax.Array:
    """Applies the dropout of weights to weights, or to their gradient."""
    if not settings.dropout_rate:
        return x_KGcS
    is_kept_KGcS = dropout.is_kept(
        keys.seed_N.reshape(*x_KGcS.shape[:2], 1, 1),
        queries.index_c[:, None],
        jnp.arange(x_KGcS.shape[-1]),
        settings.dropout_rate,
    )
    return jnp.where(is_kept_KGcS, x_KGcS / (1 - settings.dropout_rate), 0.0)


def _product(spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """Multiplies in the arrays' dtype; float32."""
    precision = "highest" if x.dtype == jnp.float32 else None
    return jnp.einsum(spec, x, y, preferred_element_type=jnp.float32, precision=precision)


def _fold(x_cNH: jax.Array, K: int) -> jax.Array:
    """Returns [K, G, c, H]: the query heads of one kv head become rows of one matrix product."""
    c, N, H = x_cNH.shape
    return x_cNH.reshape(c, K, N // K, H).transpose(1, 2, 0, 3)


def _as_rows(x_KGcH: jax.Array) -> jax.Array:
    return x_KGcH.reshape(x_KGcH.shape[0], -1, x_KGcH.shape[-1])


def _unfold(x_KGcH: jax.Array) -> jax.Array:
    """Inverse of `_fold`."""
    return x_KGcH.transpose(2, 0, 1, 3).reshape(x_KGcH.shape[2], -1, x_KGcH.shape[-1])
