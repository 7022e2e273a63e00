"""The CLA group: one producer layer and its consumers, the unit of scan, remat and cache.

Letters: B batch, T queries, S keys, D model, K kv heads, H head dim, F layers of the group (the
share factor).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from hunyuan_jax.config import ModelConfig
from hunyuan_jax.layers.ffn.moe.layer import Moe
from hunyuan_jax.layers.ffn.swiglu import Mlp
from hunyuan_jax.layers.mixer.attention import Attention, Visibility, drop
from hunyuan_jax.layers.norm import RmsNorm


class Sequence(NamedTuple):
    """What every layer knows about the tokens: RoPE tables [B, T, H/2] each, who sees whom,
    is_valid bool [B, T].
    """

    cos_sin_BTh: tuple[jax.Array, jax.Array]
    visibility: Visibility
    is_valid_BT: jax.Array


# (k, v) [B, T, K, H] of new tokens -> ((k, v) [B, S, K, H] to attend to, the cache that holds
# them).
Extend = Callable[[tuple[jax.Array, jax.Array]], tuple[tuple[jax.Array, jax.Array], Any]]


class Layer(nnx.Module):
    """Pre-norm attention and MLP (dense or mixture of experts)."""

    def __init__(self, cfg: ModelConfig, mesh: Mesh, key: jax.Array, *, is_producer: bool):
        attn_key, mlp_key = jax.random.split(key)
        self.cfg = cfg
        self.attn_norm = RmsNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.attn = Attention(cfg, mesh, attn_key, is_producer=is_producer)
        self.mlp_norm = RmsNorm(cfg.hidden_size, cfg.rms_norm_eps)
        if cfg.is_moe:
            self.moe = Moe(cfg, mesh, mlp_key)
        else:
            self.mlp = Mlp(cfg, mesh, mlp_key)

    def __call__(
        self,
        x_BTD: jax.Array,
        y_BTD: jax.Array,
        kv: tuple[jax.Array, jax.Array],
        sequence: Sequence,
        key: jax.Array | None,
        is_training: bool,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """x + attention + MLP, and the router figures (empty for a dense layer).

        Args:
          x_BTD: the residual stream.
          y_BTD: attn_norm(x), computed by the group because the producer's keys come from it.
          kv: the group's keys and values [B, S, K, H].
          key: typed key of this (seed, step, layer): routing and dropout.
          is_training: whether dropout acts.
        """
        routing_key, *dropout_keys = [None] * 4 if key is None else jax.random.split(key, 4)
        attention_key = dropout_keys[0] if is_training and self.cfg.attention_dropout else None
        out_BTD = self.attn(y_BTD, *kv, sequence.cos_sin_BTh, sequence.visibility, attention_key)
        x_BTD = x_BTD + self._hidden_drop(out_BTD, dropout_keys[1], is_training)
        y_BTD = self.mlp_norm(x_BTD)
        out_BTD, stats = (
            self.moe(y_BTD, sequence.is_valid_BT, routing_key)
            if self.cfg.is_moe
            else (self.mlp(y_BTD), {})
        )
        return checkpoint_name(
            x_BTD + self._hidden_drop(out_BTD, dropout_keys[2], is_training), "stream"
        ), stats

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


class ClaGroup(nnx.Module):
    """cla_share_factor layers that share the first one's keys and values."""

    def __init__(self, cfg: ModelConfig, mesh: Mesh, key: jax.Array):
        self.num_layers = cfg.cla_share_factor
        for i, layer_key in enumerate(jax.random.split(key, cfg.cla_share_factor)):
            setattr(self, f"layer_{i}", Layer(cfg, mesh, layer_key, is_producer=i == 0))

    def layers(self) -> list[Layer]:
        """Producer first."""
        return [getattr(self, f"layer_{i}") for i in range(self.num_layers)]

    def __call__(
        self,
        x_BTD: jax.Array,
        sequence: Sequence,
        key: jax.Array | None,
        is_training: bool,
        extend: Extend | None = None,
    ) -> tuple[jax.Array, Any, dict[str, jax.Array]]:
        """The residual stream after the group, what `extend` made of the cache (None without), and
        router figures [F, ...].

        Args:
          key: typed key of this (seed, step, group).
          extend: puts the tokens' keys and values into a cache; None attends to them alone.
        """
        producer = self.layer_0
        y_BTD = producer.attn_norm(x_BTD)
        kv, extended = producer.attn.keys_values(y_BTD, sequence.cos_sin_BTh), None
        if extend is not None:
            kv, extended = extend(kv)
        stats = []
        for i, layer in enumerate(self.layers()):
            layer_key = None if key is None else jax.random.fold_in(key, i)
            y_BTD = y_BTD if i == 0 else layer.attn_norm(x_BTD)
            x_BTD, layer_stats = layer(x_BTD, y_BTD, kv, sequence, layer_key, is_training)
            stats.append(layer_stats)
        return x_BTD, extended, jax.tree.map(lambda *a: jnp.stack(a), *stats)
