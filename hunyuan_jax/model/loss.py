"""Training loss: cross entropy per target and the auxiliary router losses."""

import jax
import jax.numpy as jnp

from hunyuan_jax.config import MoeConfig


def cross_entropy(logits_BTV: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array) -> jax.Array:
    """Weighted mean of -log p(target) in nats, float32 scalar; 0 where all weights are 0.

    Targets are already shifted: targets[:, t] is what position t predicts.
    """
    logits_BTV = logits_BTV.astype(jnp.float32)
    target_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    nll_BT = jax.nn.logsumexp(logits_BTV, axis=-1) - target_BT
    return jnp.sum(nll_BT * weights_BT) / jnp.maximum(weights_BT.sum(), 1.0)


def router_loss(stats: dict[str, jax.Array], cfg: MoeConfig) -> jax.Array:
    """Weighted sum of the balance and z losses, averaged over layers; 0 for a dense model."""
    if not stats:
        return jnp.zeros((), jnp.float32)
    return cfg.aux_loss_weight * stats["aux_loss"].mean() + cfg.z_loss_weight * stats["z_loss"].mean()
