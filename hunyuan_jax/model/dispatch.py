"""Moving tokens to their experts and back, per shard: two ways with one signature.

`by_capacity` fills a fixed [E, C, D] buffer and exchanges it over the expert axis (recycle, drop).  `dropless` keeps every token:
rows sorted by expert into tiles, the work proportional to tokens.
Letters: g groups on this shard, T tokens a group, k choices, E experts, e experts on this shard, C capacity, D model, n tiles,
b rows a tile, R = n * b.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from hunyuan_jax.model.routing import Assignment
from hunyuan_jax.parallel import island


def by_capacity(
    x_gTD: jax.Array, assignment: Assignment, num_slots: int, experts: Callable[[jax.Array, jax.Array], jax.Array]
) -> jax.Array:
    """Combined expert outputs [g, T, D]; only the choices in `assignment` that are kept contribute.

    Args:
      x_gTD: activations.
      assignment: with a leading group dim, `slot` below num_slots.
      num_slots: C, rows per (group, expert).
      experts: (x [e, sources * C, D], count [e, sources] of valid rows at the head of each source's C rows) -> the same shape.
    """
    num_groups, T, D = x_gTD.shape
    num_experts = assignment.count_E.shape[-1]
    row_gTk = jnp.where(assignment.is_kept_Tk, assignment.expert_Tk * num_slots + assignment.slot_Tk, num_experts * num_slots)
    x_EgCD = jax.vmap(_pack, in_axes=(0, 0, None))(x_gTD, row_gTk, num_experts * num_slots)
    x_EgCD = x_EgCD.reshape(num_groups, num_experts, num_slots, D).swapaxes(0, 1)

    # Each shard sends every expert's rows to the shard that holds it, and gets them back in the same order.
    x_eRD = island.exchange(x_EgCD.reshape(num_experts, num_groups * num_slots, D), "experts", split_dim=0, concat_dim=1)
    count_es = island.exchange(assignment.count_E.T, "experts", split_dim=0, concat_dim=1)
    y_eRD = checkpoint_name(experts(checkpoint_name(x_eRD, "dispatched"), count_es), "served")
    y_EgCD = island.exchange(y_eRD, "experts", split_dim=1, concat_dim=0).reshape(num_experts, num_groups, num_slots, D)

    y_gRD = y_EgCD.swapaxes(0, 1).reshape(num_groups, num_experts * num_slots, D)
    return jax.vmap(_combine)(y_gRD, row_gTk, assignment.weight_Tk)


def dropless(
    x_gTD: jax.Array, assignment: Assignment, num_local_experts: int, experts: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
) -> jax.Array:
    """Combined expert outputs [g, T, D] of every choice in `assignment`, whose `slot` is the rank within (group, expert).

    With several expert shards, each gathers the tokens of its expert-axis neighbours, serves the choices that fall on its own
    experts, and the results are summed back: every (token, choice) is computed once.

    Args:
      experts: (x [n, b, D], tile_expert [n] local index, num_tiles scalar: how many of the n tiles hold rows) -> the same shape.
    """
    x_gTD = island.gather(x_gTD, "experts", dim=0)
    assignment = jax.tree.map(lambda a: island.gather(a, "experts", dim=0), assignment)
    num_groups, T, D = x_gTD.shape
    k = assignment.expert_Tk.shape[-1]
    first_expert = island.shard_index("experts") * num_local_experts
    count_ge = jax.lax.dynamic_slice_in_dim(assignment.count_E, first_expert, num_local_experts, axis=1)

    tile = tile_size(num_groups * T * k, num_local_experts * island.num_shards("experts"))
    num_tiles = num_groups * T * k // tile + min(num_local_experts, num_groups * T * k)
    tiles_e = -(-count_ge.sum(0) // tile)
    first_row_ge = (jnp.cumsum(tiles_e) - tiles_e) * tile + jnp.cumsum(count_ge, axis=0) - count_ge

    local_gTk = assignment.expert_Tk - first_expert
    is_local_gTk = assignment.is_kept_Tk & (local_gTk >= 0) & (local_gTk < num_local_experts)
    first_row_gTk = jax.vmap(lambda rows_e, e_Tk: rows_e[e_Tk])(first_row_ge, jnp.clip(local_gTk, 0, num_local_experts - 1))
    row_MTk = jnp.where(is_local_gTk, first_row_gTk + assignment.slot_Tk, num_tiles * tile).reshape(num_groups * T, k)

    x_nbD = _pack(x_gTD.reshape(num_groups * T, D), row_MTk, num_tiles * tile).reshape(num_tiles, tile, D)
    tile_expert_n = jnp.searchsorted(jnp.cumsum(tiles_e), jnp.arange(num_tiles), side="right").astype(jnp.int32)
    y_nbD = experts(x_nbD, jnp.minimum(tile_expert_n, num_local_experts - 1), tiles_e.sum())
    y_MD = _combine(y_nbD.reshape(num_tiles * tile, D), row_MTk, assignment.weight_Tk.reshape(num_groups * T, k))
    return island.reduce_scatter(y_MD.reshape(num_groups, T, D), "experts", dim=0)


def tile_size(num_rows: int, num_experts: int) -> int:
    """Rows per tile: a power of two near a quarter of an expert's mean share, in [8, 128], so that padding stays small."""
    share = max(1, num_rows // (4 * num_experts))
    return min(128, max(8, 1 << (share.bit_length() - 1)))


def _pack(x_TD: jax.Array, row_Tk: jax.Array, num_rows: int) -> jax.Array:
    """Rows [num_rows, D]: token t at each of its rows, zero elsewhere; a row number of num_rows means nowhere."""
    T, k = row_Tk.shape
    token_R = jnp.full((num_rows,), T, jnp.int32).at[row_Tk].set(jnp.arange(T, dtype=jnp.int32)[:, None], mode="drop")
    return x_TD.at[token_R].get(mode="fill", fill_value=0)


def _combine(y_RD: jax.Array, row_Tk: jax.Array, weight_Tk: jax.Array) -> jax.Array:
    """Each token's weighted sum of its rows [T, D], in y's dtype."""
    y_TkD = y_RD.at[row_Tk].get(mode="fill", fill_value=0)
    return jnp.einsum("TkD,Tk->TD", y_TkD, weight_Tk.astype(y_RD.dtype))
