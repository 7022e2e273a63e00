"""Problems shared by the tests and the benchmark."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Case(NamedTuple):
    """Sizes (letters: dims.md), the queries' dtype, and whether the cache is int8 with scales."""

    B: int
    S: int
    K: int
    N: int
    H: int
    T: int
    dtype: str = "bfloat16"
    is_int8: bool = False

    def shapes(self) -> list[jax.ShapeDtypeStruct | None]:
        """Shapes and dtypes of q, k, v, length, start, k_scale and v_scale."""
        cache = jax.ShapeDtypeStruct(
            (self.B, self.S, self.K, self.H), "int8" if self.is_int8 else self.dtype
        )
        int_B = jax.ShapeDtypeStruct((self.B,), "int32")
        scale = jax.ShapeDtypeStruct((self.B, self.S, self.K), "float32") if self.is_int8 else None
        return [
            jax.ShapeDtypeStruct((self.B, self.T, self.N, self.H), self.dtype),
            cache,
            cache,
            int_B,
            int_B,
            scale,
            scale,
        ]

    def cache_bytes(self) -> int:
        """Bytes a call reads if all slots are filled."""
        return sum(x.size * x.dtype.itemsize for x in self.shapes()[1:] if x is not None)


# Hunyuan-Large's heads, 8 sequences of 32 thousand tokens: one token, a draft to verify, the most
# tokens allowed.
BENCH = {
    "T=1": Case(8, 32768, 8, 80, 80, 1),
    "T=4": Case(8, 32768, 8, 80, 80, 4),
    "T=16": Case(8, 32768, 8, 80, 80, 16),
    "T=1 int8": Case(8, 32768, 8, 80, 80, 1, is_int8=True),
    "T=1 B=1": Case(1, 32768, 8, 80, 80, 1),
    "T=1 H=128": Case(8, 32768, 8, 80, 128, 1),
}

# Small enough for interpreters; S is not a multiple of a block.
SMALL = {
    "one": Case(6, 300, 2, 8, 80, 1),
    "draft": Case(6, 300, 2, 4, 80, 4),
    "most": Case(6, 300, 1, 3, 40, 16),
    "float32": Case(6, 300, 2, 4, 128, 4, "float32"),
    "int8": Case(6, 300, 2, 4, 80, 4, is_int8=True),
    "int8 float32": Case(6, 300, 2, 4, 40, 1, "float32", is_int8=True),
}


def inputs(case: Case, seed: int, length_B: Any, start_B: Any) -> list[jax.Array | None]:
    """Returns random arguments in the order of `Case.shapes`.

    Slots outside [start, length) hold NaN, or for int8 -128 with scale NaN.
    """
    rng = np.random.default_rng(seed)
    slot_S = np.arange(case.S)
    is_unused_BS = (slot_S < np.asarray(start_B)[:, None]) | (
        slot_S >= np.asarray(length_B)[:, None]
    )
    q_BTNH = jnp.asarray(rng.standard_normal((case.B, case.T, case.N, case.H)), case.dtype)
    caches, scales = [], []
    for _ in range(2):
        x_BSKH = rng.standard_normal((case.B, case.S, case.K, case.H))
        if not case.is_int8:
            caches.append(
                jnp.asarray(np.where(is_unused_BS[..., None, None], np.nan, x_BSKH), case.dtype)
            )
            scales.append(None)
            continue
        scale_BSK = np.abs(x_BSKH).max(-1) / 127
        caches.append(
            jnp.asarray(
                np.where(
                    is_unused_BS[..., None, None], -128, np.round(x_BSKH / scale_BSK[..., None])
                ),
                jnp.int8,
            )
        )
        scales.append(
            jnp.asarray(np.where(is_unused_BS[..., None], np.nan, scale_BSK), jnp.float32)
        )
    return [
        q_BTNH,
        *caches,
        jnp.asarray(length_B, jnp.int32),
        jnp.asarray(start_B, jnp.int32),
        *scales,
    ]
