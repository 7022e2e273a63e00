"""Moves tokens to their experts and back, per shard.

`by_capacity` fills a fixed [E, C, D] buffer and exchanges it over the expert axis (recycle, drop).
`dropless` keeps every token: it sorts rows by expert into tiles.  Work is proportional to tokens.
The combine weights are dispatched with the tokens, and the experts apply them to their rows.
Letters: g groups on this shard, T tokens per group, k choices, E experts, e experts on this shard,
C capacity, D model, n tiles, b rows per tile, R = n * b.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from hunyuan_jax.layers.ffn.moe.routing import Assignment
from hunyuan_jax.parallel import island


def by_capacity(
    x_gTD: jax.Array,
    assignment: Assignment,
    num_slots: int,
    experts: Callable[[jax.Array, jax.Array], jax.Array],
) -> jax.Array:
    """Returns the combined expert outputs [g, T, D] of the choices that are kept.

    Args:
      x_gTD: activations.
      assignment: with a leading group dim; `slot` is below num_slots.
      num_slots: C, rows per (group, expert).
      experts: (x [e, sources * C, D], weight [e, sources * C] of the rows, count [e, sources] of
        valid rows at the start of each source's C rows) -> weighted outputs [e, sources * C, D].
    """
    num_groups, T, D = x_gTD.shape
    num_experts, k = assignment.count_E.shape[-1], assignment.expert_Tk.shape[-1]
    rows_per_expert = num_groups * num_slots
    group_g = jnp.arange(num_groups)[:, None, None]
    row_gTk = jnp.where(
        assignment.is_kept_Tk,
        (assignment.expert_Tk * num_groups + group_g) * num_slots + assignment.slot_Tk,
        num_experts * rows_per_expert,
    )
    row_Mk = row_gTk.reshape(num_groups * T, k)
    choice_R = _choice_of_row(row_Mk, num_experts * rows_per_expert)
    x_RD = _pack(x_gTD.reshape(num_groups * T, D), row_Mk, choice_R)
    weight_R = _weight_of_row(assignment.weight_Tk.reshape(num_groups * T, k), row_Mk, choice_R)

    # Each shard sends the rows of an expert to the shard that has the expert, and gets them back
    # in the same order.
    x_eRD, weight_eR = (
        checkpoint_name(
            _to_experts(a_R.reshape(num_experts, rows_per_expert, *a_R.shape[1:])), "dispatched"
        )
        for a_R in (x_RD, weight_R)
    )
    y_eRD = experts(x_eRD, weight_eR, _to_experts(assignment.count_E.T))
    y_RD = _from_experts(y_eRD).reshape(num_experts * rows_per_expert, D)
    return _combine(y_RD, row_Mk, choice_R).reshape(num_groups, T, D)


def dropless(
    x_gTD: jax.Array,
    assignment: Assignment,
    num_local_experts: int,
    experts: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
) -> jax.Array:
    """Returns the combined expert outputs [g, T, D] of every choice.

    With several expert shards, each gathers the tokens of its expert-axis neighbours and computes
    the choices of its own experts.  A reduce-scatter sums the results.  Every (token, choice) is
    computed once.

    Args:
      x_gTD: activations.
      assignment: with a leading group dim; `slot` is the rank within (group, expert).
      num_local_experts: e.
      experts: (x [n, b, D], weight [n, b] of the rows, tile_expert [n] local index, num_tiles
        scalar: number of tiles with rows) -> weighted outputs [n, b, D].
    """
    x_gTD = island.gather(x_gTD, "experts", dim=0)
    assignment = jax.tree.map(lambda a: island.gather(a, "experts", dim=0), assignment)
    num_groups, T, D = x_gTD.shape
    k = assignment.expert_Tk.shape[-1]
    first_expert = island.shard_index("experts") * num_local_experts
    count_ge = jax.lax.dynamic_slice_in_dim(
        assignment.count_E, first_expert, num_local_experts, axis=1
    )

    tile = tile_size(num_groups * T * k, num_local_experts * island.num_shards("experts"))
    num_tiles = num_groups * T * k // tile + min(num_local_experts, num_groups * T * k)
    tiles_e = -(-count_ge.sum(0) // tile)
    first_row_ge = (jnp.cumsum(tiles_e) - tiles_e) * tile + jnp.cumsum(count_ge, axis=0) - count_ge

    local_gTk = assignment.expert_Tk - first_expert
    is_local_gTk = assignment.is_kept_Tk & (local_gTk >= 0) & (local_gTk < num_local_experts)
    first_row_gTk = jax.vmap(lambda rows_e, e_Tk: rows_e[e_Tk])(
        first_row_ge, jnp.clip(local_gTk, 0, num_local_experts - 1)
    )
    row_Mk = jnp.where(is_local_gTk, first_row_gTk + assignment.slot_Tk, num_tiles * tile).reshape(
        num_groups * T, k
    )

    choice_R = _choice_of_row(row_Mk, num_tiles * tile)
    x_nbD = _pack(x_gTD.reshape(num_groups * T, D), row_Mk, choice_R).reshape(num_tiles, tile, D)
    tile_expert_n = jnp.searchsorted(
        jnp.cumsum(tiles_e), jnp.arange(num_tiles), side="right"
    ).astype(jnp.int32)
    weight_nb = _weight_of_row(
        assignment.weight_Tk.reshape(num_groups * T, k), row_Mk, choice_R
    ).reshape(num_tiles, tile)
    y_nbD = experts(
        x_nbD, weight_nb, jnp.minimum(tile_expert_n, num_local_experts - 1), tiles_e.sum()
    )
    y_MD = _combine(y_nbD.reshape(num_tiles * tile, D), row_Mk, choice_R)
    return island.reduce_scatter(y_MD.reshape(num_groups, T, D), "experts", dim=0)


def _to_experts(x_ER: jax.Array) -> jax.Array:
    """Exchanges [E, R, ...] of this shard's tokens for [e, shards * R, ...] of its experts.

    The rows of an expert are ordered by sender.
    """
    num_shards, rest = island.num_shards("experts"), x_ER.shape[1:]
    x_seR = island.exchange(x_ER, "experts").reshape(num_shards, -1, *rest)
    return x_seR.swapaxes(0, 1).reshape(-1, num_shards * rest[0], *rest[1:])


def _from_experts(y_eR: jax.Array) -> jax.Array:
    """Inverse of `_to_experts`."""
    num_shards, (e, R, *rest) = island.num_shards("experts"), y_eR.shape
    y_seR = y_eR.reshape(e, num_shards, R // num_shards, *rest).swapaxes(0, 1)
    return island.exchange(y_seR.reshape(num_shards * e, R // num_shards, *rest), "experts")


def tile_size(num_rows: int, num_experts: int) -> int:
    """Returns the rows per tile, a power of two in [8, 128].

    It is about 1/4 of an expert's mean share, so that padding stays small.
    """
    share = max(1, num_rows // (4 * num_experts))
    return min(128, max(8, 1 << (share.bit_length() - 1)))


def _choice_of_row(row_Tk: jax.Array, num_rows: int) -> jax.Array:
    """Returns the flat index (token * k + choice) of each row, int32 [num_rows]; T * k if empty.

    A choice whose entry in `row_Tk` is num_rows has no row.
    """
    num_choices = row_Tk.size
    empty_R = jnp.full((num_rows,), num_choices, jnp.int32)
    return empty_R.at[row_Tk.reshape(-1)].set(
        jnp.arange(num_choices, dtype=jnp.int32), mode="drop"
    )


def _weight_of_row(weight_Tk: jax.Array, row_Tk: jax.Array, choice_R: jax.Array) -> jax.Array:
    """Returns the combine weight of each row, float32 [R]; zero for empty rows."""
    weight_R1 = _pack(weight_Tk.reshape(-1, 1), row_Tk.reshape(-1, 1), choice_R)
    return jnp.where(choice_R < row_Tk.size, weight_R1[:, 0], 0.0)


# Each of the two is the other's transpose, so gradients are lookups too, and not scatters, which
# are slow on TPUs.


@jax.custom_vjp
def _pack(x_TD: jax.Array, row_Tk: jax.Array, choice_R: jax.Array) -> jax.Array:
    """Copies each token to its rows, [R, D].

    An empty row gets some token, in the backward pass too.  Its combine weight is zero, and with
    it all that the row adds to outputs and gradients; zeros would cost a pass over all rows.
    """
    return x_TD.at[choice_R // row_Tk.shape[1]].get(mode="clip")


@jax.custom_vjp
def _combine(y_RD: jax.Array, row_Tk: jax.Array, choice_R: jax.Array) -> jax.Array:
    """Sums the rows of each token, [T, D], in y's dtype."""
    # Choices first: a TPU adds up whole arrays faster than the rows within one.
    y_kTD = y_RD.at[row_Tk.T].get(mode="fill", fill_value=0)
    return y_kTD[0] if len(y_kTD) == 1 else y_kTD.sum(0)  # a TPU would copy a sum of one


def _transposed(fn: Callable) -> Callable:
    def backward(index, dy):
        no_gradients = (np.zeros(array.shape, jax.dtypes.float0) for array in index)
        return fn(dy, *index), *no_gradients

    return backward


_pack.defvjp(lambda x, *index: (_pack(x, *index), index), _transposed(_combine))
_combine.defvjp(lambda y, *index: (_combine(y, *index), index), _transposed(_pack))
