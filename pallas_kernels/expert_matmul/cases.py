"""Problems shared by the tests and the benchmark."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.expert_matmul.quantized import is_valid


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes of one call of swiglu.

    fill: share of each source block's rows that are valid; "random" draws the counts, "none"
    passes no counts.
    """

    name: str
    e: int
    sources: int
    rows_per_source: int
    D: int
    F: int
    fill: float | str = 1.0
    dtype: str = "bfloat16"

    @property
    def C(self) -> int:
        """Rows of an expert's buffer."""
        return self.sources * self.rows_per_source

    @property
    def flops(self) -> int:
        """FLOP of one product over all rows."""
        return 2 * self.e * self.C * self.D * self.F

    def counts(self, seed: int = 0) -> jax.Array | None:
        """The argument count_es."""
        if self.fill == "none":
            return None
        shape = (self.e, self.sources)
        if self.fill == "random":
            return jnp.asarray(
                np.random.default_rng(seed).integers(0, self.rows_per_source + 1, shape), jnp.int32
            )
        return jnp.full(shape, int(self.fill * self.rows_per_source), jnp.int32)

    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of swiglu's arrays."""
        e, C, D, F = self.e, self.C, self.D, self.F
        S = jax.ShapeDtypeStruct
        weights = {"w_gate_eDF": (e, D, F), "w_up_eDF": (e, D, F), "w_down_eFD": (e, F, D)}
        return {
            "x_eCD": S((e, C, D), self.dtype),
            "row_weight_eC": S((e, C), jnp.float32),
            "count_es": None if self.fill == "none" else S((e, self.sources), jnp.int32),
            **{name: S(shape, self.dtype) for name, shape in weights.items()},
        }

    def arrays(self, seed: int, unused: float = np.nan) -> dict[str, Any]:
        """Random arrays; invalid rows hold `unused`."""
        rng = np.random.default_rng(seed)
        arrays: dict[str, Any] = {}
        for name, like in self.shapes().items():
            if name == "count_es":
                arrays[name] = self.counts(seed)
            elif like is not None:
                scale = 1.0 if name in ("x_eCD", "row_weight_eC") else like.shape[1] ** -0.5
                arrays[name] = jnp.asarray(scale * rng.standard_normal(like.shape), like.dtype)
        valid_eC = is_valid(arrays["count_es"], (self.e, self.C))
        arrays["x_eCD"] = jnp.where(valid_eC[..., None], arrays["x_eCD"], unused)
        return arrays


# One expert of A52B on each of 16 chips, 4096 tokens a chip: the size the kernels are made for.
A52B = Case("a52b", e=1, sources=16, rows_per_source=256, D=6400, F=18304)
A52B_HALF = dataclasses.replace(A52B, name="a52b_half", fill=0.5)
A52B_DENSE = dataclasses.replace(A52B, name="a52b_dense", fill="none")

# Small ones that meet every edge: odd sizes, rows that do not fill a granule, empty experts,
# several blocks of everything.
SMALL = [
    Case("one_block", e=1, sources=4, rows_per_source=32, D=128, F=256),
    Case("odd", e=2, sources=3, rows_per_source=7, D=72, F=200, fill="random"),
    Case("many_blocks", e=2, sources=4, rows_per_source=40, D=160, F=300, fill="random"),
    Case("half", e=1, sources=4, rows_per_source=64, D=128, F=384, fill=0.5),
    Case("empty", e=3, sources=2, rows_per_source=32, D=128, F=128, fill=0.0),
    Case("dense", e=1, sources=1, rows_per_source=96, D=128, F=384, fill="none"),
    Case(
        "dense_odd", e=1, sources=1, rows_per_source=50, D=80, F=130, fill="none", dtype="float32"
    ),
    Case(
        "float32", e=2, sources=2, rows_per_source=48, D=160, F=256, fill="random", dtype="float32"
    ),
]
