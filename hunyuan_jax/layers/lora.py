"""LoRA (arXiv 2106.09685): projections W become W + alpha / rank * A B, and only A and B are
trained.

A consumer of a CLA group has no key and value projection, hence no adapter of one: what its
group's producer learns serves it too. Each routed expert has adapters of its own. Letters: P CLA
groups, D model, N query heads, K kv heads, H head dim, F ffn, E experts, r rank, I and O the
entries of a projection's input and output.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from hunyuan_jax.config import LORA_TARGETS, LoraConfig, ModelConfig
from hunyuan_jax.layers.linear import linear
from hunyuan_jax.parallel import island
from hunyuan_jax.params import declare as params

# target -> (parameter stem, batch dims, input dims, output dims)
_DIMS = {
    "q": ("wq", "", "D", "NH"),
    "k": ("wk", "", "D", "KH"),
    "v": ("wv", "", "D", "KH"),
    "o": ("wo", "", "NH", "D"),
    "gate": ("w_gate", "", "D", "F"),
    "up": ("w_up", "", "D", "F"),
    "down": ("w_down", "", "F", "D"),
    "expert_gate": ("w_gate", "E", "D", "F"),
    "expert_up": ("w_up", "E", "D", "F"),
    "expert_down": ("w_down", "E", "F", "D"),
}
assert tuple(_DIMS) == LORA_TARGETS


class Adapted(NamedTuple):
    """A projection x w + scale * x a b; a None: without adapter."""

    w: jax.Array
    a: jax.Array | None = None
    b: jax.Array | None = None
    scale: float = 1.0


def names(target: str) -> tuple[str, str, str]:
    """The attributes of `Attention`, `Mlp` or `Experts` that hold W, A and B of a target."""
    stem, lead, ins, outs = _DIMS[target]
    return (
        f"{stem}_{lead}{ins}{outs}",
        f"{stem}_lora_a_{lead}{ins}r",
        f"{stem}_lora_b_{lead}r{outs}",
    )


def shapes(
    target: str, w_dims: tuple[Any, ...], rank: Any
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The dims of A and of B for those of W, sizes or names."""
    _, lead, ins, _ = _DIMS[target]
    first, last = len(lead), len(lead + ins)  # of the dims that it reads
    return (*w_dims[:last], rank), (*w_dims[:first], rank, *w_dims[last:])


def declare(module: nnx.Module, cfg: ModelConfig, key: jax.Array) -> None:
    """Gives a module adapters of those of its projections that are targets.  B is zero, so that
    training starts from the model as it is.
    """
    for target, target_key in zip(_DIMS, jax.random.split(key, len(_DIMS)), strict=True):
        w_name, a_name, b_name = names(target)
        if not cfg.lora.rank or target not in cfg.lora.targets or not hasattr(module, w_name):
            continue
        w, lead = getattr(module, w_name), _DIMS[target][1]
        a_shape, b_shape = shapes(target, w[...].shape, cfg.lora.rank)
        a_dims, b_dims = shapes(target, w.get_metadata("dims"), "rank")
        # The spread of the usual initialisation, uniform in +-1 / sqrt(entries of the input).
        std = 1 / math.sqrt(3 * math.prod(a_shape[len(lead) : -1]))
        init = params.normal(target_key, std)
        setattr(module, a_name, params.param(a_shape, a_dims, init, params.Role.ADAPTER))
        setattr(module, b_name, params.param(b_shape, b_dims, params.zeros, params.Role.ADAPTER))


def added(
    x_BTI: jax.Array,
    weights: dict[str, jax.Array],
    logical: dict[str, tuple[str, ...]],
    target: str,
    cfg: ModelConfig,
) -> jax.Array:
    """alpha / rank * x A B, [B, T, O] on one shard of the heads: a partial sum where they are the
    input.  Runs inside an island.
    """
    _, a_name, b_name = names(target)
    a, b = (
        island.gather_param(weights[name], logical[name], x_BTI.dtype) for name in (a_name, b_name)
    )
    rank = cfg.lora.rank
    return linear(linear(x_BTI, a.reshape(-1, rank)), b.reshape(rank, -1)) * cfg.lora.scale


def adapted(
    weights: dict[str, jax.Array], target: str, cfg: LoraConfig, whole: Callable[[str], jax.Array]
) -> Adapted:
    """The projection of a target out of a module's parameters; `whole` gets one of them by name as
    it is used.
    """
    w_name, a_name, b_name = names(target)
    w = whole(w_name)
    return Adapted(w, whole(a_name), whole(b_name), cfg.scale) if a_name in weights else Adapted(w)


def merge(cfg: ModelConfig, tree: dict[str, Any]) -> tuple[ModelConfig, dict[str, Any]]:
    """(config, parameters) of the plain model W + alpha / rank * A B, each W in float32."""
    if not cfg.lora.rank:
        return cfg, tree
    return dataclasses.replace(cfg, lora=LoraConfig()), _merged(tree, cfg.lora)


def _merged(tree: dict[str, Any], cfg: LoraConfig) -> dict[str, Any]:
    adapters = {name for target in cfg.targets for name in names(target)[1:]}
    plain = {
        name: _merged(value, cfg) if isinstance(value, dict) else value
        for name, value in tree.items()
        if name not in adapters
    }
    for target in cfg.targets:
        w_name, a_name, b_name = names(target)
        if a_name in tree:
            w, a, b = (jnp.asarray(tree[name], jnp.float32) for name in (w_name, a_name, b_name))
            lead = w.shape[: 1 + len(_DIMS[target][1])]  # P, and E
            delta = jnp.matmul(
                a.reshape(*lead, -1, cfg.rank), b.reshape(*lead, cfg.rank, -1), precision="highest"
            )
            plain[w_name] = w + cfg.scale * delta.reshape(w.shape)
    return plain
