"""The whole model: embedding, scanned CLA groups, final norm, head.

Letters: B batch, T tokens, D model, V vocabulary, P CLA groups, F layers of a group.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from hunyuan_jax.config import ModelConfig
from hunyuan_jax.layers import embedding, loss, rope
from hunyuan_jax.layers.mixer.attention import Visibility
from hunyuan_jax.layers.norm import RmsNorm
from hunyuan_jax.model.cache import KvCache
from hunyuan_jax.model.stack import ClaGroup, Sequence
from hunyuan_jax.parallel.rules import constrain
from hunyuan_jax.params import declare as params

_REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.save_only_these_names(
        "stream", "product", "dispatched", "attended"
    ),
    "full": jax.checkpoint_policies.save_only_these_names("stream"),
}


class Output(NamedTuple):
    """hidden_BTD after the final norm, the cache if one was given, and router figures [P, F, ...]
    (empty if dense).
    """

    hidden_BTD: jax.Array
    cache: KvCache | None
    stats: dict[str, jax.Array]


class Transformer(nnx.Module):
    """Hunyuan-Large.  Holds parameters; `__call__` and `logits` are functions of them and change
    nothing.
    """

    def __init__(self, cfg: ModelConfig, mesh: Mesh, key: jax.Array):
        embed_key, groups_key, head_key = jax.random.split(key, 3)
        self.cfg = cfg
        self.mesh = mesh
        self.embed = embedding.Embedding(cfg, mesh, embed_key)
        self.groups = jax.vmap(lambda group_key: ClaGroup(cfg, mesh, group_key))(
            jax.random.split(groups_key, cfg.num_groups)
        )
        self.final_norm = RmsNorm(cfg.hidden_size, cfg.rms_norm_eps)
        if not cfg.tie_embeddings:
            self.lm_head = embedding.Head(cfg, mesh, head_key)

    def __call__(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        segment_ids_BT: jax.Array,
        *,
        key: jax.Array | None = None,
        is_training: bool = False,
        cache: KvCache | None = None,
    ) -> Output:
        """Runs all layers.

        Args:
          tokens_BT: int32.
          positions_BT: int32 RoPE positions.
          segment_ids_BT: int32; tokens attend within their own segment only, 0 is padding.  With a
            cache, 1 or 0.
          key: typed key of this (seed, step), for recycle routing and dropout.
          is_training: whether dropout acts; needs `key`.
          cache: continues it: the tokens take the next T slots.
        """
        cfg = self.cfg
        if is_training and key is None and (cfg.attention_dropout or cfg.hidden_dropout):
            raise ValueError(
                "is_training with dropout needs a key; pass key=, or is_training=False."
            )
        x_BTD = constrain(self.embed(tokens_BT, cfg.dtype), self.mesh, ("batch", "seq", "embed"))
        first_slot, key_segment_BS, cached_PBSKH = 0, segment_ids_BT, None
        if cache is not None:
            first_slot = cache.num_filled
            key_segment_BS = jax.lax.dynamic_update_slice_in_dim(
                cache.segment_BS, segment_ids_BT, first_slot, axis=1
            )
            cached_PBSKH = (cache.k_PBSKH, cache.v_PBSKH)
        slot_T = first_slot + jnp.arange(tokens_BT.shape[1])
        visibility = Visibility(slot_T, segment_ids_BT, key_segment_BS)
        sequence = Sequence(rope.cos_sin(positions_BT, cfg), visibility, segment_ids_BT > 0)
        group_def, group_params_P = nnx.split(self.groups)

        def one_group(carry, per_group):
            x_BTD, cached_PBSKH = carry
            group_params, group_index = per_group
            group_key = None if key is None else jax.random.fold_in(key, group_index)
            group = nnx.merge(group_def, params.in_use(group_params, group_index))
            extend = (
                None
                if cache is None
                else functools.partial(_extend, cached_PBSKH, group_index, first_slot)
            )
            x_BTD, cached_PBSKH, stats = group(x_BTD, sequence, group_key, is_training, extend)
            return (constrain(x_BTD, self.mesh, ("batch", "seq", "embed")), cached_PBSKH), stats

        if cfg.remat != "none":
            one_group = jax.checkpoint(
                one_group, policy=_REMAT_POLICIES[cfg.remat], prevent_cse=False
            )
        carry = (x_BTD, cached_PBSKH)
        if any(map(params.is_apart, jax.tree.leaves(group_params_P, is_leaf=params.is_apart))):
            stats_P = []
            for index in range(cfg.num_groups):
                group_params = jax.tree.map(
                    lambda leaf, i=index: leaf[i], group_params_P, is_leaf=params.is_apart
                )
                carry, stats = one_group(carry, (group_params, index))
                stats_P.append(stats)
            stats_PF = jax.tree.map(lambda *a: jnp.stack(a), *stats_P)
        else:
            carry, stats_PF = jax.lax.scan(
                one_group, carry, (group_params_P, jnp.arange(cfg.num_groups))
            )
        x_BTD, cached_PBSKH = carry
        if cache is not None:
            cache = KvCache(*cached_PBSKH, key_segment_BS, first_slot + tokens_BT.shape[1])
        return Output(self.final_norm(x_BTD), cache, stats_PF)

    def logits(self, hidden_BTD: jax.Array) -> jax.Array:
        """float32 [B, T, V]: for generation; a training loss comes from `token_losses`."""
        return embedding.logits(self._table(), hidden_BTD, self.mesh)

    def token_losses(self, hidden_BTD: jax.Array, targets_BT: jax.Array) -> jax.Array:
        """-log p(target) in nats, float32 [B, T]; targets are already shifted: targets[:, t] is
        what position t predicts.
        """
        return loss.token_losses(self._table(), hidden_BTD, targets_BT, self.mesh)

    def _table(self) -> nnx.Param:
        return self.embed.embedding_VD if self.cfg.tie_embeddings else self.lm_head.w_VD


def _extend(
    cached_PBSKH: tuple[Any, Any],
    group: jax.Array | int,
    first_slot: jax.Array,
    kv_BTKH: tuple[jax.Array, jax.Array],
) -> tuple[tuple[jax.Array, ...], tuple[Any, ...]]:
    """((k, v) [B, S, K, H] of a CLA group with kv_BTKH from first_slot on, the whole cache with
    them).

    The new rows alone are written; the cache is carried from group to group, so that it stays
    where it is.
    """
    if isinstance(cached_PBSKH[0], tuple):
        (k_P, v_P), (k_BTKH, v_BTKH) = cached_PBSKH, kv_BTKH
        k_BKHT = k_BTKH.transpose(0, 2, 3, 1).astype(k_P[group].dtype)
        k_BKHS = jax.lax.dynamic_update_slice_in_dim(k_P[group], k_BKHT, first_slot, axis=3)
        v_BSKH = jax.lax.dynamic_update_slice_in_dim(
            v_P[group], v_BTKH.astype(v_P[group].dtype), first_slot, axis=1
        )
        written = tuple(
            (*old_P[:group], new, *old_P[group + 1 :])
            for old_P, new in ((k_P, k_BKHS), (v_P, v_BSKH))
        )
        return (k_BKHS.transpose(0, 3, 1, 2), v_BSKH), written
    whole = tuple(
        jax.lax.dynamic_update_slice(
            old_PBSKH, new_BTKH[None].astype(old_PBSKH.dtype), (group, 0, first_slot, 0, 0)
        )
        for old_PBSKH, new_BTKH in zip(cached_PBSKH, kv_BTKH, strict=True)
    )
    return tuple(
        jax.lax.dynamic_index_in_dim(x_PBSKH, group, keepdims=False) for x_PBSKH in whole
    ), whole
