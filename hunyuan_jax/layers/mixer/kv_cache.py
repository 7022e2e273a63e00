"""Keys and values of earlier tokens, one pair per CLA group (the official code stores one per
layer).

Letters: P CLA groups, B batch, S slots of a row, T new tokens, K kv heads, H head dim, N pages of
a row.
"""

from typing import Any, Literal, NamedTuple, Self

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from hunyuan_jax.layers.mixer import context_pages
from hunyuan_jax.layers.mixer.paged import write_pages
from hunyuan_jax.layers.protocols import Sequence
from hunyuan_jax.parallel import island, rules
from hunyuan_jax.parallel.mesh import device_kind
from pallas_kernels.decode_attention.append import append

_DIMS = ("layers", "batch", "slots", "kv_heads", "head_dim")
_NEW_DIMS = ("batch", "seq", "kv_heads", "head_dim")
# A cache in few bits, as its users name it -> (its dtype, the largest number in use).
CacheDtype = Literal["int8", "fp8"]
_FEW_BITS = {"int8": (jnp.int8, 127.0), "fp8": (jnp.float8_e4m3fn, 448.0)}


class KeysValues(NamedTuple):
    """k_PBSKH: keys, rotated and normalised without scale; v_PBSKH: values.

    In pages they may be int8 or float8_e4m3fn, with a float32 factor for each token and head:
    k_scale_PBSK, v_scale_PBSK.
    """

    k_PBSKH: jax.Array
    v_PBSKH: jax.Array
    k_scale_PBSK: jax.Array | None = None
    v_scale_PBSK: jax.Array | None = None

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
                    for old_PBSKH, new_BTKH in zip(self[:2], new, strict=True)
                )
            )

        if self.k_scale_PBSK is None:
            old, dims, new_dims = self[:2], DIMS[:2], (_NEW_DIMS,) * 2
        else:
            old, dims = tuple(self), tuple(DIMS)
            new_dims = (*(_NEW_DIMS,) * 2, *(_NEW_DIMS[:-1],) * 2)
            (k_BTKH, k_scale_BTK), (v_BTKH, v_scale_BTK) = (
                _in_few_bits(x_BTKH, self.k_PBSKH.dtype) for x_BTKH in new
            )
            new = (k_BTKH, v_BTKH, k_scale_BTK, v_scale_BTK)
        return type(self)(*write_new(old, new, group, sequence, mesh, dims, new_dims))

    def view(self, group: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(k, v) [B, S, K, H] of one group."""
        return tuple(
            jax.lax.dynamic_index_in_dim(x_PBSKH, group, keepdims=False) for x_PBSKH in self[:2]
        )

    def pinned(self, mesh: Mesh) -> Self:
        """The same, laid out over the mesh as every call expects it."""
        return type(self)(
            *(
                None if x is None else rules.constrain(x, mesh, names)
                for x, names in zip(self, DIMS, strict=True)
            )
        )


# The dims' logical names of each array.
DIMS = KeysValues(_DIMS, _DIMS, _DIMS[:-1], _DIMS[:-1])


def empty(
    shape: tuple[int, int, int, int, int], dtype: Any, few_bits: CacheDtype | None = None
) -> KeysValues:
    """Zeros of shape [P, B, S, K, H], in `dtype` or in few bits."""
    if few_bits is None:
        return KeysValues(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
    dtype, _ = _FEW_BITS[few_bits]
    return KeysValues(
        *(jnp.zeros(shape, dtype) for _ in "kv"), *(jnp.zeros(shape[:-1]) for _ in "kv")
    )


def _in_few_bits(x_BTKH: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """(values in `dtype`, their float32 factors [B, T, K])."""
    most = next(most for few_bits, most in _FEW_BITS.values() if few_bits == dtype)
    x_BTKH = x_BTKH.astype(jnp.float32)
    largest_BTK = jnp.abs(x_BTKH).max(-1)
    scale_BTK = jnp.where(largest_BTK > 0, largest_BTK / most, 1)
    x_BTKH = x_BTKH / scale_BTK[..., None]
    return (jnp.rint(x_BTKH) if dtype == jnp.int8 else x_BTKH).astype(dtype), scale_BTK


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
    sequence has a table, by `append` or on a CPU `write_pages`.

    Args:
      old_dims, new_dims: the dims' logical names, of each array.
    """
    where, kind = (sequence.length_B,), device_kind(mesh)
    if sequence.table_BN is not None:
        where = (sequence.table_BN, sequence.length_B)
    write_one = write_rows if sequence.table_BN is None else write_pages

    def write(_, old, new, group, where):
        if sequence.table_BN is not None:
            where = context_pages.written_here(*where, new[0].shape[1], old[0].shape[2])
        if sequence.table_BN is None or kind == "cpu":
            return tuple(write_one(*pair, group, *where) for pair in zip(old, new, strict=True))
        table_BN, length_B = where
        table_BN = jnp.where(table_BN == 0, -1, table_BN)  # nobody's page is not written
        places = {"table_Bm": table_BN, "slot_B": length_B}
        return append(old, new, group=group, **places, device_kind=kind)

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
