"""Problems shared by the tests and the benchmark."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.flash_attention.reference import Settings


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes and settings of one call of flash_attention.

    B batch, T queries, S keys, N query heads, K kv heads, H head dim.
    documents: documents packed into each sequence.
    padding: slots of padding at the end of each sequence.
    """

    name: str
    B: int
    T: int
    S: int
    N: int
    K: int
    H: int
    dtype: str = "bfloat16"
    causal: bool = True
    dropout_rate: float = 0.0
    documents: int = 1
    padding: int = 0

    @property
    def settings(self) -> dict:
        """Keyword arguments of flash_attention but device_kind and implementation."""
        seed = {"dropout_seed": jnp.array([3, 5], jnp.uint32)} if self.dropout_rate else {}
        return {
            "causal": self.causal,
            "dropout_rate": self.dropout_rate,
        } | seed

    @property
    def static(self) -> Settings:
        """The settings as the implementations take them."""
        return Settings(self.causal, self.H**-0.5, self.dropout_rate)

    def shapes(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes and dtypes of q, k, v, query_segment and key_segment."""
        q, kv = (self.B, self.T, self.N, self.H), (self.B, self.S, self.K, self.H)
        segments = [
            jax.ShapeDtypeStruct((self.B, length), jnp.int32) for length in (self.T, self.S)
        ]
        return (*(jax.ShapeDtypeStruct(shape, self.dtype) for shape in (q, kv, kv)), *segments)

    def arrays(self, rng: np.random.Generator) -> tuple[jax.Array, ...]:
        """Random q, k, v, query_segment and key_segment, with NaN in the padding."""
        key_segment_BS = np.stack([self._segments(rng) for _ in range(self.B)])
        # The last T slots; queries before the first key (T > S) are padding.
        query_segment_BT = np.pad(key_segment_BS, ((0, 0), (max(self.T - self.S, 0), 0)))[
            :, -self.T :
        ]
        segments = (query_segment_BT, key_segment_BS, key_segment_BS)
        q_k_v = []
        for shape, segment in zip(self.shapes()[:3], segments, strict=True):
            data = rng.standard_normal(shape.shape, np.float32)
            q_k_v.append(
                jnp.array(np.where(segment[:, :, None, None] > 0, data, np.nan), self.dtype)
            )
        return (*q_k_v, jnp.array(query_segment_BT), jnp.array(key_segment_BS))

    def _segments(self, rng: np.random.Generator) -> np.ndarray:
        length = self.S - self.padding
        starts = rng.choice(np.arange(1, length), self.documents - 1, replace=False)
        segment = 1 + np.searchsorted(np.sort(starts), np.arange(length), side="right")
        return np.pad(segment, (0, self.padding)).astype(np.int32)

    def visible_pairs(self) -> float:
        """Visible query-key pairs of one head and sequence, ignoring packing and padding."""
        if not self.causal:
            return float(self.T * self.S)
        return float(np.clip(np.arange(self.T) + self.S - self.T + 1, 0, self.S).sum())

    def flops(self, backward: bool) -> float:
        """FLOP of the two products forward, or the five backward, over the visible pairs."""
        return (5 if backward else 2) * 2 * self.H * self.visible_pairs() * self.B * self.N


# Small enough to interpret.  Every feature alone, then together at odd sizes.
TESTED = (
    Case("causal", 1, 256, 256, 2, 1, 80),
    Case("causal float32", 2, 128, 128, 2, 2, 128, dtype="float32"),
    Case("not causal", 1, 128, 256, 2, 1, 16, dtype="float32", causal=False),
    Case("packed", 2, 384, 384, 3, 1, 80, documents=4),
    Case("padded", 2, 256, 256, 2, 1, 64, documents=2, padding=140),
    Case("many blocks", 1, 512, 512, 2, 1, 16),
    Case("dropout", 2, 128, 256, 4, 2, 16, dropout_rate=0.3),
    Case("one query", 2, 1, 200, 4, 2, 80, dtype="float32"),
    Case("more queries than keys", 1, 300, 130, 2, 1, 24, dtype="float32"),
    Case("everything float32", 2, 203, 331, 6, 2, 40, "float32", True, 0.2, 3, 37),
    Case("everything bfloat16", 2, 331, 331, 6, 2, 80, "bfloat16", True, 0.2, 3, 37),
)

# Hunyuan-Large (80 query heads, 8 kv heads), all heads and one of 8 tensor shards; the usual head
# dim of other models; long texts.
TIMED = (
    Case("hunyuan 4k", 1, 4096, 4096, 80, 8, 80),
    Case("hunyuan 4k packed", 1, 4096, 4096, 80, 8, 80, documents=8),
    Case("hunyuan 16k, one group", 1, 16384, 16384, 10, 1, 80),
    Case("d128 4k", 1, 4096, 4096, 64, 8, 128),
    Case("d128 16k", 1, 16384, 16384, 16, 16, 128),
)
LONG = Case("256k, one group", 1, 2**18, 2**18, 10, 1, 80)
