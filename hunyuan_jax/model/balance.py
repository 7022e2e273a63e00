"""Balance without a loss: after each step the load of the experts moves their selection biases.

Letters: P groups, f layers of a group, E experts.
"""

from typing import Any

import jax
import jax.numpy as jnp

from hunyuan_jax.config import ModelConfig
from hunyuan_jax.layers.ffn.moe import routing
from hunyuan_jax.layers.ffn.moe.layer import Moe


def moved_biases(
    frozen: dict[str, Any], figures: dict[str, jax.Array], cfg: ModelConfig, is_accepted: jax.Array
) -> dict[str, Any]:
    """Returns the parameters that have no gradient, with the selection biases after a step.

    Args:
      frozen: nested dict of arrays, the biases [P, E] among them.
      figures: of the layers that ran, [P, f, ...], over the whole batch; the layer of multi-token
        prediction is the last group.
      cfg: config.model.
      is_accepted: bool scalar; a step that was refused moves nothing.
    """
    if not (cfg.is_moe and cfg.moe.bias_rate):
        return frozen
    first, moved = 0, dict(frozen)
    for name, stack in _trained_stacks(cfg):
        chosen_PfE = figures["wished_E"][first : first + stack.num_groups]
        first += stack.num_groups
        moved[name] = dict(frozen[name])
        for place in range(stack.cla_share_factor):
            layer = dict(frozen[name][f"layer_{place}"])
            old_PE = layer[Moe.attribute]["bias_E"]
            new_PE = routing.moved_bias(old_PE, chosen_PfE[:, place], cfg.moe)
            bias = {"bias_E": jnp.where(is_accepted, new_PE, old_PE)}
            moved[name][f"layer_{place}"] = layer | {Moe.attribute: layer[Moe.attribute] | bias}
    return moved


def bias_metrics(params: dict[str, Any], cfg: ModelConfig) -> dict[str, jax.Array]:
    """Returns bias_L, the largest absolute selection bias of each layer; {} without biases."""
    if not (cfg.is_moe and cfg.moe.selection_bias):
        return {}
    biases_PE = [
        params[name][f"layer_{place}"][Moe.attribute]["bias_E"]
        for name, stack in _trained_stacks(cfg)
        for place in range(stack.cla_share_factor)
    ]
    return {"bias_L": jnp.concatenate([jnp.abs(bias_PE).max(-1) for bias_PE in biases_PE])}


def _trained_stacks(cfg: ModelConfig) -> list[tuple[str, ModelConfig]]:
    """The stacks with experts that a train step runs, in the order of the figures."""
    names = ("groups", "mtp_groups") if cfg.mtp_loss_weight else ("groups",)
    return [(name, cfg.stacks[name]) for name in names]
