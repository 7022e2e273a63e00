"""flash_attention: attention over packed sequences.

Letters: B batch, T queries, S keys, N query heads, K kv heads, H head dim.
"""

import functools
import types
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from pallas_kernels import select
from pallas_kernels.flash_attention import dropout, reference, tpu, triton, xla
from pallas_kernels.flash_attention.reference import Settings


def _gpu() -> types.ModuleType:
    """The module for Hopper GPUs, imported only for them: Pallas' Mosaic GPU takes 0.2 s."""
    from pallas_kernels.flash_attention import gpu

    return gpu


# In order of preference.  run(q, k, v, query_segment, key_segment, seed_BN, settings, offset,
# device_kind=, interpret=) -> (out_BTNH, lse_BNT), differentiable in q, k and v through both.
_CANDIDATES = (
    select.Implementation("pallas_tpu", tpu.refuse, tpu.attention),
    select.Implementation(
        "pallas_gpu",
        lambda kind, *problem: select.only_on_hopper(kind) or _gpu().refuse(kind, *problem),
        lambda *args, **options: _gpu().attention(*args, **options),
    ),
    select.Implementation("pallas_triton", triton.refuse, triton.attention),
    select.Implementation(
        "xla", lambda *_: None, lambda *args, device_kind, interpret: xla.attention(*args)
    ),
    select.Implementation(
        "reference",
        lambda *_: None,
        lambda *args, device_kind, interpret: reference.attention(*args),
    ),
)
# By the name of the implementation.  run(q, k, v, query_segment, key_segment, out, lse_BNT, dout,
# settings, device_kind=, interpret=) -> (dq, dk, dv).
_GRADIENTS = {
    "pallas_tpu": tpu.gradients,
    "pallas_gpu": triton.gradients,
    "pallas_triton": triton.gradients,
    "xla": lambda *args, device_kind, interpret: xla.gradients(*args),
    "reference": lambda *args, device_kind, interpret: reference.gradients(*args),
}


def flash_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    query_segment_BT: jax.Array,
    key_segment_BS: jax.Array,
    *,
    device_kind: str,
    causal: bool = True,
    scale: float | None = None,
    query_offset: jax.Array | None = None,
    dropout_rate: float = 0.0,
    dropout_seed: jax.Array | None = None,
    with_lse: bool = False,
    implementation: str | Sequence[str] | None = None,
    interpret: bool | object = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Computes softmax(scale q k^T) v over the keys that each query sees.

    Query t sees key s if both have the same segment and, if causal, s <= t + S - T, or
    s <= t + query_offset.  A query that sees no key returns 0, log-sum-exp -inf and no gradient.
    The softmax is float32.  Differentiable in q, k and v.  Memory is linear in T and S, except for
    "reference".

    Args:
      q_BTNH: queries, bfloat16 or float32.  Query head n uses kv head n // (N // K).
      k_BSKH, v_BSKH: keys and values in q's dtype.  The kernels need H to be a multiple of 8.
      query_segment_BT, key_segment_BS: int32 document numbers.  0 is padding, which sees nothing,
        is seen by nothing and may hold NaN.
      device_kind: jax's name of the mesh's devices ("TPU v5", "NVIDIA H200", "cpu").
      causal: whether queries see no later keys.
      scale: factor of the scores, > 0; None for H ** -0.5.
      query_offset: int32 scalar, the index of query 0 among the keys and in its sequence, for a
        caller that holds some of a sequence's queries and all of its keys.  None for S - T.
      dropout_rate: share of the weights set to 0 after the softmax; the others are divided by
        1 - dropout_rate.
      dropout_seed: int32 or uint32 of shape [] or [2], or uint32 [B, N] from `dropout.head_seeds`
        for a caller that shards sequences or heads.  All implementations drop the same weights
        for the same seed.
      with_lse: whether to return the log-sum-exp of the scaled scores too (differentiable).
      implementation: None, a name ("pallas_tpu", "pallas_gpu", "pallas_triton", "xla",
        "reference") or a list of names in order of preference.
      interpret: passed to pallas_call; runs a kernel on the CPU.

    Returns:
      out_BTNH in q's dtype, or (out_BTNH, lse_BNT float32) with `with_lse`.

    Raises:
      ValueError: arguments that do not fit together, or that no named implementation can serve.
    """
    _check(q_BTNH, k_BSKH, v_BSKH, query_segment_BT, key_segment_BS)
    B, _, N, H = q_BTNH.shape
    settings = Settings(
        bool(causal),
        H**-0.5 if scale is None else float(scale),
        float(dropout_rate),
        query_offset is not None,
    )
    _check_settings(settings)
    seed_BN = _seeds(dropout_seed, settings.dropout_rate, B, N)
    chosen = select.choose(
        "flash_attention", _CANDIDATES, implementation, device_kind, q_BTNH, k_BSKH, settings
    )
    run = functools.partial(chosen.run, device_kind=device_kind, interpret=interpret)
    out_BTNH, lse_BNT = run(
        q_BTNH, k_BSKH, v_BSKH, query_segment_BT, key_segment_BS, seed_BN, settings, query_offset
    )
    return (out_BTNH, lse_BNT) if with_lse else out_BTNH


def attention_gradients(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    query_segment_BT: jax.Array,
    key_segment_BS: jax.Array,
    out_BTNH: jax.Array,
    lse_BNT: jax.Array,
    dout_BTNH: jax.Array,
    *,
    device_kind: str,
    causal: bool = True,
    implementation: str | Sequence[str] | None = None,
    interpret: bool | object = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns what these keys add to the gradients of q, k and v, without dropout.

    The queries may see other keys too.  `out_BTNH` and `lse_BNT` are those over all keys, and
    `dout_BTNH` is the gradient of `out_BTNH`; the others are as in `flash_attention`.
    """
    _check(q_BTNH, k_BSKH, v_BSKH, query_segment_BT, key_segment_BS)
    settings = Settings(bool(causal), q_BTNH.shape[-1] ** -0.5, 0.0)
    chosen = select.choose(
        "flash_attention", _CANDIDATES, implementation, device_kind, q_BTNH, k_BSKH, settings
    )
    return _GRADIENTS[chosen.name](
        q_BTNH,
        k_BSKH,
        v_BSKH,
        query_segment_BT,
        key_segment_BS,
        out_BTNH,
        lse_BNT,
        dout_BTNH,
        settings,
        device_kind=device_kind,
        interpret=interpret,
    )


def _check(q_BTNH, k_BSKH, v_BSKH, query_segment_BT, key_segment_BS):
    """Raises ValueError unless the arrays fit together."""
    if q_BTNH.ndim != 4 or k_BSKH.ndim != 4 or k_BSKH.shape != v_BSKH.shape:
        raise ValueError(
            f"q {q_BTNH.shape}, k {k_BSKH.shape}, v {v_BSKH.shape}: need [B, T, N, H] and "
            "[B, S, K, H] twice."
        )
    (B, T, N, H), (B_k, S, K, H_k) = q_BTNH.shape, k_BSKH.shape
    if (B_k, H_k) != (B, H) or N % K:
        raise ValueError(
            f"q {q_BTNH.shape} and k {k_BSKH.shape}: batch and head dim must be equal, and the "
            "query heads (dim 2) a multiple of the kv heads; slice or repeat heads."
        )
    dtypes = {jnp.dtype(x.dtype).name for x in (q_BTNH, k_BSKH, v_BSKH)}
    if len(dtypes) > 1 or not dtypes <= {"bfloat16", "float32"}:
        raise ValueError(
            f"q, k, v of dtypes {sorted(dtypes)}: all three must be bfloat16, or all float32; "
            "cast them."
        )
    shapes = (query_segment_BT.shape, key_segment_BS.shape)
    if shapes != ((B, T), (B, S)) or {query_segment_BT.dtype, key_segment_BS.dtype} != {
        jnp.dtype(jnp.int32)
    }:
        raise ValueError(
            f"query_segment {query_segment_BT.dtype}{list(shapes[0])}, key_segment "
            f"{key_segment_BS.dtype}{list(shapes[1])}: need int32 "
            f"{[B, T]} and {[B, S]}; for one document without padding pass ones."
        )


def _check_settings(settings: Settings):
    """Raises ValueError unless the numbers are in their ranges."""
    if settings.scale <= 0:
        raise ValueError(f"scale = {settings.scale!r} must be positive; negate q instead.")
    if not 0 <= settings.dropout_rate < 1:
        raise ValueError(f"dropout_rate = {settings.dropout_rate!r} must be in [0, 1).")


def _seeds(dropout_seed, dropout_rate, B, N):
    """Returns uint32 [B, N], zeros without dropout."""
    if not dropout_rate:
        return jnp.zeros((B, N), jnp.uint32)
    if dropout_seed is None:
        raise ValueError(
            f"dropout_rate = {dropout_rate} needs a dropout_seed; pass an int32 array of shape "
            "[2], a new one every step."
        )
    if dropout_seed.shape not in ((), (2,), (B, N)) or dropout_seed.dtype not in (
        jnp.int32,
        jnp.uint32,
    ):
        raise ValueError(
            f"dropout_seed {dropout_seed.dtype}{list(dropout_seed.shape)}: must be int32 or "
            f"uint32 of shape [], [2] or [B, N] = {[B, N]}."
        )
    return dropout.head_seeds(dropout_seed, B, N)
