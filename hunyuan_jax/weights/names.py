"""The one table between official tensor names and our parameter paths (specification section 2).

Only this file knows that layer l is (group l // F, layer l % F) with F = cla_share_factor, and
that torch linears are [out, in].
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from hunyuan_jax.config import ModelConfig
from hunyuan_jax.layers.facts import Tensor
from hunyuan_jax.model.layout import LayerFacts, group_layout
from hunyuan_jax.params.roles import Role


class Entry(NamedTuple):
    """One official tensor.

    name, shape: as in the checkpoint.
    path: '/'-joined path of our parameter; index: position of the tensor in its leading (stacked)
    dims.
    is_transposed: whether ours is [in, out] (with `in` or `out` split into heads); role: that of
    our parameter; our_shape: of the tensor in our layout, without the stacked dims.
    """

    name: str
    shape: tuple[int, ...]
    path: str
    index: tuple[int, ...]
    is_transposed: bool
    role: Role
    our_shape: tuple[int, ...]


def entries(cfg: ModelConfig) -> list[Entry]:
    """Every tensor of the official checkpoint, in the order the official module declares them."""
    D, V = cfg.hidden_size, cfg.vocab_size
    table = [
        Entry(
            "model.embed_tokens.weight",
            (V, D),
            "embed/embedding_VD",
            (),
            False,
            Role.EMBEDDING,
            (V, D),
        )
    ]
    for layer, facts in enumerate(group_layout(cfg) * cfg.num_groups):
        table += _layer(cfg, layer, facts)
    table.append(
        Entry("model.norm.weight", (D,), "final_norm/scale_D", (), False, Role.NORM, (D,))
    )
    if not cfg.tie_embeddings:
        table.append(
            Entry("lm_head.weight", (V, D), "lm_head/w_VD", (), False, Role.MATRIX, (V, D))
        )
    return table


_FUSED = re.compile(r"(model\.layers\.\d+\.mlp\.experts\.)(gate_up_proj|down_proj)")


def unfused(
    tensors: Iterator[tuple[str, np.ndarray, str]], cfg: ModelConfig
) -> Iterator[tuple[str, np.ndarray, str]]:
    """(name, array, file) with experts apart where they are one tensor, as transformers 5 has them
    in memory and can save them.

    gate_up_proj [E, 2 F, D] is gate above up, down_proj [E, D, F]; their parts come with the file
    "".  A fused tensor of another shape is passed on, and then is one that the model does not
    have.
    """
    E, D, F = cfg.moe.num_experts, cfg.hidden_size, cfg.intermediate_size
    for name, tensor, file in tensors:
        fused = _FUSED.fullmatch(name)
        kinds = (
            {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}[fused[2]]
            if fused
            else ()
        )
        if not fused or tensor.shape != {2: (E, 2 * F, D), 1: (E, D, F)}[len(kinds)]:
            yield name, tensor, file
            continue
        for expert in range(E):
            for kind, part in zip(kinds, np.split(tensor[expert], len(kinds)), strict=True):
                yield f"{fused[1]}{expert}.{kind}.weight", part, ""


def to_ours(tensor: np.ndarray, entry: Entry, shape: tuple[int, ...]) -> np.ndarray:
    """The official tensor in our layout; `shape` is that of our parameter without its stacked
    dims.
    """
    return (tensor.T if entry.is_transposed else tensor).reshape(shape)


def to_official(array: np.ndarray, entry: Entry) -> np.ndarray:
    """Inverse of `to_ours`: our array (without stacked dims) as the official tensor, contiguous."""
    if not entry.is_transposed:
        return np.ascontiguousarray(array.reshape(entry.shape))
    return np.ascontiguousarray(array.reshape(entry.shape[::-1]).T)


def stacked_shape(entry: Entry, cfg: ModelConfig) -> tuple[int, ...]:
    """The leading dims of our parameter that `entry.index` points into: groups, experts."""
    return {0: (), 1: (cfg.num_groups,), 2: (cfg.num_groups, cfg.moe.num_experts)}[
        len(entry.index)
    ]


def _layer(cfg: ModelConfig, layer: int, facts: LayerFacts) -> list[Entry]:
    D, (group, i) = cfg.hidden_size, divmod(layer, cfg.cla_share_factor)
    norms = [
        Tensor(f"{official}.weight", (D,), f"{ours}/scale_D", (D,), Role.NORM)
        for official, ours in (
            ("input_layernorm", "attn_norm"),
            ("post_attention_layernorm", "mlp_norm"),
        )
    ]
    return [
        Entry(
            f"model.layers.{layer}.{tensor.name}",
            tensor.shape,
            f"groups/layer_{i}/{tensor.path}",
            (group,) if tensor.expert is None else (group, tensor.expert),
            tensor.is_transposed,
            tensor.role,
            tensor.our_shape,
        )
        for tensor in facts.official_names(cfg) + norms
    ]
