"""Training loss: cross entropy over vocabulary chunks, and the router losses.

Letters: B batch, T tokens, M = B * T of this shard, D model, V vocabulary, n vocabulary chunks, v
rows of a chunk that one shard stores, d = D / shards in storage, Vn rows of a gathered chunk.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from hunyuan_jax.config import MoeConfig
from hunyuan_jax.layers.embedding import ROWS, TOKENS, rounded
from hunyuan_jax.parallel import island, xla_workarounds
from hunyuan_jax.parallel.xla_workarounds import fusion_barrier

_LANES = 128


class TokenFigures(NamedTuple):
    """What a model says about each target, float32 [B, T].  Only `loss` has a gradient.

    loss: -log p(target) in nats; is_top: 1 if no token is more probable; entropy: of the
    prediction, in nats; mean_logit: over the vocabulary.
    """

    loss: jax.Array
    is_top: jax.Array
    entropy: jax.Array
    mean_logit: jax.Array


def token_losses(
    table_VD: nnx.Param,
    hidden_BTD: jax.Array,
    targets_BT: jax.Array,
    mesh: Mesh,
    rounded_to: str = "float32",
) -> jax.Array:
    """Returns -log p(target) in nats, float32 [B, T].

    The [tokens, vocabulary] logits never exist in memory at once.  The table is gathered and
    multiplied in chunks, and the backward pass recomputes the logits of each chunk.

    Args:
      table_VD: the output projection, as declared in embedding.py.
      hidden_BTD: after the final norm.
      targets_BT: int32 in [0, V), already shifted.
      mesh: the mesh of the arrays.
      rounded_to: dtype to whose numbers the logits are rounded.
    """
    arrays = (table_VD, hidden_BTD, targets_BT)
    return _over_shards(_losses_of_shard, TOKENS, arrays, mesh, rounded_to)


def token_figures(
    table_VD: nnx.Param,
    hidden_BTD: jax.Array,
    targets_BT: jax.Array,
    mesh: Mesh,
    rounded_to: str = "float32",
) -> TokenFigures:
    """As `token_losses`, with what a run logs about its targets beside the loss."""
    arrays = (table_VD, hidden_BTD, targets_BT)
    return _over_shards(_figures_of_shard, TokenFigures(*[TOKENS] * 4), arrays, mesh, rounded_to)


def _over_shards(of_shard, dims, arrays, mesh, rounded_to):
    """What `of_shard` gives for the tokens of each shard, with the logical dims `dims`."""
    table_VD, hidden_BTD, targets_BT = arrays
    logical = table_VD.get_metadata("dims")

    def fn(w_VD, hidden_BTD, targets_BT):
        hidden_MD = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])
        found = of_shard(logical, rounded_to, w_VD, hidden_MD, targets_BT.reshape(-1))
        return jax.tree.map(lambda a_M: a_M.reshape(targets_BT.shape), found)

    return island.island(fn, mesh, logical, (ROWS, TOKENS), dims)(
        table_VD[...], hidden_BTD, targets_BT
    )


def mean_loss(loss_BT: jax.Array, weights_BT: jax.Array) -> jax.Array:
    """Returns the weighted mean of token losses, float32 scalar; 0 if all weights are 0."""
    return jnp.sum(loss_BT * weights_BT) / jnp.maximum(weights_BT.sum(), 1.0)


def router_loss(stats: dict[str, jax.Array], cfg: MoeConfig) -> jax.Array:
    """Returns the weighted balance and z losses, averaged over layers; 0 without a router."""
    if "aux_loss" not in stats:
        return jnp.zeros((), jnp.float32)
    return (
        cfg.aux_loss_weight * stats["aux_loss"].mean() + cfg.z_loss_weight * stats["z_loss"].mean()
    )


def num_chunks(num_tokens: int, num_rows: int, num_shards: int) -> int:
    """Returns the number of vocabulary chunks.

    It is the smallest divisor of num_rows that limits a chunk's logits to MAX_LOGITS_BYTES.  If
    that is more than twice the number needed (128167 is 13 times a prime), it is the number
    needed, and the last chunk is padded with zeros.

    Args:
      num_tokens: tokens of one shard.
      num_rows: rows of the table that one shard stores.
      num_shards: shards that store rows.
    """
    most_rows = max(1, xla_workarounds.MAX_LOGITS_BYTES // (4 * num_tokens * num_shards))
    needed = -(-num_rows // most_rows)
    divisor = next((n for n in range(needed, num_rows) if num_rows % n == 0), num_rows)
    if divisor <= 2 * needed:
        return divisor
    return -(-num_rows // (most_rows // _LANES * _LANES or most_rows))


def rows_of_chunk(num_rows: int, num_chunks: int) -> int:
    """Returns the stored rows per chunk; the last chunk is padded if they do not divide."""
    rows = -(-num_rows // num_chunks)
    # A chunk that is padded anyway is padded to whole TPU tiles.
    return rows if num_rows % num_chunks == 0 or rows < _LANES else -(-rows // _LANES) * _LANES


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _losses_of_shard(
    logical: tuple[str, str],
    rounded_to: str,
    w_Vd: jax.Array,
    hidden_MD: jax.Array,
    targets_M: jax.Array,
) -> jax.Array:
    return _losses_fwd(logical, rounded_to, w_Vd, hidden_MD, targets_M)[0]


def _losses_fwd(logical, rounded_to, w_Vd, hidden_MD, targets_M):
    chunks = _chunks(logical, w_Vd, hidden_MD)

    def add_chunk(carry, chunk):
        max_M, sum_M, target_M = carry
        logits_MVn, is_target_MVn = _chunk_logits(
            logical, rounded_to, chunk, hidden_MD, targets_M, w_Vd.shape[0]
        )
        new_max_M = jnp.maximum(max_M, logits_MVn.max(-1))
        sum_M = sum_M * jnp.exp(max_M - new_max_M) + jnp.exp(logits_MVn - new_max_M[:, None]).sum(
            -1
        )
        return (
            new_max_M,
            sum_M,
            target_M + jnp.where(is_target_MVn, logits_MVn, 0.0).sum(-1),
        ), None

    zeros_M = jnp.zeros(targets_M.shape, jnp.float32)
    (max_M, sum_M, target_M), _ = jax.lax.scan(
        add_chunk, (zeros_M - jnp.inf, zeros_M, zeros_M), chunks
    )
    all_max_M = island.reduce_max(max_M, "vocab")
    sum_M = island.reduce_sum(sum_M * jnp.exp(max_M - all_max_M), "vocab")
    log_sum_M = all_max_M + jnp.log(sum_M)
    return log_sum_M - island.reduce_sum(target_M, "vocab"), (
        w_Vd,
        hidden_MD,
        targets_M,
        log_sum_M,
    )


def _losses_bwd(logical, rounded_to, residuals, dloss_M):
    w_Vd, hidden_MD, targets_M, log_sum_M = residuals
    chunks = _chunks(logical, w_Vd, hidden_MD)
    # Each shard along `vocab` receives an equal share of the cotangent.
    dloss_M = island.reduce_sum(dloss_M, "vocab")

    def add_chunk(dhidden_MD, chunk):
        w_DVn, to_storage = jax.vjp(
            lambda w_vd: _gather_chunk(logical, w_vd, hidden_MD.dtype), chunk[1]
        )
        logits_MVn, is_target_MVn = _chunk_logits(
            logical, rounded_to, chunk, hidden_MD, targets_M, w_Vd.shape[0], w_DVn
        )
        probs_MVn = jnp.exp(logits_MVn - log_sum_M[:, None])
        dlogits_MVn = fusion_barrier(
            (dloss_M[:, None] * (probs_MVn - is_target_MVn.astype(jnp.float32))).astype(
                hidden_MD.dtype
            )
        )
        dhidden_MD = dhidden_MD + jnp.einsum(
            "MV,DV->MD", dlogits_MVn, w_DVn, preferred_element_type=jnp.float32
        )
        return dhidden_MD, to_storage(
            fusion_barrier(jnp.einsum("MD,MV->DV", hidden_MD, dlogits_MVn))
        )[0]

    dhidden_MD, dw_nvd = jax.lax.scan(add_chunk, jnp.zeros(hidden_MD.shape, jnp.float32), chunks)
    return (
        dw_nvd.reshape(-1, w_Vd.shape[1])[: w_Vd.shape[0]],
        dhidden_MD.astype(hidden_MD.dtype),
        np.zeros(targets_M.shape, jax.dtypes.float0),
    )


_losses_of_shard.defvjp(_losses_fwd, _losses_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _figures_of_shard(
    logical: tuple[str, str],
    rounded_to: str,
    w_Vd: jax.Array,
    hidden_MD: jax.Array,
    targets_M: jax.Array,
) -> TokenFigures:
    return _figures_fwd(logical, rounded_to, w_Vd, hidden_MD, targets_M)[0]


def _figures_fwd(logical, rounded_to, w_Vd, hidden_MD, targets_M):
    def add_chunk(carry, chunk):
        max_M, sum_M, weighted_M, total_M, target_M = carry
        logits_MVn, is_target_MVn = _chunk_logits(
            logical, rounded_to, chunk, hidden_MD, targets_M, w_Vd.shape[0]
        )
        new_max_M = jnp.maximum(max_M, logits_MVn.max(-1))
        scale_M = jnp.exp(max_M - new_max_M)
        exp_MVn = jnp.exp(logits_MVn - new_max_M[:, None])
        # Padding rows are -inf.
        finite_MVn = jnp.where(jnp.isneginf(logits_MVn), 0.0, logits_MVn)
        return (
            new_max_M,
            sum_M * scale_M + exp_MVn.sum(-1),
            weighted_M * scale_M + (exp_MVn * finite_MVn).sum(-1),
            total_M + finite_MVn.sum(-1),
            target_M + jnp.where(is_target_MVn, logits_MVn, 0.0).sum(-1),
        ), None

    zeros_M = jnp.zeros(targets_M.shape, jnp.float32)
    (max_M, sum_M, weighted_M, total_M, target_M), _ = jax.lax.scan(
        add_chunk,
        (zeros_M - jnp.inf, zeros_M, zeros_M, zeros_M, zeros_M),
        _chunks(logical, w_Vd, hidden_MD),
    )
    all_max_M = island.reduce_max(max_M, "vocab")
    scale_M = jnp.exp(max_M - all_max_M)
    sum_M, weighted_M, total_M, target_M = (
        island.reduce_sum(a_M, "vocab")
        for a_M in (sum_M * scale_M, weighted_M * scale_M, total_M, target_M)
    )
    log_sum_M = all_max_M + jnp.log(sum_M)
    num_shards = island.num_shards("vocab") * island.num_stored_shards(logical[0])
    figures = TokenFigures(
        log_sum_M - target_M,
        (target_M >= all_max_M).astype(jnp.float32),
        log_sum_M - weighted_M / sum_M,
        total_M / (w_Vd.shape[0] * num_shards),
    )
    return figures, (w_Vd, hidden_MD, targets_M, log_sum_M)


def _figures_bwd(logical, rounded_to, residuals, dfigures):
    return _losses_bwd(logical, rounded_to, residuals, dfigures.loss)


_figures_of_shard.defvjp(_figures_fwd, _figures_bwd)


def _chunks(
    logical: tuple[str, str], w_Vd: jax.Array, hidden_MD: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Splits the table into (index [n], rows [n, v, d]).

    Chunk i has the i-th v rows of every shard.  The last chunk may be zero-padded.
    """
    num_rows, width = w_Vd.shape
    n = num_chunks(hidden_MD.shape[0], num_rows, island.num_stored_shards(logical[0]))
    v = rows_of_chunk(num_rows, n)
    w_Vd = w_Vd if n * v == num_rows else jnp.pad(w_Vd, ((0, n * v - num_rows), (0, 0)))
    return jnp.arange(n), w_Vd.reshape(n, v, width)


def _gather_chunk(logical, w_vd, dtype):
    return island.gather_param(xla_workarounds.rows_as_columns(w_vd), logical[::-1], dtype)


def _chunk_logits(logical, rounded_to, chunk, hidden_MD, targets_M, num_rows, w_DVn=None):
    """Returns a chunk's logits, float32 [M, Vn], and whether each is the target's, bool [M, Vn].

    num_rows: rows that a shard stores, without padding.
    """
    index, w_vd = chunk
    v = w_vd.shape[0]
    w_DVn = _gather_chunk(logical, w_vd, hidden_MD.dtype) if w_DVn is None else w_DVn
    logits_MVn = fusion_barrier(
        jnp.einsum("MD,DV->MV", hidden_MD, w_DVn, preferred_element_type=jnp.float32)
    )
    logits_MVn = rounded(logits_MVn, rounded_to)
    # Row r of the chunk is row r % v of shard r // v's part.
    num_shards, row_Vn = island.num_stored_shards(logical[0]), jnp.arange(w_DVn.shape[1])
    shard_Vn = island.shard_index("vocab") * num_shards + row_Vn // v
    stored_row_Vn = index * v + row_Vn % v
    is_target_MVn = (shard_Vn * num_rows + stored_row_Vn)[None, :] == targets_M[:, None]
    if num_rows % v == 0:
        return logits_MVn, is_target_MVn
    # Padding rows would have the token ids of the next shard.
    is_row_Vn = stored_row_Vn < num_rows
    return jnp.where(is_row_Vn, logits_MVn, -jnp.inf), is_target_MVn & is_row_Vn
