"""The one table between official tensor names and our parameter paths (docs/model.md, Tensor
names).

Only this file knows that layer l is (group l // F, layer l % F) with F = cla_share_factor, and
that torch linears are [out, in].
"""

from typing import Any, NamedTuple

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


def to_ours(tensor: np.ndarray, entry: Entry, shape: tuple[int, ...]) -> np.ndarray:
    """The official tensor in our layout; `shape` is that of our parameter without its stacked
    dims.
    """
    return (tensor.T if entry.is_transposed else tensor).reshape(shape)


def to_official(array: np.ndarray, entry: Entry) -> np.ndarray:
    """Returns our array (without stacked dims) as the official tensor, contiguous.

    Inverse of `to_ours`.
    """
    if not entry.is_transposed:
        return np.ascontiguousarray(array.reshape(entry.shape))
    return np.ascontiguousarray(array.reshape(entry.shape[::-1]).T)


def read_tensor(params: dict[str, Any], entry: Entry) -> np.ndarray:
    """The official tensor of an entry out of our parameters, a nested dict of arrays."""
    node: Any = params
    for name in entry.path.split("/"):
        node = node[name]
    return to_official(np.asarray(node[entry.index] if entry.index else node), entry)


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
