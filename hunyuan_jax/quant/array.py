"""`QuantArray`: the one form of a quantised weight, for inference.

Letters: I inputs and O outputs of the weight as a matrix, G groups of inputs, M rows of
activations, S slices, K outliers of a slice.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp

# A CPU multiplies up to so many rows one by one: XLA:CPU converts the codes inside a product of a
# matrix with one row, and before any other product (docs/quantization.md).
_FEW_ROWS = 8
# Whether such a product is written as a sum (`_row_product`).
_SUMS_ROWS = jax.version.__version_info__ >= (0, 11)
# Entries of a piece of a matrix that a CPU makes numbers at a time for more rows, so that they
# stay in cache; and pieces at most, each of which is compiled.
_PIECE, _MAX_PIECES = 1 << 18, 16
# Rows up to which other devices multiply group by group, and scale the products (`_of_groups`).
_GROUPED_ROWS = 32


class Outliers(NamedTuple):
    """Entries of a weight that are stored exactly, in S slices of its outputs or inputs.

    position: int32 [*stack, S, K], o * (inputs of a slice) + i in the slice; beyond it: padding.
    value: [*stack, S, K], the entries.
    """

    position: jax.Array
    value: jax.Array


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["values", "scale", "outliers"],
    meta_fields=["num_in", "num_out", "is_out_first", "by_rows", "slices_inputs", "rounds_inputs"],
)
@dataclasses.dataclass(frozen=True)
class QuantArray:
    """The weight values * scale, with outliers in place of some of its entries.

    Takes the place of an array in a nested dict of parameters.  Products with it are `product`.

    values: int8, int4 or float8 [*stack, *in, *out], or [*stack, *out, *in] if is_out_first.  A
      CPU holds four-bit codes one a byte.
    scale: float32, with the dims of values; a dim of size g divides that of values into g blocks
      of one scale each.  Dims of the outputs have a scale for each entry.
    outliers: or None.
    num_in, num_out: number of dims of the inputs and of the outputs.
    by_rows: whether it is the layout of a single CPU device, a matrix [*stack, O, I].
    slices_inputs: what the slices of the outliers divide.
    rounds_inputs: whether products round what they multiply to the dtype of values, one scale a
      row: eight bits times eight bits.  Values then have one scale an output and no outliers.
    """

    values: jax.Array
    scale: jax.Array
    outliers: Outliers | None
    num_in: int = 1
    num_out: int = 1
    is_out_first: bool = False
    by_rows: bool = False
    slices_inputs: bool = False
    rounds_inputs: bool = False

    def __getitem__(self, index: Any) -> Self:
        """Itself for `...`, as a flax Variable asks; an int or array index picks of the stack."""
        return self if index is Ellipsis else jax.tree.map(lambda x: x[index], self)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the values."""
        return self.values.shape

    @property
    def num_stacked(self) -> int:
        """Number of leading dims that stack weights."""
        return self.values.ndim - self.num_in - self.num_out

    def replace(self, **fields: Any) -> Self:
        """A copy with other fields."""
        return dataclasses.replace(self, **fields)

    def matrix(self) -> Self:
        """The same with one dim of inputs and one of outputs."""
        stack = self.values.shape[: self.num_stacked]
        first = self.num_out if self.is_out_first else self.num_in

        def flat(x):
            rows = math.prod(x.shape[len(stack) : len(stack) + first])
            return x.reshape(*stack, rows, -1)

        return self.replace(values=flat(self.values), scale=flat(self.scale), num_in=1, num_out=1)


def is_quantized(leaf: Any) -> bool:
    """Whether a leaf is a QuantArray, for `is_leaf` of jax.tree functions."""
    return isinstance(leaf, QuantArray)


def dequantized(w: QuantArray, dtype: Any) -> jax.Array:
    """The weight as an array of the shape of its values; values * scale is computed in float32."""
    dense = w.values.astype(jnp.float32) * _per_entry(w.scale, w.values.shape)
    dense = dense.astype(dtype)
    return dense if w.outliers is None else _with_outliers(dense, w)


def product(x_MI: jax.Array, w: QuantArray) -> jax.Array:
    """x @ w, [M, O] in x's dtype.

    Args:
      x_MI: float32 or bfloat16.
      w: without stack.
    """
    w = w.matrix()
    if len(x_MI) == 1 and not w.by_rows:
        # XLA:TPU multiplies one row on the vector units, in about 15 times the cycles of two.
        return product(jnp.concatenate([x_MI, jnp.zeros_like(x_MI)]), w)[:1]
    if w.rounds_inputs:
        return _rounded_product(x_MI, w)
    if w.by_rows:
        w, x_MI = _for_xla_cpu(w, x_MI)
    if w.by_rows and x_MI.shape[0] <= _FEW_ROWS:
        y_MO = jnp.concatenate([_row_product(x_MI[m : m + 1], w) for m in range(len(x_MI))])
        return y_MO if w.outliers is None else y_MO + _outlier_product(x_MI, w)
    if w.by_rows and w.outliers is None:
        size = -(-len(w.values) // min(_MAX_PIECES, -(-w.values.size // _PIECE)))
        parts = (slice(i, i + size) for i in range(0, len(w.values), size))
        return jnp.concatenate([_piece_product(x_MI, w[part]) for part in parts], axis=1)
    scale = w.scale if w.is_out_first else w.scale.T
    is_grouped = w.outliers is None and scale.shape[1] > 1
    if is_grouped and len(x_MI) <= _GROUPED_ROWS and not w.by_rows:
        return _of_groups(x_MI, w, scale)
    if w.outliers is not None or scale.shape[1] > 1:
        dense = dequantized(w, x_MI.dtype)
        dense = dense.T if w.is_out_first else dense
        return x_MI @ (_made_for(x_MI, dense) if w.by_rows else dense)
    codes = w.values.astype(x_MI.dtype)
    return (x_MI @ (codes.T if w.is_out_first else codes)) * scale[:, 0].astype(x_MI.dtype)


def _of_groups(x_MI, w, scale_OG):
    """The products with the codes of each group, scaled: with few rows less work than scaling the
    codes.
    """
    num_groups = scale_OG.shape[1]
    shape_AB, axis = w.values.shape, 1 if w.is_out_first else 0
    split = (*shape_AB[:axis], num_groups, shape_AB[axis] // num_groups, *shape_AB[axis + 1 :])
    y_GMO = jnp.einsum(
        "MGg,OGg->GMO" if w.is_out_first else "MGg,GgO->GMO",
        x_MI.reshape(len(x_MI), num_groups, -1),
        w.values.reshape(split).astype(x_MI.dtype),
        preferred_element_type=jnp.float32,
    )
    return (y_GMO * scale_OG.T[:, None]).sum(0).astype(x_MI.dtype)


def _rounded_product(x_MI, w):
    """Both in eight bits: int8 adds up in int32, float8 in float32."""
    dtype = w.values.dtype
    is_int = jnp.issubdtype(dtype, jnp.integer)
    most = 127.0 if is_int else float(jnp.finfo(dtype).max)
    x_MI, of_x = x_MI.astype(jnp.float32), x_MI.dtype
    largest_M1 = jnp.max(jnp.abs(x_MI), axis=1, keepdims=True)
    scale_M1 = jnp.where(largest_M1 > 0, largest_M1 / most, 1.0)
    codes_MI = x_MI / scale_M1
    codes_MI = (jnp.rint(codes_MI) if is_int else codes_MI).astype(dtype)
    y_MO = jax.lax.dot_general(
        codes_MI,
        w.values,
        (((1,), (1 if w.is_out_first else 0,)), ((), ())),
        preferred_element_type=jnp.int32 if is_int else jnp.float32,
    )
    scale_O = w.scale[:, 0] if w.is_out_first else w.scale[0]
    return (y_MO.astype(jnp.float32) * scale_M1 * scale_O).astype(of_x)


def _for_xla_cpu(w, x_MI):
    """Both unchanged, kept where they are used (jax 0.10.2).

    Without the barrier, the codes are converted before a loop of decoding steps, since they depend
    on nothing in it: four times the memory, and slower than numbers.  Without the division by one,
    what computes x is fused into the product, and computed again for every output: XLA fuses no
    division into what reuses it.
    """
    w, x_MI = jax.lax.optimization_barrier((w, x_MI))
    return w, x_MI / jnp.where(jnp.isnan(x_MI), jnp.nan, 1).astype(x_MI.dtype)


def _row_product(x_1I, w):
    """[1, O] of one row, for XLA:CPU, which fuses what makes the matrix into this product: since
    jax 0.11 only into one that is written as a sum (59 us for 576 x 1536 in int8 with jax 0.10.2;
    with 0.12.0.1 570 us, and 117 as a sum).
    """
    if w.scale.shape[1] > 1:
        scale_OI = _per_entry(w.scale, w.values.shape).astype(x_1I.dtype)
        return x_1I @ (w.values.astype(x_1I.dtype) * scale_OI).T
    if _SUMS_ROWS:
        terms_OI = w.values.astype(jnp.float32) * x_1I.astype(jnp.float32)
        y_1O = terms_OI.sum(1)[None].astype(x_1I.dtype)
    else:
        y_1O = x_1I @ w.values.astype(x_1I.dtype).T
    return y_1O * w.scale[:, 0].astype(x_1I.dtype)


def _piece_product(x_MI, w):
    """[M, O] of some outputs, without outliers, for XLA:CPU: the numbers are made before."""
    if w.scale.shape[1] > 1:
        return x_MI @ _made_for(x_MI, dequantized(w, x_MI.dtype).T)
    codes_IO = _made_for(x_MI, w.values.T.astype(x_MI.dtype))
    return (x_MI @ codes_IO) * w.scale[:, 0].astype(x_MI.dtype)


def _made_for(x_MI, numbers_IO):
    """The numbers, made when x is there and before they are multiplied.

    XLA forgets the barrier of `_for_xla_cpu` before it schedules, and would make the numbers of
    all layers first, in new memory.  So x decides a one that they are multiplied by.
    """
    first = x_MI[0, 0]
    one = jnp.where(jnp.isnan(first), 1 + jnp.finfo(x_MI.dtype).eps, 1).astype(x_MI.dtype)
    return jax.lax.optimization_barrier(numbers_IO * one)


def _per_entry(scale, shape):
    for dim, (num_blocks, size) in enumerate(zip(scale.shape, shape, strict=True)):
        if 1 < num_blocks < size:
            scale = jnp.repeat(scale, size // num_blocks, axis=dim)
    return scale


def _places(w):
    """(outputs, inputs) of the outliers, [*stack, S * K]; outputs beyond the last for padding."""
    matrix = w.matrix().values.shape[-2:]
    num_out, num_in = matrix if w.is_out_first else matrix[::-1]
    position = w.outliers.position
    num_slices = position.shape[-2]
    slice_S1 = jnp.arange(num_slices)[:, None]
    per_slice = num_in // num_slices if w.slices_inputs else num_in
    row, column = position // per_slice, position % per_slice
    rows_of_slice = num_out if w.slices_inputs else num_out // num_slices
    is_padding = row >= rows_of_slice
    if w.slices_inputs:
        column = column + slice_S1 * per_slice
    else:
        row = row + slice_S1 * rows_of_slice
    row = jnp.where(is_padding, num_out, row)
    flat = (*position.shape[:-2], -1)
    return row.reshape(flat), column.reshape(flat)


def _outlier_product(x_MI, w):
    """What the outliers add to a product with the codes, which are zero there; [M, O]."""
    row_K, column_K = _places(w)
    added_MK = x_MI[:, column_K] * w.outliers.value.reshape(-1).astype(x_MI.dtype)
    zeros_MO = jnp.zeros((x_MI.shape[0], w.values.shape[0]), x_MI.dtype)
    return zeros_MO.at[:, row_K].add(added_MK, mode="drop")


def _with_outliers(dense, w):
    shape, matrix = dense.shape, w.matrix().values.shape
    num_stacked = w.num_stacked

    def one(dense_AB, row_K, column_K, value_K):
        place = (row_K, column_K) if w.is_out_first else (column_K, row_K)
        return dense_AB.at[place].set(value_K.astype(dense_AB.dtype), mode="drop")

    for _ in range(num_stacked):
        one = jax.vmap(one)
    value = w.outliers.value
    value = value.reshape(*value.shape[:num_stacked], -1)
    return one(dense.reshape(matrix), *_places(w), value).reshape(shape)
