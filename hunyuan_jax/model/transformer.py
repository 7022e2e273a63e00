"""The whole model: embedding, stack of layers, final norm, head.

Letters: B batch, T tokens, D model, V vocabulary, P groups, f layers of a group.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from hunyuan_jax.config import ModelConfig
from hunyuan_jax.layers import embedding, loss, rope
from hunyuan_jax.layers.norm import RmsNorm
from hunyuan_jax.layers.protocols import Sequence
from hunyuan_jax.model.cache import Cache, entries_of, prefix_of
from hunyuan_jax.model.mtp import Mtp
from hunyuan_jax.model.stack import STREAM, Entries, Stack
from hunyuan_jax.parallel import context
from hunyuan_jax.parallel.rules import constrain


class Output(NamedTuple):
    """hidden_BTD after the final norm, the cache if one was given, router figures [P, f, ...]
    (empty if dense), and the residual stream after each of L layers if it was to be kept.

    hidden_BTD has the tokens in the order of `parallel.context`, which is the row's on one chip.
    """

    hidden_BTD: jax.Array
    cache: Cache | None
    stats: dict[str, jax.Array]
    stream_LBTD: jax.Array | None = None


class Transformer(nnx.Module):
    """Hunyuan-Large.  Holds parameters; its methods are functions of them and change nothing.

    A call runs whole sequences; `prefill`, `extend` and `decode` fill and continue a cache.
    """

    def __init__(
        self, cfg: ModelConfig, mesh: Mesh, key: jax.Array, stack: type[nnx.Module] = Stack
    ):
        """`stack`: a class constructed and called as `Stack`, which holds and runs the layers."""
        embed_key, groups_key, head_key = jax.random.split(key, 3)
        self.cfg = cfg
        self.mesh = mesh
        self.embed = embedding.Embedding(cfg, mesh, embed_key)
        for index, (name, part) in enumerate(self._main_stacks()):
            # The layers below those of "groups" come first, but were added later.
            stack_key = groups_key if name == "groups" else jax.random.fold_in(groups_key, index)
            setattr(self, name, stack(part, mesh, stack_key))
        if cfg.num_mtp_layers:
            mtp_key, layer_key = jax.random.split(jax.random.fold_in(key, 3))
            self.mtp = Mtp(cfg, mesh, mtp_key)
            self.mtp_groups = stack(cfg.stacks["mtp_groups"], mesh, layer_key)
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
        keeps_stream: bool = False,
    ) -> Output:
        """Runs whole sequences without a cache.

        Args:
          tokens_BT: int32.
          positions_BT: int32 RoPE positions.
          segment_ids_BT: int32; tokens attend within their own segment only, 0 is padding.
          key: typed key of this (seed, step), for recycle routing and dropout.
          is_training: whether dropout acts; needs `key`.
          keeps_stream: whether the output has the residual stream after each layer.
        """
        cfg = self.cfg
        if is_training and key is None and (cfg.attention_dropout or cfg.hidden_dropout):
            raise ValueError(
                "is_training with dropout needs a key; pass key=, or is_training=False."
            )
        tokens_BT, positions_BT, segment_ids_BT = (
            context.to_chips(x_BT, self.mesh) for x_BT in (tokens_BT, positions_BT, segment_ids_BT)
        )
        sequence = Sequence(rope.cos_sin(positions_BT, cfg), segment_ids_BT)
        hidden_BTD, _, stats = self._run(tokens_BT, sequence, None, key, is_training, keeps_stream)
        return Output(hidden_BTD, None, stats, stats.pop(STREAM, None))

    def prefill(
        self, tokens_BT: jax.Array, positions_BT: jax.Array, mask_BT: jax.Array, cache: Cache
    ) -> Output:
        """Runs prompts and puts them into the first T slots of a cache, whatever it held.

        Args:
          tokens_BT: int32.
          positions_BT: int32 RoPE positions; `extend` and `decode` count on from them if a row's
            first token has position 0.
          mask_BT: int32, 1 for a row's tokens, which are consecutive, and 0 for padding on either
            side; padding on the right leaves its slots free.
        """
        sequence = Sequence(rope.cos_sin(positions_BT, self.cfg), mask_BT)
        hidden_BTD, entries, stats = self._run(tokens_BT, sequence, cache.entries)
        start_B = jnp.argmax(mask_BT > 0, axis=1).astype(jnp.int32)
        length_B = start_B + (mask_BT > 0).sum(1, dtype=jnp.int32)
        return Output(hidden_BTD, Cache(entries, start_B, length_B), stats)

    def extend(self, tokens_BT: jax.Array, cache: Cache) -> Output:
        """Appends T tokens to every row of a cache; each row must have room for them.

        Where rows need different numbers of tokens, extend all by the most, then
        `cache.rollback`.  In pages, T is less than a page, or whole pages from the beginning of
        one on; a single token or one page where rows are on several chips.
        """
        tokens_BT = context.to_chips(tokens_BT, self.mesh)
        sequence = self._behind(cache, tokens_BT)[1]
        hidden_BTD, entries, stats = self._run(tokens_BT, sequence, cache.entries)
        length_B = cache.length_B + tokens_BT.shape[1]
        return Output(hidden_BTD, cache._replace(entries=entries, length_B=length_B), stats)

    def decode(self, token_B: jax.Array, cache: Cache) -> Output:
        """Appends one token to every row of a cache; the output has T = 1."""
        return self.extend(token_B[:, None], cache)

    def _behind(self, cache: Cache, tokens_BT: jax.Array) -> tuple[jax.Array, Sequence]:
        """(positions [B, T] of tokens behind those of a cache, their sequence)."""
        positions_BT = (cache.length_B - cache.start_B)[:, None] + jnp.arange(tokens_BT.shape[1])
        positions_BT = context.to_chips(positions_BT, self.mesh)
        angles = rope.cos_sin(positions_BT, self.cfg)
        where = (cache.start_B, cache.length_B, cache.table_BN)
        return positions_BT, Sequence(angles, jnp.ones_like(tokens_BT), *where)

    def _run(
        self,
        tokens_BT: jax.Array,
        sequence: Sequence,
        entries: Entries,
        key: jax.Array | None = None,
        is_training: bool = False,
        keeps_stream: bool = False,
    ) -> tuple[jax.Array, Entries, dict[str, jax.Array]]:
        if entries is not None and sequence.table_BN is None:
            context.refuse(self.mesh, "a contiguous cache")
        x_BTD = self.embed(tokens_BT, self.cfg.dtype)
        x_BTD = constrain(x_BTD, self.mesh, ("batch", "seq", "embed"))
        stats, new_entries, streams = {}, {}, []
        # Of the kinds of stacks only `Stack` can; the others run without training.
        options = {"keeps_stream": True} if keeps_stream else {}
        for name, _ in self._main_stacks():
            # Keys of "groups" are counted from 0 on.
            own_key = key
            if key is not None and name != "groups":
                own_key = jax.random.fold_in(key, self.cfg.num_layers)
            stack = getattr(self, name)
            x_BTD, own, stats = stack(
                x_BTD, sequence, entries_of(entries, name), own_key, is_training, **options
            )
            if keeps_stream:
                streams.append(stats.pop(STREAM))
            new_entries |= {prefix_of(name) + place: entry for place, entry in (own or {}).items()}
        if keeps_stream:
            stats[STREAM] = jnp.concatenate(streams)
        return self.final_norm(x_BTD), new_entries or None, stats

    def _main_stacks(self) -> list[tuple[str, ModelConfig]]:
        """The stacks that every token goes through: (name, the config of its layers)."""
        return [item for item in self.cfg.stacks.items() if item[0] != "mtp_groups"]

    def predict_next(
        self,
        hidden_BTD: jax.Array,
        next_BT: jax.Array,
        positions_BT: jax.Array,
        segment_ids_BT: jax.Array,
        *,
        key: jax.Array | None = None,
        is_training: bool = False,
    ) -> Output:
        """Multi-token prediction: the output at t says which token follows next_BT[:, t].

        Args:
          hidden_BTD: output of a call.
          next_BT: int32, the token after each of that call.
          positions_BT, segment_ids_BT, key, is_training: as in that call.
        """
        next_BT, positions_BT, segment_ids_BT = (
            context.to_chips(x_BT, self.mesh) for x_BT in (next_BT, positions_BT, segment_ids_BT)
        )
        x_BTD = self.mtp.join(self.embed(next_BT, self.cfg.dtype), hidden_BTD, positions_BT)
        sequence = Sequence(rope.cos_sin(positions_BT, self.cfg), segment_ids_BT)
        if key is not None:
            key = jax.random.fold_in(key, self.cfg.num_layers + 1)
        x_BTD, _, stats = self.mtp_groups(x_BTD, sequence, None, key, is_training)
        return Output(self.mtp.final_norm(x_BTD), None, stats)

    def extend_mtp(self, hidden_BTD: jax.Array, next_BT: jax.Array, cache: Cache) -> Output:
        """As `predict_next`, behind the tokens of a cache of that layer.

        Args:
          hidden_BTD: output of `extend` at the same slots; of further tokens, that of this.
        """
        positions_BT, sequence = self._behind(cache, next_BT)
        x_BTD = self.mtp.join(self.embed(next_BT, self.cfg.dtype), hidden_BTD, positions_BT)
        own = entries_of(cache.entries, "mtp_groups")
        x_BTD, own, stats = self.mtp_groups(x_BTD, sequence, own, None, False)
        entries = {prefix_of("mtp_groups") + place: entry for place, entry in own.items()}
        length_B = cache.length_B + next_BT.shape[1]
        cache = cache._replace(entries=entries, length_B=length_B)
        return Output(self.mtp.final_norm(x_BTD), cache, stats)

    def logits(self, hidden_BTD: jax.Array) -> jax.Array:
        """float32 [B, T, V]: for generation; a training loss comes from `token_losses`."""
        logits_BTV = embedding.logits(self._table(), hidden_BTD, self.mesh, self._logits_dtype())
        return context.from_chips(logits_BTV, self.mesh, "vocab")

    def token_losses(self, hidden_BTD: jax.Array, targets_BT: jax.Array) -> jax.Array:
        """-log p(target) in nats, float32 [B, T]; targets are already shifted: targets[:, t] is
        what position t predicts.
        """
        dtype, targets_BT = self._logits_dtype(), context.to_chips(targets_BT, self.mesh)
        loss_BT = loss.token_losses(self._table(), hidden_BTD, targets_BT, self.mesh, dtype)
        return context.from_chips(loss_BT, self.mesh)

    def _logits_dtype(self) -> str:
        return "float32" if self.cfg.fp32_head else self.cfg.dtype

    def token_figures(self, hidden_BTD: jax.Array, targets_BT: jax.Array) -> loss.TokenFigures:
        """As `token_losses`, with what a run logs about its targets beside the loss."""
        dtype, targets_BT = self._logits_dtype(), context.to_chips(targets_BT, self.mesh)
        figures = loss.token_figures(self._table(), hidden_BTD, targets_BT, self.mesh, dtype)
        return jax.tree.map(lambda x_BT: context.from_chips(x_BT, self.mesh), figures)

    def _table(self) -> nnx.Param:
        return self.embed.embedding_VD if self.cfg.tie_embeddings else self.lm_head.w_VD
