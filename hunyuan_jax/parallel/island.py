"""The only shard_map wrapper, and the collectives used inside it."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from hunyuan_jax.parallel.rules import RULES, partition_spec


def island(fn: Callable, mesh: Mesh, in_logical: Any, out_logical: Any) -> Callable:
    """`fn` on each device's shard; dims are described by logical names, as trees of tuples matching arguments and results.

    check_vma is off because kernels called inside do not state how their results vary over the mesh.
    """

    def specs(tree):
        return jax.tree.map(partition_spec, tree, is_leaf=_is_names)

    return jax.shard_map(fn, mesh=mesh, in_specs=specs(in_logical), out_specs=specs(out_logical), check_vma=False)


def shard_index(logical: str) -> jax.Array:
    """Position of this shard along a logical dim, int32 scalar."""
    return jax.lax.axis_index(RULES[logical])


def num_shards(logical: str) -> int:
    """Over how many shards a logical dim is spread, inside an island."""
    return jax.lax.axis_size(RULES[logical])


def gather(x: jax.Array, logical: str, dim: int) -> jax.Array:
    """The whole of a dim that is sharded as `logical`; its transpose is a reduce-scatter."""
    if num_shards(logical) == 1:
        return x  # here and below: XLA:CPU copies the array even when nothing moves
    return jax.lax.all_gather(x, RULES[logical], axis=dim, tiled=True)


def reduce_scatter(x: jax.Array, logical: str, dim: int) -> jax.Array:
    """Sum over the shards of `logical`, each keeping its part of `dim`."""
    if num_shards(logical) == 1:
        return x
    return jax.lax.psum_scatter(x, RULES[logical], scatter_dimension=dim, tiled=True)


def reduce_sum(x: jax.Array, logical: str) -> jax.Array:
    """Sum over the shards of `logical`."""
    if num_shards(logical) == 1:
        return x
    return jax.lax.psum(x, RULES[logical])


def exchange(x: jax.Array, logical: str, split_dim: int, concat_dim: int) -> jax.Array:
    """all_to_all over the shards of `logical`."""
    if num_shards(logical) == 1:
        return x
    return jax.lax.all_to_all(x, RULES[logical], split_axis=split_dim, concat_axis=concat_dim, tiled=True)


def _is_names(x: Any) -> bool:
    return isinstance(x, Sequence) and not isinstance(x, str) and all(isinstance(name, str) for name in x)
