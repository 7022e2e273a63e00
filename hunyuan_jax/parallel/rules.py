"""The one table from logical dimension names to mesh axes, and the shardings made from it."""

import math
from collections.abc import Sequence

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hunyuan_jax.config import ConfigError

# The expert axis carries tokens outside the MoE and experts inside it, which makes the exchange an all_to_all.
RULES: dict[str, tuple[str, ...]] = {
    # activations
    "batch": ("replica", "data", "expert"),
    "seq": (),
    "act_embed": (),
    # parameters
    "layers": (),
    "vocab": ("tensor",),
    "embed": ("data", "expert"),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "ffn": ("tensor",),
    "norm": (),
    "experts": ("expert",),
    "expert_embed": ("data",),
    "router_experts": (),
}


def partition_spec(logical: Sequence[str]) -> PartitionSpec:
    """The PartitionSpec of dims with these logical names.

    Raises:
      ConfigError: two dims claim the same mesh axis.
    """
    axes = [RULES[name] for name in logical]
    used = [axis for dim_axes in axes for axis in dim_axes]
    for axis in used:
        if used.count(axis) > 1:
            raise ConfigError(f"dims {tuple(logical)} put the mesh axis {axis!r} on more than one dim; change parallel/rules.py.")
    return PartitionSpec(*(dim_axes if dim_axes else None for dim_axes in axes))


def sharding(mesh: Mesh, logical: Sequence[str], shape: Sequence[int] | None = None, name: str = "") -> NamedSharding:
    """The NamedSharding of a tensor; with `shape`, every sharded dim must divide.

    Raises:
      ConfigError: a dim does not divide by the axes it is spread over, naming tensor, dim, axes and a size that works.
    """
    spec = partition_spec(logical)
    for dim, size in enumerate(shape or ()):
        axes = RULES[logical[dim]]
        ways = math.prod(mesh.shape[axis] for axis in axes)
        if size % ways:
            fits = max(d for d in range(1, ways + 1) if size % d == 0)
            raise ConfigError(
                f"{name or 'tensor'} {tuple(shape)}: dim {dim} ({logical[dim]}, size {size}) does not divide over mesh axes "
                f"{' x '.join(axes)} = {ways}; use {fits} ways there, or a size of {math.ceil(size / ways) * ways}."
            )
    return NamedSharding(mesh, spec)


def constrain(x: jax.Array, mesh: Mesh, logical: Sequence[str]) -> jax.Array:
    """Pins an activation to the layout its logical names ask for, so that the compiler does not choose another."""
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, partition_spec(logical)))
