"""The only shard_map wrapper, and the collectives used inside it."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from hunyuan_jax.parallel import xla_workarounds
from hunyuan_jax.parallel.rules import (
    RULES,
    is_single_token,
    partition_spec,
    quantized_specs,
    stored_spec,
    whole_rows,
)
from hunyuan_jax.quant.array import QuantArray, dequantized, is_quantized

_LANES = 128  # a TPU stores arrays in tiles of 8 x 128 elements


def island(fn: Callable, mesh: Mesh, stored: Any, in_logical: Any, out_logical: Any) -> Callable:
    """fn(parameters, *activations) on each device's shard.

    Args:
      fn: the function of one shard.
      mesh: over which it runs.
      stored: logical names of the parameters, a tree of tuples; the shards that fn sees are those
        in storage, see `gather_param`.
      in_logical: the same for each of the activations, a tuple of trees.  Where rows have a
        single token, it is whole on every chip.
      out_logical: of the results.
    """

    def specs(tree, to_spec):
        return jax.tree.map(to_spec, tree, is_leaf=_is_names)

    def call(parameters, *activations):
        of_parameters = jax.tree.map(_stored_specs, stored, parameters, is_leaf=_is_names)
        is_single = jax.tree.map(is_single_token, in_logical, activations, is_leaf=_is_names)
        to_spec = partition_spec
        if any(jax.tree.leaves(is_single)):
            to_spec = lambda names: partition_spec(whole_rows(names))  # noqa: E731
        in_specs = (of_parameters, *specs(in_logical, to_spec))
        if mesh.size == 1:
            in_specs = jax.tree.map(
                functools.partial(_naming_all_axes, mesh), in_specs, is_leaf=_is_spec
            )
        # check_vma is off because kernels called inside do not state how their results vary over
        # the mesh.
        return jax.shard_map(
            fn,
            mesh=mesh,
            in_specs=in_specs,
            out_specs=specs(out_logical, to_spec),
            check_vma=False,
        )(parameters, *activations)

    return call


def _stored_specs(logical: Sequence[str], w: jax.Array | QuantArray) -> Any:
    return quantized_specs(logical, w) if is_quantized(w) else stored_spec(logical)


def _naming_all_axes(mesh: Mesh, spec: PartitionSpec) -> PartitionSpec:
    """The spec of an array of at least one dim on a mesh of one device, with every axis in it.

    A gradient is summed over the axes that its spec does not name; XLA:CPU copies the array for
    that, though there is one device.
    """
    return PartitionSpec(mesh.axis_names, *[None] * (len(spec) - 1)) if len(spec) else spec


def gather_param(w: jax.Array | QuantArray, logical: Sequence[str], dtype: Any) -> jax.Array:
    """A parameter's shard in `dtype`, gathered from storage (FSDP); its gradient comes back as a
    reduce-scatter in `dtype`.

    Dims stay split over their compute axes.  A quantised parameter is gathered in its few bits,
    then dequantised.
    """
    if is_quantized(w):
        return dequantized(_gather_quantized(w, logical), dtype)
    w = xla_workarounds.cast_where_used(w, dtype)
    for name in sorted(logical, key=_is_rows):
        w = gather_stored(w, name, list(logical).index(name))
    return w


def gather_matrix(
    w: jax.Array | QuantArray, logical: Sequence[str], dtype: Any, num_in: int
) -> jax.Array | QuantArray:
    """As `gather_param`, with the first num_in dims made one and the others another: [in, out].
    If a dim is "embed", it is one of the two.  A quantised parameter stays quantised, for
    `layers.linear`.

    Gathered as a matrix, because a TPU pads the last two dims of [6400, 80, 80] to tiles, to 1.6
    times the size.
    """
    if is_quantized(w):
        return _gather_quantized(w, logical).matrix()
    w = xla_workarounds.cast_where_used(w, dtype)
    for dim, name in enumerate(logical):
        w = w if _is_rows(name) else gather_stored(w, name, dim)
    w = w.reshape(math.prod(w.shape[:num_in]), -1)
    if "embed" not in logical:
        return w
    return gather_stored(w, "embed", 0 if logical[0] == "embed" else 1)


def gather_padded(
    w: jax.Array | QuantArray, logical: Sequence[str], dtype: Any, tiled: str
) -> jax.Array | QuantArray:
    """As `gather_param`, with each shard's part of the dim `tiled` zero-padded to whole tiles if
    that adds under 1/32.  A quantised parameter stays quantised, without padding.

    So the dim may be a bit longer than declared, with zeros between: 16 * 1152 for 18304.

    * A dim that is gathered gets whole tiles of 128 lanes: the gather is then a plain
      concatenation of tiles.  Without, the TPU compiler moves the parts against each other in
      memory (0.8 ms for 6400 x 18304 on v5p, as it estimates).
    * A dim that is not, beside rows that are, gets an even number of tiles
      (`xla_workarounds.LANES_BESIDE_GATHERED_ROWS`).
    """
    if is_quantized(w):
        return _gather_quantized(w, logical)
    dim = list(logical).index(tiled)
    if num_stored_shards(tiled) > 1:
        lanes = _LANES
    elif num_stored_shards("embed") > 1:
        lanes = xla_workarounds.LANES_BESIDE_GATHERED_ROWS
    else:
        lanes = 1
    missing = -w.shape[dim] % lanes
    if 0 < missing * 32 <= w.shape[dim]:
        pad = [(0, missing if i == dim else 0) for i in range(w.ndim)]
        w = xla_workarounds.keep_padding_separate(jnp.pad(w, pad))
    return gather_param(w, logical, dtype)


def _gather_quantized(w: QuantArray, logical: Sequence[str]) -> QuantArray:
    if w.by_rows:  # of one device, with its dims in another order
        return w
    values = w.values
    for name in sorted(logical, key=_is_rows):
        values = gather_stored(
            values, name, values.ndim - len(logical) + list(logical).index(name)
        )
    return w.replace(values=values)


def _is_rows(logical: str) -> bool:
    # Gathered last: the other dims' parts are not always whole tiles of a TPU, and gathering those
    # is cheaper for small arrays.
    return logical in ("embed", "wide_embed")


def gather_stored(x: jax.Array, logical: str, dim: int) -> jax.Array:
    """The whole of a dim that is split over the storage axes of `logical`; its transpose is a
    reduce-scatter.
    """
    axes = RULES[logical].storage
    if not axes or jax.lax.axis_size(axes) == 1:
        return x  # here and below: XLA:CPU copies the array even when nothing moves
    x = xla_workarounds.keep_reduce_scatter(x)
    if dim == 0:
        return jax.lax.all_gather(x, axes, axis=0).reshape(-1, *x.shape[1:])
    return jax.lax.all_gather(x, axes, axis=dim, tiled=True)


def exchange_stored(x: jax.Array, logical: str, split_dim: int, concat_dim: int) -> jax.Array:
    """all_to_all over the storage axes of `logical`."""
    axes = RULES[logical].storage
    if jax.lax.axis_size(axes) == 1:
        return x
    return jax.lax.all_to_all(x, axes, split_axis=split_dim, concat_axis=concat_dim, tiled=True)


def shard_index(logical: str) -> jax.Array:
    """Position of this shard along a logical dim, int32 scalar."""
    return jax.lax.axis_index(RULES[logical].compute)


def num_shards(logical: str) -> int:
    """Over how many shards a logical dim is spread, inside an island."""
    return jax.lax.axis_size(RULES[logical].compute)


def num_stored_shards(logical: str) -> int:
    """Over how many storage shards `gather_stored` gathers a dim."""
    return jax.lax.axis_size(RULES[logical].storage)


def gather(x: jax.Array, logical: str, dim: int) -> jax.Array:
    """The whole of a dim that is sharded as `logical`; its transpose is a reduce-scatter."""
    if num_shards(logical) == 1:
        return x
    return jax.lax.all_gather(x, RULES[logical].compute, axis=dim, tiled=True)


def reduce_scatter(x: jax.Array, logical: str, dim: int) -> jax.Array:
    """Sum over the shards of `logical`, each keeping its part of `dim`."""
    if num_shards(logical) == 1:
        return x
    return jax.lax.psum_scatter(x, RULES[logical].compute, scatter_dimension=dim, tiled=True)


def reduce_sum(x: jax.Array, logical: str) -> jax.Array:
    """Sum over the shards of `logical`."""
    if num_shards(logical) == 1:
        return x
    return jax.lax.psum(x, RULES[logical].compute)


def reduce_max(x: jax.Array, logical: str) -> jax.Array:
    """Maximum over the shards of `logical`; not differentiable."""
    if num_shards(logical) == 1:
        return x
    return jax.lax.pmax(x, RULES[logical].compute)


def exchange(x: jax.Array, logical: str) -> jax.Array:
    """all_to_all over the shards of `logical`: part i of the leading dim goes to shard i, and the
    parts received take its place.
    """
    if num_shards(logical) == 1:
        return x
    return jax.lax.all_to_all(x, RULES[logical].compute, split_axis=0, concat_axis=0, tiled=True)


def exchange_dims(x: jax.Array, logical: str, split_dim: int, concat_dim: int) -> jax.Array:
    """all_to_all over the shards of `logical`: splits one dim and gathers another, which was split
    before.
    """
    if num_shards(logical) == 1:
        return x
    axes = RULES[logical].compute
    return jax.lax.all_to_all(x, axes, split_axis=split_dim, concat_axis=concat_dim, tiled=True)


def send_to_next(x: jax.Array, logical: str) -> jax.Array:
    """Sends x to the next shard along `logical`, the last to the first; returns what arrives."""
    num = num_shards(logical)
    pairs = [(source, (source + 1) % num) for source in range(num)]
    return jax.lax.ppermute(x, RULES[logical].compute, pairs)


def _is_spec(x: Any) -> bool:
    return isinstance(x, PartitionSpec)


def _is_names(x: Any) -> bool:
    return (
        isinstance(x, Sequence)
        and not isinstance(x, str)
        and all(isinstance(name, str) for name in x)
    )
