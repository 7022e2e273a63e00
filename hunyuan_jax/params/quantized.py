"""Puts the codes of a parameter's matrices together as a QuantArray on a mesh."""

import math
from collections.abc import Mapping, Sequence

import jax
import ml_dtypes
import numpy as np
from jax.sharding import NamedSharding

from hunyuan_jax.errors import ConfigError
from hunyuan_jax.parallel import rules
from hunyuan_jax.parallel.mesh import device_kind
from hunyuan_jax.params.abstract import ParamSpec
from hunyuan_jax.quant.array import Outliers, QuantArray
from hunyuan_jax.quant.codes import Codes


def assembled(
    name: str,
    spec: ParamSpec,
    matrices: Mapping[tuple[int, ...], Codes],
    *,
    is_transposed: bool,
    is_frozen: bool = False,
) -> QuantArray:
    """A quantised parameter, laid out as its spec says.

    On a single CPU device it is laid out for products with a few rows (`QuantArray.by_rows`).

    Args:
      name: for errors.
      spec: of the parameter.
      matrices: [O, I] by their index in the stack, each taken once and then dropped.
      is_transposed: whether the parameter has its inputs first.
      is_frozen: whether it lies as the parameter would everywhere, for training beside it.

    Raises:
      ConfigError: matrices of different kinds.
    """
    mesh = spec.sharding.mesh
    first = next(iter(matrices.values()))
    _check_kinds(name, matrices)
    array = layout(spec, first, is_transposed=is_transposed, is_frozen=is_frozen)
    stack = spec.shape[: spec.num_stacked]
    values = np.empty(array.values.shape, array.values.dtype)
    scale = np.empty(array.scale.shape, np.float32)
    for index, codes in matrices.items():
        num_groups = scale[index].size // len(codes.values)
        of_groups = np.repeat(codes.scale, num_groups // codes.scale.shape[1], axis=1)
        turned = (codes.values, of_groups)
        if not array.is_out_first:
            turned = (codes.values.T, of_groups.T)
        values[index] = turned[0].reshape(values[index].shape)
        scale[index] = turned[1].reshape(scale[index].shape)
    outliers = None
    if first.position is not None:
        num_slices, _ = rules.num_slices(mesh, spec.dims, spec.num_stacked)
        slices_inputs = array.slices_inputs
        outliers = _outliers(matrices, stack, num_slices, slices_inputs=slices_inputs)
    array = array.replace(values=values, scale=scale, outliers=outliers)
    if array.by_rows:
        return jax.tree.map(jax.device_put, array)

    def put(x, spec):
        return jax.make_array_from_callback(
            x.shape, NamedSharding(mesh, spec), lambda index: x[index]
        )

    return jax.tree.map(put, array, rules.quantized_specs(spec.dims, array))


def layout(
    spec: ParamSpec, codes: Codes, *, is_transposed: bool, is_frozen: bool = False
) -> QuantArray:
    """A quantised parameter without its numbers and outliers: `ShapeDtypeStruct`s with shardings.

    Args:
      codes: one of its matrices, [O, I].
    """
    mesh = spec.sharding.mesh
    stack, dims = spec.shape[: spec.num_stacked], spec.shape[spec.num_stacked :]
    num_out, num_in = codes.values.shape
    by_rows = mesh.size == 1 and device_kind(mesh) == "cpu" and not is_frozen
    is_out_first = by_rows or not is_transposed
    in_dims, out_dims = _split(dims, num_in if is_transposed else num_out)
    in_dims, out_dims = (in_dims, out_dims) if is_transposed else (out_dims, in_dims)
    if by_rows:  # XLA:CPU does not vectorise a product with several dims of inputs
        in_dims, out_dims = (num_in,), (num_out,)
    num_slices, sliced_dim = rules.num_slices(mesh, spec.dims, spec.num_stacked)
    slices_inputs = (sliced_dim < len(in_dims)) == is_transposed
    blocks = _in_blocks(codes, in_dims, num_slices if slices_inputs else 1)
    ordered = (*out_dims, *in_dims) if is_out_first else (*in_dims, *out_dims)
    scale_shape = (*out_dims, *blocks) if is_out_first else (*blocks, *out_dims)
    is_packed = codes.bits == 4 and device_kind(mesh) != "cpu"
    dtype = np.dtype(ml_dtypes.int4) if is_packed else codes.values.dtype
    array = QuantArray(
        jax.ShapeDtypeStruct((*stack, *ordered), dtype),
        jax.ShapeDtypeStruct((*stack, *scale_shape), np.float32),
        None,
        num_in=len(in_dims),
        num_out=len(out_dims),
        is_out_first=is_out_first,
        by_rows=by_rows,
        slices_inputs=slices_inputs,
    )
    if by_rows:
        return array

    def placed(x, spec):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(placed, array, rules.quantized_specs(spec.dims, array))


def _check_kinds(name: str, matrices: Mapping[tuple[int, ...], Codes]) -> None:
    kinds: dict[str, tuple[int, ...]] = {}
    for index, codes in matrices.items():
        kinds.setdefault(codes.kind, index)
    if len(kinds) > 1:
        found = " and ".join(f"{kind} (at {index})" for kind, index in kinds.items())
        raise ConfigError(
            f"{name} is quantised in several ways: {found}; layers and experts of one kind must "
            "have one method. Quantise the model again."
        )


def _split(dims: Sequence[int], size: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The first dims whose product is `size`, and the rest."""
    for i in range(1, len(dims)):
        if math.prod(dims[:i]) == size:
            return tuple(dims[:i]), tuple(dims[i:])
    raise AssertionError(f"{dims} has no leading dims of {size}")


def _in_blocks(codes: Codes, in_dims: tuple[int, ...], num_shards: int) -> tuple[int, ...]:
    """In how many blocks of one scale each dim of the inputs is divided.

    Groups that do not fit the dims or their shards become smaller ones, with the same scale.
    """
    num_in, num_groups = codes.values.shape[1], codes.scale.shape[1]
    if num_groups == 1:
        return (1,) * len(in_dims)
    group = math.gcd(num_in // num_groups, num_in // num_shards)
    blocks = []
    for size in reversed(in_dims):
        inner = math.gcd(group, size) if group % size else size
        blocks.insert(0, size // inner)
        if inner < size:
            group = 1  # no block spans several entries of the dims before
        else:
            group //= size
    return tuple(blocks)


def _outliers(
    matrices: Mapping[tuple[int, ...], Codes],
    stack: tuple[int, ...],
    num_slices: int,
    *,
    slices_inputs: bool,
) -> Outliers:
    found = {}
    for index, codes in matrices.items():
        num_out, num_in = codes.values.shape
        row, column = codes.position // num_in, codes.position % num_in
        size = (num_in if slices_inputs else num_out) // num_slices
        which = (column if slices_inputs else row) // size
        width = size if slices_inputs else num_in
        local = row * width + column % size if slices_inputs else codes.position % (size * num_in)
        found[index] = [(local[which == s], codes.value[which == s]) for s in range(num_slices)]
    most = max(len(local) for slices in found.values() for local, _ in slices)
    position = np.full((*stack, num_slices, most), np.iinfo(np.int32).max, np.int32)
    value = np.zeros((*stack, num_slices, most), ml_dtypes.bfloat16)
    for index, slices in found.items():
        for s, (local, kept) in enumerate(slices):
            position[(*index, s)][: len(local)] = local
            value[(*index, s)][: len(local)] = kept
    return Outliers(position, value)
