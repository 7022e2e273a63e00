"""Quantised weights, and which rows of an expert's buffer are valid.

Letters: e experts, C rows of an expert's buffer, s source blocks of C / s rows each, I rows and O
columns of a weight, G groups of its rows.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Quantized(NamedTuple):
    """A weight [e, I, O] as values * scale, for inference.

    values_eIO: int8, int4 or float8.
    scale_eGO: float32; row i of the weight has the scales of group i // (I / G).  G divides I.
    """

    values_eIO: jax.Array
    scale_eGO: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight, (e, I, O)."""
        return self.values_eIO.shape


Weights = jax.Array | Quantized


def dequantized(w: Weights, dtype: Any) -> jax.Array:
    """Returns a weight as an array [e, I, O] in `dtype`; values * scale is computed in float32."""
    if not isinstance(w, Quantized):
        return w.astype(dtype)
    e, num_in, num_out = w.shape
    grouped_eGIO = w.values_eIO.astype(jnp.float32).reshape(e, w.scale_eGO.shape[1], -1, num_out)
    return (grouped_eGIO * w.scale_eGO[:, :, None]).reshape(e, num_in, num_out).astype(dtype)


def is_valid(count_es: jax.Array | None, shape_eC: tuple[int, int]) -> jax.Array:
    """Returns bool [e, C]: the first count_es[e, i] rows of block i, or all if it is None."""
    if count_es is None:
        return jnp.ones(shape_eC, bool)
    e, num_rows = shape_eC
    row_in_block = jnp.arange(num_rows // count_es.shape[1])
    return (row_in_block < count_es[..., None]).reshape(e, num_rows)
