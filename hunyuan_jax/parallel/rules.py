"""The table from logical dimension names to mesh axes, and the shardings made from it."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hunyuan_jax.errors import ConfigError, MeshError
from hunyuan_jax.quant.array import Outliers, QuantArray


class Axes(NamedTuple):
    """Mesh axes of a logical dim.

    compute: axes that split the work: activations, and parameters in use.
    storage: further axes that split a stored parameter, its gradient and its moments;
      parallel/island.py gathers the parameter for each use.
    """

    compute: tuple[str, ...] = ()
    storage: tuple[str, ...] = ()


# The context axis splits the tokens of a row (parallel/context.py), and the parameters as `data`
# does.
#
# The expert axis carries tokens outside the MoE and experts inside it, which makes the exchange an
# all_to_all.
#
# Storage: rows go to `data`, another dim to `expert`, because one dim cannot take every axis: 6400
# = 2^8 * 25 does not divide over 512 chips.  200 rows a chip (data 32) are still full (8, 128)
# tiles, so that gathering them is a plain concatenation; the TPU compiler turns the gather of
# unaligned shards into a zero-filled all-reduce of twice the traffic.
RULES: dict[str, Axes] = {
    "batch": Axes(("replica", "data", "expert")),
    "seq": Axes(("context",)),  # the tokens of a row, as activations
    "row": Axes(),  # the same, whole on every chip
    "slots": Axes(("context",)),  # of a cache: each chip has some of every page's
    "context": Axes(("context",)),  # of what every chip along that axis has a copy of its own
    "routing_groups": Axes(("replica", "data", "expert", "context")),
    "example_rows": Axes(),  # of one example of a batch, such as the two answers of a pair
    "layers": Axes(),
    "embed": Axes((), ("data", "context")),
    "norm": Axes(),
    "latent": Axes(),
    "rank": Axes(),  # of a LoRA adapter
    "vocab": Axes(("tensor",), ("expert",)),
    "odd_vocab": Axes(("tensor",)),  # these two for a table whose rows do not divide over `expert`
    "wide_embed": Axes((), ("data", "context", "expert")),
    "heads": Axes(("tensor",)),
    "kv_heads": Axes(("tensor",)),
    "context_kv_heads": Axes(("tensor", "context")),
    "head_dim": Axes((), ("expert",)),
    "ffn": Axes(("tensor",), ("expert",)),
    "experts": Axes(("expert",)),
    "expert_ffn": Axes(("tensor",)),
    "router_experts": Axes((), ("expert",)),
    "mtp_in": Axes(
        (), ("data", "context")
    ),  # of the projection before the layer of multi-token prediction
    "mtp_out": Axes((), ("expert",)),
}


def partition_spec(logical: Sequence[str]) -> PartitionSpec:
    """Returns the PartitionSpec of an activation, or of a parameter in use, with these dims.

    Raises:
      ConfigError: two dims claim the same mesh axis.
    """
    return _spec(logical, _compute_axes(logical))


def stored_spec(logical: Sequence[str]) -> PartitionSpec:
    """Returns the PartitionSpec of a stored parameter, its gradient and its moments.

    Raises:
      ConfigError: two dims claim the same mesh axis.
    """
    return _spec(logical, _storage_axes(logical))


def quantized_specs(logical: Sequence[str], w: QuantArray) -> QuantArray:
    """The PartitionSpec of each array of a quantised parameter with these dims.

    Values lie as the parameter would.  Scales and outliers, which are few, are split over the
    axes of the computation only: nothing is gathered for them.  The layout of a single CPU device
    has other dims, and is not split.
    """
    if w.by_rows:
        return jax.tree.map(lambda _: PartitionSpec(), w)
    spec = partition_spec(logical)
    scale = PartitionSpec(
        *(axes if size > 1 else None for axes, size in zip(spec, w.scale.shape, strict=True))
    )
    outliers = None
    if w.outliers is not None:
        stack = spec[: w.num_stacked]
        sliced = next((axes for axes in spec[w.num_stacked :] if axes is not None), None)
        outliers = Outliers(*[PartitionSpec(*stack, sliced, None)] * 2)
    return w.replace(values=stored_spec(logical), scale=scale, outliers=outliers)


def num_slices(mesh: Mesh, logical: Sequence[str], num_stacked: int) -> tuple[int, int]:
    """(in how many slices the computation splits a parameter, the dim among those of its matrix):
    (1, 0) if it is not split.
    """
    for dim, name in enumerate(logical[num_stacked:]):
        if RULES[name].compute:
            return num_shards(mesh, name), dim
    return 1, 0


def sharding(
    mesh: Mesh, logical: Sequence[str], shape: Sequence[int] | None = None, name: str = ""
) -> NamedSharding:
    """Returns the NamedSharding of an activation; with `shape`, checks that dims divide.

    Raises:
      ConfigError: a dim does not divide over its axes; names tensor, dim, axes and a size that
        works.
    """
    return _checked(mesh, _compute_axes(logical), logical, shape, name)


def stored_sharding(
    mesh: Mesh, logical: Sequence[str], shape: Sequence[int], name: str = ""
) -> NamedSharding:
    """Returns the NamedSharding of a stored parameter; raises as `sharding` does."""
    return _checked(mesh, _storage_axes(logical), logical, shape, name)


def num_shards(mesh: Mesh, name: str) -> int:
    """Returns the number of shards of a mesh over which a logical dim's work is split."""
    return math.prod(mesh.shape[axis] for axis in RULES[name].compute)


def first_that_divides(
    mesh: Mesh, shape: Sequence[int], options: Sequence[tuple[str, ...]], name: str
) -> tuple[str, ...]:
    """Returns the first of several namings of a parameter's dims that divides on this mesh.

    Raises:
      ConfigError: none divides; the message is about the first.
    """
    for logical in options:
        try:
            stored_sharding(mesh, logical, shape)
        except ConfigError:
            continue
        return logical
    stored_sharding(mesh, options[0], shape, name)
    raise AssertionError("the first option does not divide")


def constrain(x: jax.Array, mesh: Mesh, logical: Sequence[str]) -> jax.Array:
    """Constrains an activation to the sharding of its logical dims; a single token is whole on
    every chip.
    """
    if is_single_token(logical, x):
        logical = whole_rows(logical)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, partition_spec(logical)))


def is_single_token(logical: Sequence[str], x: jax.Array | None) -> bool:
    """Whether x has the tokens of rows and there is one in each, as in decoding.  It cannot be
    split over the chips of a row: each of them computes it.
    """
    return "seq" in logical and x is not None and x.shape[logical.index("seq")] == 1


def whole_rows(logical: Sequence[str]) -> tuple[str, ...]:
    """The names of dims whose rows are whole on every chip along `context`."""
    return tuple("row" if name == "seq" else name for name in logical)


def _compute_axes(logical: Sequence[str]) -> list[tuple[str, ...]]:
    return [RULES[name].compute for name in logical]


def _storage_axes(logical: Sequence[str]) -> list[tuple[str, ...]]:
    return [RULES[name].compute + RULES[name].storage for name in logical]


def _spec(logical: Sequence[str], axes: list[tuple[str, ...]]) -> PartitionSpec:
    used = [axis for dim_axes in axes for axis in dim_axes]
    for axis in used:
        if used.count(axis) > 1:
            raise ConfigError(
                f"dims {tuple(logical)} put the mesh axis {axis!r} on more than one dim; change "
                "parallel/rules.py."
            )
    return PartitionSpec(*(dim_axes if dim_axes else None for dim_axes in axes))


def _checked(
    mesh: Mesh,
    axes_of_dims: list[tuple[str, ...]],
    logical: Sequence[str],
    shape: Sequence[int] | None,
    name: str,
) -> NamedSharding:
    spec = _spec(logical, axes_of_dims)
    for dim, size in enumerate(shape or ()):
        axes = axes_of_dims[dim]
        ways = math.prod(mesh.shape[axis] for axis in axes)
        if size % ways:
            fits = max(d for d in range(1, ways + 1) if size % d == 0)
            raise MeshError(
                f"{name or 'tensor'} {tuple(shape)}: dim {dim} ({logical[dim]}, size {size}) does "
                f"not divide over mesh axes {' x '.join(axes)} = {ways}; use {fits} ways there, "
                f"or a size of {math.ceil(size / ways) * ways}."
            )
    return NamedSharding(mesh, spec)
