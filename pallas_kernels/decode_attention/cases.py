"""Problems shared by the tests and the benchmark."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Case(NamedTuple):
    """Sizes (letters: dims.md), the queries' dtype, and whether the cache is int8 with scales.

    S: slots of a row.  s: slots of a page; None for a contiguous cache, a page a row.
    """

    B: int
    S: int
    K: int
    N: int
    H: int
    T: int
    dtype: str = "bfloat16"
    is_int8: bool = False
    s: int | None = None
    P: int = 1

    @property
    def num_pages(self) -> int:
        """Pages of a row."""
        return 1 if self.s is None else -(-self.S // self.s)

    def shapes(self) -> list[jax.ShapeDtypeStruct | None]:
        """Shapes and dtypes of q, k, v, length, start, k_scale, v_scale, group and table."""
        Shape = jax.ShapeDtypeStruct
        pages = (self.P, self.B * self.num_pages, self.s or self.S, self.K)
        cache = Shape((*pages, self.H), "int8" if self.is_int8 else self.dtype)
        int_B = Shape((self.B,), "int32")
        scale = Shape(pages, "float32") if self.is_int8 else None
        return [
            Shape((self.B, self.T, self.N, self.H), self.dtype),
            *[cache] * 2,
            *[int_B] * 2,
            *[scale] * 2,
            Shape((), "int32"),
            None if self.s is None else Shape((self.B, self.num_pages), "int32"),
        ]

    def cache_bytes(self) -> int:
        """Bytes a call reads if all slots are filled."""
        return (
            sum(x.size * x.dtype.itemsize for x in self.shapes()[1:7] if x is not None) // self.P
        )


# Hunyuan-Large's heads, 8 sequences of 32 thousand tokens: one token, a draft to verify, the most
# tokens allowed.
BENCH = {
    "T=1": Case(8, 32768, 8, 80, 80, 1),
    "T=4": Case(8, 32768, 8, 80, 80, 4),
    "T=16": Case(8, 32768, 8, 80, 80, 16),
    "T=1 int8": Case(8, 32768, 8, 80, 80, 1, is_int8=True),
    "T=1 B=1": Case(1, 32768, 8, 80, 80, 1),
    "T=1 H=128": Case(8, 32768, 8, 80, 128, 1),
    "T=1 pages": Case(8, 32768, 8, 80, 80, 1, s=128, P=2),
    "T=4 pages": Case(8, 32768, 8, 80, 80, 4, s=128, P=2),
    "T=1 int8 pages": Case(8, 32768, 8, 80, 80, 1, is_int8=True, s=128, P=2),
}

# Small enough for interpreters; S is not a multiple of a block.
SMALL = {
    "one": Case(6, 300, 2, 8, 80, 1),
    "draft": Case(6, 300, 2, 4, 80, 4),
    "most": Case(6, 300, 1, 3, 40, 16),
    "float32": Case(6, 300, 2, 4, 128, 4, "float32"),
    "int8": Case(6, 300, 2, 4, 80, 4, is_int8=True),
    "int8 float32": Case(6, 300, 2, 4, 40, 1, "float32", is_int8=True),
    "pages": Case(6, 384, 2, 4, 80, 4, s=128, P=3),
    "pages int8": Case(6, 384, 2, 4, 40, 1, is_int8=True, s=128, P=2),
}


def inputs(case: Case, seed: int, length_B: Any, start_B: Any) -> list[jax.Array | None]:
    """Returns random arguments in the order of `Case.shapes`.

    Pages lie in a random order.  Slots outside [start, length) and those of other groups hold NaN,
    or for int8 -128 with scale NaN; the table's entries of pages with nothing else are -1.
    """
    rng = np.random.default_rng(seed)
    s, m = case.s or case.S, case.num_pages
    slot_BS = np.broadcast_to(np.arange(m * s), (case.B, m * s))
    is_used_BS = (slot_BS >= np.asarray(start_B)[:, None]) & (
        slot_BS < np.asarray(length_B)[:, None]
    )
    is_used_ns = is_used_BS.reshape(-1, s)
    page_n = np.arange(len(is_used_ns)) if case.s is None else rng.permutation(len(is_used_ns))
    group = int(rng.integers(case.P))

    def paged(used_BS, unused, dtype):
        x_Pns = np.full((case.P, *is_used_ns.shape, *used_BS.shape[2:]), unused, np.float32)
        x_ns = used_BS.reshape(-1, s, *used_BS.shape[2:])
        x_Pns[group, page_n] = np.where(
            is_used_ns.reshape(*is_used_ns.shape, *[1] * (x_ns.ndim - 2)), x_ns, unused
        )
        return jnp.asarray(x_Pns, dtype)

    q_BTNH = jnp.asarray(rng.standard_normal((case.B, case.T, case.N, case.H)), case.dtype)
    caches, scales = [], []
    for _ in range(2):
        x_BSKH = rng.standard_normal((case.B, m * s, case.K, case.H), np.float32)
        if not case.is_int8:
            caches.append(paged(x_BSKH, np.nan, case.dtype))
            scales.append(None)
            continue
        scale_BSK = np.abs(x_BSKH).max(-1) / 127
        caches.append(paged(np.round(x_BSKH / scale_BSK[..., None]), -128, jnp.int8))
        scales.append(paged(scale_BSK, np.nan, jnp.float32))
    table_Bm = np.where(is_used_ns.any(1), page_n, -1).reshape(case.B, m)
    return [
        q_BTNH,
        *caches,
        jnp.asarray(length_B, jnp.int32),
        jnp.asarray(start_B, jnp.int32),
        *scales,
        jnp.int32(group),
        None if case.s is None else jnp.asarray(table_Bm, jnp.int32),
    ]
