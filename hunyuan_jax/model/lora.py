"""LoRA (arXiv 2106.09685): the attention's projections W become W + alpha / rank * A B, and only A and B are trained.

A consumer of a CLA group has no key and value projection, hence no adapter of one: what its group's producer learns serves it too.
Letters: P CLA groups, D model, N query heads, K kv heads, H head dim, r rank, I and O the entries of a projection's input and output.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from hunyuan_jax.config import LoraConfig, ModelConfig
from hunyuan_jax.model import params
from hunyuan_jax.model.linear import linear
from hunyuan_jax.parallel import island

# Of each target: letters and logical names of the dims that it reads and of those that it writes.
_LETTERS = {"D": "embed", "N": "heads", "K": "kv_heads", "H": "head_dim"}
_DIMS = {"q": ("D", "NH"), "k": ("D", "KH"), "v": ("D", "KH"), "o": ("NH", "D")}


def names(target: str) -> tuple[str, str, str]:
    """The attributes of `Attention` that hold W, A and B of a target."""
    ins, outs = _DIMS[target]
    return f"w{target}_{ins}{outs}", f"w{target}_lora_a_{ins}r", f"w{target}_lora_b_r{outs}"


def shapes(cfg: ModelConfig, target: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of A and of B, in one layer."""
    sizes = {"D": cfg.hidden_size, "N": cfg.num_heads, "K": cfg.num_kv_heads, "H": cfg.head_dim}
    ins, outs = (tuple(sizes[letter] for letter in letters) for letters in _DIMS[target])
    return (*ins, cfg.lora.rank), (cfg.lora.rank, *outs)


def declare(module: nnx.Module, cfg: ModelConfig, key: jax.Array, *, is_producer: bool) -> None:
    """Gives an `Attention` the adapters of its own projections.  B is zero, so that training starts from the model as it is."""
    for target, target_key in zip(_DIMS, jax.random.split(key, len(_DIMS)), strict=True):
        if target not in cfg.lora.targets or (target in "kv" and not is_producer):
            continue
        (_, a_name, b_name), (a_shape, b_shape), (ins, outs) = names(target), shapes(cfg, target), _DIMS[target]
        # The spread of the usual initialisation, uniform in +-1 / sqrt(entries of the input).
        std = 1 / math.sqrt(3 * math.prod(a_shape[:-1]))
        setattr(module, a_name, params.normal(target_key, a_shape, (*(_LETTERS[c] for c in ins), "rank"), std))
        setattr(module, b_name, params.zeros(b_shape, ("rank", *(_LETTERS[c] for c in outs))))


def added(x_BTI: jax.Array, weights: dict[str, jax.Array], logical: dict[str, tuple[str, ...]], target: str, cfg: ModelConfig) -> jax.Array:
    """alpha / rank * x A B, [B, T, O] on one shard of the heads: a partial sum where they are the input.  Runs inside an island."""
    _, a_name, b_name = names(target)
    a, b = (island.whole(weights[name], logical[name], x_BTI.dtype) for name in (a_name, b_name))
    rank = cfg.lora.rank
    return linear(linear(x_BTI, a.reshape(-1, rank)), b.reshape(rank, -1)) * (cfg.lora.alpha / rank)


def split(tree: dict[str, Any], cfg: ModelConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what is trained, what is frozen) of a nested dict of parameters: the adapters and the rest, or all and {} without adapters."""
    if not cfg.lora.rank:
        return tree, {}
    trained, frozen = {}, {}
    for name, value in tree.items():
        parts = split(value, cfg) if isinstance(value, dict) else (value, {}) if "_lora_" in name else ({}, value)
        for part, whole in zip(parts, (trained, frozen), strict=True):
            if not isinstance(part, dict) or part:
                whole[name] = part
    return trained, frozen


def join(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Inverse of `split`; a parameter that both hold comes from the second."""
    both = {
        name: join(first[name], second[name]) if isinstance(second[name], dict) else second[name] for name in first.keys() & second.keys()
    }
    return {**first, **second, **both}


def merge(cfg: ModelConfig, tree: dict[str, Any]) -> tuple[ModelConfig, dict[str, Any]]:
    """(config, parameters) of the plain model W + alpha / rank * A B, each W in float32."""
    adapters, base = split(tree, cfg)
    if not cfg.lora.rank:
        return cfg, tree
    groups = {}
    for layer, modules in adapters["groups"].items():
        attn = dict(base["groups"][layer]["attn"])
        for target in _DIMS:
            w_name, a_name, b_name = names(target)
            if a_name in modules["attn"]:
                w = jnp.asarray(attn[w_name], jnp.float32)
                a_PIr, b_PrO = (jnp.asarray(modules["attn"][name], jnp.float32) for name in (a_name, b_name))
                delta_PIO = jnp.matmul(
                    a_PIr.reshape(len(w), -1, cfg.lora.rank), b_PrO.reshape(len(w), cfg.lora.rank, -1), precision="highest"
                )
                attn[w_name] = w + cfg.lora.alpha / cfg.lora.rank * delta_PIO.reshape(w.shape)
        groups[layer] = {"attn": attn}
    return dataclasses.replace(cfg, lora=LoraConfig()), join(base, {"groups": groups})
