"""decode_attention: attention of a few new tokens to a long cache, contiguous or in pages.

Shape letters: dims.md; n pages, s slots of a page, m pages of a row.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import select
from pallas_kernels.decode_attention import reference, tpu, triton

MAX_TOKENS = 16
_FEW_BITS = (jnp.int8, jnp.float8_e4m3fn)


def _run_tpu(device_kind, interpret, q_BTNH, k_PnsKH, *rest):
    shapes = q_BTNH.shape, k_PnsKH.shape
    cfg = tpu.config(device_kind, *shapes, k_PnsKH.dtype, _pages_of_row(*rest))
    return tpu.run(q_BTNH, k_PnsKH, *rest, cfg=cfg, interpret=interpret)


def _run_triton(_, interpret, q_BTNH, k_PnsKH, *rest):
    cfg = triton.config(q_BTNH.shape, k_PnsKH.shape, _pages_of_row(*rest))
    return triton.run(q_BTNH, k_PnsKH, *rest, cfg=cfg, interpret=interpret)


def _pages_of_row(*rest):
    table_Bm = rest[-2]
    return 1 if table_Bm is None else table_Bm.shape[1]


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
    k_PnsKH: jax.Array,
    v_PnsKH: jax.Array,
    length_B: jax.Array,
    *,
    group: jax.Array | int,
    device_kind: str,
    table_Bm: jax.Array | None = None,
    start_B: jax.Array | None = None,
    k_scale_PnsK: jax.Array | None = None,
    v_scale_PnsK: jax.Array | None = None,
    scale: float | None = None,
    with_lse: bool = False,
    implementation: str | Sequence[str] | None = None,
    interpret: Any = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Attends with the last T tokens of each sequence to its cache, which includes them.

    Slot i of row b is slot i % s of page table_Bm[b, i // s]; without a table the cache is
    contiguous: page b is row b.  Query head n uses kv head n // (N // K).  Query t sees the slots
    from start up to and including its own, length - T + t; a query that sees no slot returns
    zeros.  Slots outside [start, length) may hold anything, NaN too, and so may the table's
    entries of pages without any other slots; on TPU and GPU, blocks of them are not fetched.  Has
    no gradient.

    The group's index is an operand of the kernels on TPU and GPU, so that a scan over groups makes
    no copy of the cache.  On a TPU the kernel reads [P, n, K, H, s].  XLA stores a [P, n, s, K, H]
    array in that order unless H is a multiple of 128, and scales as [P, n, K, s], so the transpose
    is free.  With H = 128 it would copy the cache in every call: keep the cache as [P, n, K, H, s]
    then and pass its transpose; XLA drops both transposes.

    Args:
      q_BTNH: 1 to 16 new tokens of each sequence, bfloat16 or float32.
      k_PnsKH, v_PnsKH: the cache of P groups of layers with the new tokens' keys and values, in
        q's dtype, int8 or float8_e4m3fn.  The kernels need H to be a multiple of 8, and with a
        table s to be a multiple of 128 (TPU) or 16 (GPU).
      length_B: int32 numbers of filled slots, at most m * s.
      group: int32 scalar, the entry of P to read.
      device_kind: jax's name of the mesh's devices, such as "TPU v5".
      table_Bm: int32 numbers of each row's pages; None for n = B contiguous rows.
      start_B: int32 first slots that hold a token, for a cache padded on the left; None for 0.
      k_scale_PnsK, v_scale_PnsK: float32 factors of an int8 or float8 cache.
      scale: factor of the scores; None for H ** -0.5.
      with_lse: whether to return the log-sum-exp of the scaled scores too, by which results over
        parts of a cache are merged; -inf where no slot is seen.
      implementation: None, a name ("pallas_tpu", "pallas_triton", "xla", "reference") or a list of
        names in order of preference.
      interpret: passed to pallas_call; runs a kernel on the CPU.

    Returns:
      [B, T, N, H] in q's dtype, or (that, float32 [B, T, N]) with `with_lse`.

    Raises:
      ValueError: shapes or dtypes that do not fit together, or that no named implementation can
        serve.
    """
    _check(q_BTNH, k_PnsKH, v_PnsKH, table_Bm)
    _check_integers(q_BTNH.shape[0], {"length_B": length_B, "start_B": start_B})
    _check_scales(k_PnsKH, k_scale_PnsK, v_scale_PnsK)
    chosen = select.choose(
        "decode_attention",
        IMPLEMENTATIONS,
        implementation,
        device_kind,
        q_BTNH.shape[-1],
        k_PnsKH.shape[2],
        None if table_Bm is None else table_Bm.shape,
    )
    out_BTNH, lse_BTN = chosen.run(
        device_kind,
        interpret,
        q_BTNH,
        k_PnsKH,
        v_PnsKH,
        length_B,
        jnp.zeros_like(length_B) if start_B is None else start_B,
        k_scale_PnsK,
        v_scale_PnsK,
        group,
        table_Bm,
        q_BTNH.shape[-1] ** -0.5 if scale is None else scale,
    )
    return (out_BTNH, lse_BTN) if with_lse else out_BTNH


def _check(
    q_BTNH: jax.Array, k_PnsKH: jax.Array, v_PnsKH: jax.Array, table_Bm: jax.Array | None
) -> None:
    if q_BTNH.ndim != 4 or k_PnsKH.ndim != 5 or k_PnsKH.shape != v_PnsKH.shape:
        raise ValueError(
            f"q {q_BTNH.shape}, k {k_PnsKH.shape} and v {v_PnsKH.shape} must be [B, T, N, H] and "
            "twice [P, pages, slots, K, H]; reshape."
        )
    (B, T, N, H), (_, num_pages, S, K, cache_H) = q_BTNH.shape, k_PnsKH.shape
    if table_Bm is None and num_pages != B:
        raise ValueError(
            f"{num_pages} pages for {B} rows: without a table each row has one; pass table_Bm."
        )
    if table_Bm is not None:
        if table_Bm.ndim != 2 or table_Bm.shape[0] != B or table_Bm.dtype != jnp.int32:
            raise ValueError(
                f"table_Bm is {table_Bm.dtype}{list(table_Bm.shape)}, must be int32[{B}, pages of "
                "a row]; give one list of pages per sequence."
            )
        S *= table_Bm.shape[1]
    if cache_H != H:
        raise ValueError(
            f"q {q_BTNH.shape} and the cache {k_PnsKH.shape} must agree in head dim; slice the "
            "one that is larger."
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
    if k_PnsKH.dtype != v_PnsKH.dtype or k_PnsKH.dtype not in (q_BTNH.dtype, *_FEW_BITS):
        raise ValueError(
            f"the cache is {k_PnsKH.dtype} and {v_PnsKH.dtype}, must be {q_BTNH.dtype} as q, "
            "int8 or float8_e4m3fn; cast q."
        )


def _check_integers(batch_size: int, integers: dict[str, jax.Array | None]) -> None:
    for name, x_B in integers.items():
        if x_B is not None and (x_B.shape != (batch_size,) or x_B.dtype != jnp.int32):
            raise ValueError(
                f"{name} is {x_B.dtype}{list(x_B.shape)}, must be int32[{batch_size}]; give one "
                "number per sequence."
            )


def _check_scales(
    k_PnsKH: jax.Array, k_scale_PnsK: jax.Array | None, v_scale_PnsK: jax.Array | None
) -> None:
    for name, scale_PnsK in (("k_scale_PnsK", k_scale_PnsK), ("v_scale_PnsK", v_scale_PnsK)):
        if (k_PnsKH.dtype in _FEW_BITS) != (scale_PnsK is not None):
            given = "missing" if scale_PnsK is None else "given"
            raise ValueError(
                f"{name} is {given} with a cache of {k_PnsKH.dtype}; pass both scales with int8 "
                "or float8_e4m3fn, else none."
            )
        if scale_PnsK is not None and (
            scale_PnsK.shape != k_PnsKH.shape[:4] or scale_PnsK.dtype != jnp.float32
        ):
            raise ValueError(
                f"{name} is {scale_PnsK.dtype}{list(scale_PnsK.shape)}, must be "
                f"float32{list(k_PnsKH.shape[:4])}; reshape it."
            )
