"""decode_attention: attention of a few new tokens to a long cache.  Shape letters: dims.md."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import select
from pallas_kernels.decode_attention import reference, tpu, triton

MAX_TOKENS = 16


def _run_tpu(device_kind, interpret, q_BTNH, k_BSKH, *rest):
    cfg = tpu.config(device_kind, q_BTNH.shape, k_BSKH.shape, k_BSKH.dtype)
    return tpu.run(q_BTNH, k_BSKH, *rest, cfg=cfg, interpret=interpret)


def _run_triton(_, interpret, q_BTNH, k_BSKH, *rest):
    return triton.run(
        q_BTNH, k_BSKH, *rest, cfg=triton.config(q_BTNH.shape, k_BSKH.shape), interpret=interpret
    )


IMPLEMENTATIONS = (
    select.Implementation("pallas_tpu", tpu.refuse, _run_tpu),
    select.Implementation("pallas_triton", triton.refuse, _run_triton),
    select.Implementation(
        "xla", lambda *_: None, lambda _, interpret, *args: reference.xla(*args)
    ),
    select.Implementation(
        "reference", lambda *_: None, lambda _, interpret, *args: reference.reference(*args)
    ),
)


def decode_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    length_B: jax.Array,
    *,
    device_kind: str,
    start_B: jax.Array | None = None,
    k_scale_BSK: jax.Array | None = None,
    v_scale_BSK: jax.Array | None = None,
    scale: float | None = None,
    implementation: str | Sequence[str] | None = None,
    interpret: Any = False,
) -> jax.Array:
    """Attends with the last T tokens of each sequence to its cache, which includes them.

    Query head n uses kv head n // (N // K).  Query t sees the slots from start up to and including
    its own, length - T + t; a query that sees no slot returns zeros.  Slots outside [start,
    length) may hold anything, NaN too; on TPU and GPU, blocks of them are not fetched.  Has no
    gradient.

    On a TPU the kernel reads [B, K, H, S].  XLA stores a [B, S, K, H] array in that order unless H
    is a multiple of 128, and scales as [B, K, S], so the transpose is free.  With H = 128 it would
    copy the cache in every call: keep the cache as [B, K, H, S] then and pass its transpose; XLA
    drops both transposes.

    Args:
      q_BTNH: 1 to 16 new tokens of each sequence, bfloat16 or float32.
      k_BSKH, v_BSKH: the cache with the new tokens' keys and values, in q's dtype or int8.  The
        kernels need H to be a multiple of 8.
      length_B: int32 numbers of filled slots, at most S.
      device_kind: jax's name of the mesh's devices, such as "TPU v5".
      start_B: int32 first slots that hold a token, for a cache padded on the left; None for 0.
      k_scale_BSK, v_scale_BSK: float32 factors of an int8 cache's values.
      scale: factor of the scores; None for H ** -0.5.
      implementation: None, a name ("pallas_tpu", "pallas_triton", "xla", "reference") or a list of
        names in order of preference.
      interpret: passed to pallas_call; runs a kernel on the CPU.

    Returns:
      [B, T, N, H] in q's dtype.

    Raises:
      ValueError: shapes or dtypes that do not fit together, or that no named implementation can
        serve.
    """
    _check(
        q_BTNH,
        k_BSKH,
        v_BSKH,
        {"length_B": length_B} | ({} if start_B is None else {"start_B": start_B}),
    )
    _check_scales(k_BSKH, k_scale_BSK, v_scale_BSK)
    chosen = select.choose(
        "decode_attention", IMPLEMENTATIONS, implementation, device_kind, q_BTNH.shape[-1]
    )
    start_B = jnp.zeros_like(length_B) if start_B is None else start_B
    scale = q_BTNH.shape[-1] ** -0.5 if scale is None else scale
    return chosen.run(
        device_kind,
        interpret,
        q_BTNH,
        k_BSKH,
        v_BSKH,
        length_B,
        start_B,
        k_scale_BSK,
        v_scale_BSK,
        scale,
    )


def _check(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, integers: dict[str, jax.Array]
) -> None:
    if q_BTNH.ndim != 4 or k_BSKH.ndim != 4 or k_BSKH.shape != v_BSKH.shape:
        raise ValueError(
            f"q {q_BTNH.shape}, k {k_BSKH.shape} and v {v_BSKH.shape} must be [B, T, N, H] and "
            "twice [B, S, K, H]; reshape."
        )
    (B, T, N, H), (cache_B, S, K, cache_H) = q_BTNH.shape, k_BSKH.shape
    if (cache_B, cache_H) != (B, H):
        raise ValueError(
            f"q {q_BTNH.shape} and the cache {k_BSKH.shape} must agree in batch and head dim; "
            "slice the one that is larger."
        )
    if N % K:
        raise ValueError(
            f"{N} query heads cannot share {K} kv heads evenly; choose N a multiple of K."
        )
    if not 1 <= T <= min(MAX_TOKENS, S):
        raise ValueError(
            f"{T} query tokens for {S} slots: must be 1 to {MAX_TOKENS} and fit in; use "
            "flash_attention for a prompt."
        )
    if q_BTNH.dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"q is {q_BTNH.dtype}, must be bfloat16 or float32; cast it.")
    if k_BSKH.dtype != v_BSKH.dtype or k_BSKH.dtype not in (q_BTNH.dtype, jnp.int8):
        raise ValueError(
            f"the cache is {k_BSKH.dtype} and {v_BSKH.dtype}, must be {q_BTNH.dtype} as q or "
            "int8; cast q."
        )
    for name, x_B in integers.items():
        if x_B.shape != (B,) or x_B.dtype != jnp.int32:
            raise ValueError(
                f"{name} is {x_B.dtype}{list(x_B.shape)}, must be int32[{B}]; give one number per "
                "sequence."
            )


def _check_scales(
    k_BSKH: jax.Array, k_scale_BSK: jax.Array | None, v_scale_BSK: jax.Array | None
) -> None:
    for name, scale_BSK in (("k_scale_BSK", k_scale_BSK), ("v_scale_BSK", v_scale_BSK)):
        if (k_BSKH.dtype == jnp.int8) != (scale_BSK is not None):
            given = "missing" if scale_BSK is None else "given"
            raise ValueError(
                f"{name} is {given} with a cache of {k_BSKH.dtype}; pass both scales with int8, "
                "else none."
            )
        if scale_BSK is not None and (
            scale_BSK.shape != k_BSKH.shape[:3] or scale_BSK.dtype != jnp.float32
        ):
            raise ValueError(
                f"{name} is {scale_BSK.dtype}{list(scale_BSK.shape)}, must be "
                f"float32{list(k_BSKH.shape[:3])}; reshape it."
            )
