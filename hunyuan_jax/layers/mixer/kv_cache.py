"""Keys and values of earlier tokens, one pair per CLA group (the official code stores one per
layer).

Letters: P CLA groups, B batch, S slots of a row, T new tokens, K kv heads, H head dim, N pages of
a row.
"""

from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from hunyuan_jax.layers.mixer.paged import write_pages
from hunyuan_jax.layers.protocols import Sequence
from hunyuan_jax.parallel import island, rules

DIMS = ("layers", "batch", "seq", "kv_heads", "head_dim")
_NEW_DIMS = ("batch", "seq", "kv_heads", "head_dim")


class KeysValues(NamedTuple):
    """k_PBSKH: keys, rotated and normalised without scale; v_PBSKH: values."""

    k_PBSKH: jax.Array
    v_PBSKH: jax.Array

    def append(
        self,
        group: jax.Array,
        new: tuple[jax.Array, jax.Array],
        sequence: Sequence,
        mesh: Mesh,
    ) -> Self:
        """The cache with (k, v) [B, T, K, H] of one group behind each row's tokens.

        Only the new rows are written: the cache is carried from group to group and stays in place.
        """
        if sequence.length_B is None:
            return type(self)(
                *(
                    jax.lax.dynamic_update_slice(
                        old_PBSKH, new_BTKH[None].astype(old_PBSKH.dtype), (group, 0, 0, 0, 0)
                    )
                    for old_PBSKH, new_BTKH in zip(self, new, strict=True)
                )
            )

        logical = ((DIMS, DIMS), (_NEW_DIMS, _NEW_DIMS))
        return type(self)(*write_new(tuple(self), new, group, sequence, mesh, *logical))

    def view(self, group: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(k, v) [B, S, K, H] of one group."""
        return tuple(
            jax.lax.dynamic_index_in_dim(x_PBSKH, group, keepdims=False) for x_PBSKH in self
        )

    def pinned(self, mesh: Mesh) -> Self:
        """The same, laid out over the mesh as every call expects it."""
        return type(self)(*(rules.constrain(x_PBSKH, mesh, DIMS) for x_PBSKH in self))


def empty(shape: tuple[int, int, int, int, int], dtype: Any) -> KeysValues:
    """Zeros of shape [P, B, S, K, H]."""
    return KeysValues(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def write_new(
    old: tuple[jax.Array, ...],
    new: tuple[jax.Array, ...],
    group: jax.Array,
    sequence: Sequence,
    mesh: Mesh,
    old_dims: tuple,
    new_dims: tuple,
) -> tuple[jax.Array, ...]:
    """The arrays of an entry with new ones behind each row's tokens, by `write_rows` or, where the
    sequence has a table, `write_pages`.

    Args:
      old_dims, new_dims: the dims' logical names, of each array.
    """
    where = (sequence.length_B,)
    if sequence.table_BN is not None:
        where = (sequence.table_BN, sequence.length_B)
    write_one = write_rows if sequence.table_BN is None else write_pages

    def write(_, old, new, group, where):
        return tuple(write_one(*pair, group, *where) for pair in zip(old, new, strict=True))

    # An island, so that each device writes its own rows: XLA would gather the cache to scatter
    # into it.
    in_logical = (old_dims, new_dims, (), (("batch",),) * len(where))
    return island.island(write, mesh, {}, in_logical, old_dims)({}, old, new, group, where)


def write_rows(
    old_PBS: jax.Array, new_BT: jax.Array, group: jax.Array, slot_B: jax.Array
) -> jax.Array:
    """old_PBS with new_BT in T slots of one group, from slot_B of each row on.

    Both may have further dims, the same ones.
    """
    rest = (0,) * (old_PBS.ndim - 3)

    def row(old_PS, new_T, slot):
        return jax.lax.dynamic_update_slice(old_PS, new_T[None], (group, slot, *rest))

    return jax.vmap(row, in_axes=(1, 0, 0), out_axes=1)(
        old_PBS, new_BT.astype(old_PBS.dtype), slot_B
    )
