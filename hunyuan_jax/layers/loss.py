"""Training loss: cross entropy per target, computed over vocabulary chunks, and the
auxiliary router losses.

Letters: B batch, T tokens, M = B * T of this shard, D model, V vocabulary, n chunks of it, v
rows of a chunk that one shard stores, d = D / shards in storage, Vn rows of a whole chunk.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from hunyuan_jax.config import MoeConfig
from hunyuan_jax.layers.embedding import ROWS, TOKENS
from hunyuan_jax.parallel import island, xla_workarounds
from hunyuan_jax.parallel.xla_workarounds import fusion_barrier

_LANES = 128


def token_losses(
    table_VD: nnx.Param, hidden_BTD: jax.Array, targets_BT: jax.Array, mesh: Mesh
) -> jax.Array:
    """-log p(target) in nats, float32 [B, T]; targets are already shifted.

    The [tokens, vocabulary] logits are never whole in memory: the table is gathered and multiplied
    in chunks, and the backward pass computes each chunk's logits again.

    Args:
      table_VD: the output projection, as declared in embedding.py.
      hidden_BTD: after the final norm.
      targets_BT: int32 in [0, V).
      mesh: where the arrays lie.
    """
    logical = table_VD.get_metadata("dims")

    def fn(w_VD, hidden_BTD, targets_BT):
        loss_M = _losses_of_shard(
            logical, w_VD, hidden_BTD.reshape(-1, hidden_BTD.shape[-1]), targets_BT.reshape(-1)
        )
        return loss_M.reshape(targets_BT.shape)

    return island.island(fn, mesh, logical, (ROWS, TOKENS), TOKENS)(
        table_VD[...], hidden_BTD, targets_BT
    )


def mean_loss(loss_BT: jax.Array, weights_BT: jax.Array) -> jax.Array:
    """Weighted mean of token losses, float32 scalar; 0 where all weights are 0."""
    return jnp.sum(loss_BT * weights_BT) / jnp.maximum(weights_BT.sum(), 1.0)


def router_loss(stats: dict[str, jax.Array], cfg: MoeConfig) -> jax.Array:
    """Weighted sum of the balance and z losses, averaged over layers; 0 without a router."""
    if "aux_loss" not in stats:
        return jnp.zeros((), jnp.float32)
    return (
        cfg.aux_loss_weight * stats["aux_loss"].mean() + cfg.z_loss_weight * stats["z_loss"].mean()
    )


def num_chunks(num_tokens: int, num_rows: int, num_shards: int) -> int:
    """Number of vocabulary chunks: the smallest divisor of num_rows that keeps a chunk's logits
    small.

    Where that is more than twice as many as are needed (128167 is 13 times a prime, and 13 rows
    are no matrix), it is as many as are needed, and the last chunk is padded with zeros.

    Args:
      num_tokens: that are multiplied with the table, on one shard.
      num_rows: of the table, on each of num_shards shards in storage.
    """
    most_rows = max(1, xla_workarounds.MAX_LOGITS_BYTES // (4 * num_tokens * num_shards))
    needed = -(-num_rows // most_rows)
    divisor = next((n for n in range(needed, num_rows) if num_rows % n == 0), num_rows)
    if divisor <= 2 * needed:
        return divisor
    return -(-num_rows // (most_rows // _LANES * _LANES or most_rows))


def rows_of_chunk(num_rows: int, num_chunks: int) -> int:
    """Rows of the table in each chunk; in all chunks together more than num_rows if num_chunks
    does not divide it.
    """
    rows = -(-num_rows // num_chunks)
    # Filled up in any case, it may as well be whole tiles of a TPU.
    return rows if num_rows % num_chunks == 0 or rows < _LANES else -(-rows // _LANES) * _LANES


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _losses_of_shard(
    logical: tuple[str, str], w_Vd: jax.Array, hidden_MD: jax.Array, targets_M: jax.Array
) -> jax.Array:
    return _losses_fwd(logical, w_Vd, hidden_MD, targets_M)[0]


def _losses_fwd(logical, w_Vd, hidden_MD, targets_M):
    chunks = _chunks(logical, w_Vd, hidden_MD)

    def add_chunk(carry, chunk):
        max_M, sum_M, target_M = carry
        logits_MVn, is_target_MVn = _chunk_logits(
            logical, chunk, hidden_MD, targets_M, w_Vd.shape[0]
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


def _losses_bwd(logical, residuals, dloss_M):
    w_Vd, hidden_MD, targets_M, log_sum_M = residuals
    chunks = _chunks(logical, w_Vd, hidden_MD)
    # An island hands each shard along `vocab` an equal share of the cotangent.
    dloss_M = island.reduce_sum(dloss_M, "vocab")

    def add_chunk(dhidden_MD, chunk):
        w_DVn, to_storage = jax.vjp(
            lambda w_vd: _gather_chunk(logical, w_vd, hidden_MD.dtype), chunk[1]
        )
        logits_MVn, is_target_MVn = _chunk_logits(
            logical, chunk, hidden_MD, targets_M, w_Vd.shape[0], w_DVn
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


def _chunks(
    logical: tuple[str, str], w_Vd: jax.Array, hidden_MD: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(index [n], rows [n, v, d]): chunk i is the i-th stretch of v rows of every shard; the last
    may be filled up with zeros.
    """
    num_rows, width = w_Vd.shape
    n = num_chunks(hidden_MD.shape[0], num_rows, island.num_stored_shards(logical[0]))
    v = rows_of_chunk(num_rows, n)
    w_Vd = w_Vd if n * v == num_rows else jnp.pad(w_Vd, ((0, n * v - num_rows), (0, 0)))
    return jnp.arange(n), w_Vd.reshape(n, v, width)


def _gather_chunk(logical, w_vd, dtype):
    return island.gather_param(xla_workarounds.rows_as_columns(w_vd), logical[::-1], dtype)


def _chunk_logits(logical, chunk, hidden_MD, targets_M, num_rows, w_DVn=None):
    """Logits float32 [M, Vn] of a chunk of the vocabulary, and whether each is the target's;
    num_rows: that a shard really stores.
    """
    index, w_vd = chunk
    v = w_vd.shape[0]
    w_DVn = _gather_chunk(logical, w_vd, hidden_MD.dtype) if w_DVn is None else w_DVn
    logits_MVn = fusion_barrier(
        jnp.einsum("MD,DV->MV", hidden_MD, w_DVn, preferred_element_type=jnp.float32)
    )
    # Row r of the chunk is row r % v of the stretch that shard r // v stores.
    num_shards, row_Vn = island.num_stored_shards(logical[0]), jnp.arange(w_DVn.shape[1])
    shard_Vn = island.shard_index("vocab") * num_shards + row_Vn // v
    stored_row_Vn = index * v + row_Vn % v
    is_target_MVn = (shard_Vn * num_rows + stored_row_Vn)[None, :] == targets_M[:, None]
    if num_rows % v == 0:
        return logits_MVn, is_target_MVn
    is_row_Vn = (
        stored_row_Vn < num_rows
    )  # behind them, the numbers would be those of the next shard's tokens
    return jnp.where(is_row_Vn, logits_MVn, -jnp.inf), is_target_MVn & is_row_Vn
