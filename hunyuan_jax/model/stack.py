"""The stack of layers: a pattern of layers, repeated and scanned.

Letters: B batch, T tokens, D model, P groups, f layers of a group, L = P f layers.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from hunyuan_jax.config import ModelConfig
from hunyuan_jax.layers.norm import RmsNorm
from hunyuan_jax.layers.protocols import CacheEntry, LayerCache, Sequence
from hunyuan_jax.model.pattern import LayerSpec, pattern
from hunyuan_jax.parallel import xla_cpu
from hunyuan_jax.parallel.mesh import device_kind
from hunyuan_jax.parallel.rules import constrain
from hunyuan_jax.params import declare as params

_REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.save_only_these_names(
        "stream", "product", "dispatched", "attended"
    ),
    "full": jax.checkpoint_policies.save_only_these_names("stream"),
}
_STREAM_DIMS = ("batch", "seq", "embed")
STREAM = "stream"  # among the figures, where it is kept

Entries = dict[str, CacheEntry] | None


class Layer(nnx.Module):
    """Pre-norm mixer and feed-forward network, each with a residual connection."""

    def __init__(self, cfg: ModelConfig, mesh: Mesh, key: jax.Array, spec: LayerSpec):
        mixer_key, ffn_key = jax.random.split(key)
        self.cfg = cfg
        self.spec = spec
        self.attn_norm = RmsNorm(cfg.hidden_size, cfg.rms_norm_eps)
        shares = spec.shares_kv_with is not None
        setattr(self, spec.mixer.attribute, spec.mixer(cfg, mesh, mixer_key, shares=shares))
        self.mlp_norm = RmsNorm(cfg.hidden_size, cfg.rms_norm_eps)
        setattr(self, spec.ffn.attribute, spec.ffn(cfg, mesh, ffn_key))

    @property
    def mixer(self) -> Any:
        """The layer's Mixer."""
        return getattr(self, self.spec.mixer.attribute)

    @property
    def ffn(self) -> Any:
        """The layer's FeedForward."""
        return getattr(self, self.spec.ffn.attribute)

    def __call__(
        self,
        x_BTD: jax.Array,
        sequence: Sequence,
        cache: LayerCache,
        key: jax.Array | None,
        is_training: bool,
    ) -> tuple[jax.Array, LayerCache, dict[str, jax.Array]]:
        """(x + mixer + feed-forward, the cache with the new tokens, figures of the feed-forward).

        Args:
          x_BTD: the residual stream.
          key: typed key of this (seed, step, layer): routing and dropout.
          is_training: whether dropout acts.
        """
        ffn_key, mixer_key, *dropout_keys = [None] * 4 if key is None else jax.random.split(key, 4)
        y_BTD = self.attn_norm(x_BTD)
        out_BTD, cache = self.mixer(y_BTD, sequence, cache, mixer_key if is_training else None)
        x_BTD = x_BTD + self._hidden_drop(out_BTD, dropout_keys[0], is_training)
        out_BTD, stats = self.ffn(self.mlp_norm(x_BTD), sequence.segment_BT > 0, ffn_key)
        x_BTD = x_BTD + self._hidden_drop(out_BTD, dropout_keys[1], is_training)
        return checkpoint_name(x_BTD, "stream"), cache, stats

    def _hidden_drop(
        self, x_BTD: jax.Array, key: jax.Array | None, is_training: bool
    ) -> jax.Array:
        # The paper's SFT uses a "hidden dropout" of 0.2 without saying where; before each residual
        # addition is the usual place.
        return (
            drop(x_BTD, self.cfg.hidden_dropout, key)
            if is_training and self.cfg.hidden_dropout
            else x_BTD
        )


class Stack(nnx.Module):
    """All layers: layer_0, layer_1, ... of the pattern, each with the parameters of its P groups
    stacked, run by a scan over groups.
    """

    def __init__(self, cfg: ModelConfig, mesh: Mesh, key: jax.Array):
        self.cfg = cfg
        self.mesh = mesh
        specs = pattern(cfg)
        key_Pf = jax.vmap(lambda key: jax.random.split(key, len(specs)))(
            jax.random.split(key, cfg.num_groups)
        )
        for place, spec in enumerate(specs):
            layer = jax.vmap(lambda key, spec=spec: Layer(cfg, mesh, key, spec))(key_Pf[:, place])
            setattr(self, f"layer_{place}", layer)

    def layers(self) -> list[Layer]:
        """The layers of the pattern."""
        return [getattr(self, f"layer_{place}") for place in range(len(pattern(self.cfg)))]

    def __call__(
        self,
        x_BTD: jax.Array,
        sequence: Sequence,
        entries: Entries,
        key: jax.Array | None,
        is_training: bool,
        keeps_stream: bool = False,
    ) -> tuple[jax.Array, Entries, dict[str, jax.Array]]:
        """(the residual stream, the cache entries with the new tokens, figures [P, f, ...]).

        Args:
          entries: of the cache; None keeps nothing.
          key: typed key of this (seed, step), for routing and dropout.
          is_training: whether dropout acts.
          keeps_stream: whether the figures have the residual stream after each layer, STREAM
            [L, B, T, D].
        """
        definition, params_P = nnx.split(self)

        def one_group(carry, per_group):
            x_BTD, entries = carry
            group_params, group = per_group
            group_key = None if key is None else jax.random.fold_in(key, group)
            layers = nnx.merge(definition, params.in_use(group_params, group)).layers()
            x_BTD, entries, stats = run_group(
                layers, x_BTD, sequence, entries, group, group_key, is_training, keeps_stream
            )
            return (constrain(x_BTD, self.mesh, _STREAM_DIMS), entries), stats

        if self.cfg.remat != "none":
            one_group = jax.checkpoint(
                one_group, policy=_REMAT_POLICIES[self.cfg.remat], prevent_cse=False
            )
        (x_BTD, entries), stats_Pf = jax.lax.scan(
            one_group,
            (x_BTD, entries),
            (params_P, jnp.arange(self.cfg.num_groups)),
            unroll=xla_cpu.unroll(
                device_kind(self.mesh), self.cfg.num_groups, len(pattern(self.cfg))
            ),
        )
        if keeps_stream:
            stats_Pf[STREAM] = stats_Pf[STREAM].reshape(-1, *x_BTD.shape)
        return x_BTD, entries, stats_Pf


def run_group(
    layers: list[Layer],
    x_BTD: jax.Array,
    sequence: Sequence,
    entries: Entries,
    group: Any,
    key: jax.Array | None,
    is_training: bool,
    keeps_stream: bool = False,
) -> tuple[jax.Array, Entries, dict[str, jax.Array]]:
    """Runs the layers of one group, whose index is `group`; as `Stack`, with figures [f, ...] of
    the layers that have some, and a key of this (seed, step, group).
    """
    caches, stats, stream = {}, [], []
    for place, layer in enumerate(layers):
        shared = layer.spec.shares_kv_with
        source = f"layer_{place if shared is None else shared}"
        if shared is None:
            caches[source] = LayerCache(None if entries is None else entries[source], group)
        layer_key = None if key is None else jax.random.fold_in(key, place)
        x_BTD, caches[source], layer_stats = layer(
            x_BTD, sequence, caches[source], layer_key, is_training
        )
        stats += [layer_stats] * bool(layer_stats)
        stream.append(x_BTD)
    if entries is not None:
        entries = {name: cache.entry for name, cache in caches.items()}
    figures = stack_figures(stats)
    if keeps_stream:
        figures[STREAM] = jnp.stack(stream)
    return x_BTD, entries, figures


def stack_figures(stats: list[dict[str, jax.Array]]) -> dict[str, jax.Array]:
    """The figures of several layers or groups with a leading dim; {} for none."""
    return jax.tree.map(lambda *a: jnp.stack(a), *stats) if stats else {}


def drop(x: jax.Array, rate: float, key: jax.Array) -> jax.Array:
    """Inverted dropout: zero with probability `rate`, else scaled by 1 / (1 - rate)."""
    return jnp.where(jax.random.bernoulli(key, 1.0 - rate, x.shape), x / (1.0 - rate), 0).astype(
        x.dtype
    )
