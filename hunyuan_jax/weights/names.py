"""The one table between official tensor names and our parameter paths (specification section 2).

Only this file knows that layer l is (group l // F, layer l % F) with F = cla_share_factor, and
that torch linears are [out, in].
"""

from typing import Any, NamedTuple

import numpy as np

from hunyuan_jax.config import ModelConfig
from hunyuan_jax.params.declare import Role


class Entry(NamedTuple):
    """One official tensor.

    name, shape: as in the checkpoint.
    path: '/'-joined path of our parameter; index: position of the tensor in its leading (stacked)
    dims.
    is_transposed: whether ours is [in, out] (with `in` or `out` split into heads); role: that of
    our parameter.
    """

    name: str
    shape: tuple[int, ...]
    path: str
    index: tuple[int, ...]
    is_transposed: bool
    role: Role


def entries(cfg: ModelConfig) -> list[Entry]:
    """Every tensor of the official checkpoint, in the order the official module declares them."""
    D, V = cfg.hidden_size, cfg.vocab_size
    table = [
        Entry("model.embed_tokens.weight", (V, D), "embed/embedding_VD", (), False, Role.EMBEDDING)
    ]
    for layer in range(cfg.num_layers):
        table += _layer(cfg, layer)
    table.append(Entry("model.norm.weight", (D,), "final_norm/scale_D", (), False, Role.NORM))
    if not cfg.tie_embeddings:
        table.append(Entry("lm_head.weight", (V, D), "lm_head/w_VD", (), False, Role.MATRIX))
    return table


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


def our_shape(entry: Entry, cfg: ModelConfig) -> tuple[int, ...]:
    """Our shape of one tensor, without the stacked dims: heads are split out of the official [out,
    in].
    """
    letters = entry.path.rsplit("_", 1)[1]
    sizes = {"N": cfg.num_heads, "K": cfg.num_kv_heads, "H": cfg.head_dim}
    if not set(letters) & set("NK"):
        return entry.shape[::-1] if entry.is_transposed else entry.shape
    return tuple(sizes.get(letter, cfg.hidden_size) for letter in letters)


def _layer(cfg: ModelConfig, layer: int) -> list[Entry]:
    D, N, K, H = cfg.hidden_size, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
    group, i = divmod(layer, cfg.cla_share_factor)
    official, ours = f"model.layers.{layer}.", f"groups/layer_{i}/"
    table = []

    def add(name, shape, path, role, index=(), *, is_transposed=False):
        entry = Entry(official + name, shape, ours + path, (group, *index), is_transposed, role)
        table.append(entry)

    projections = [("q", N * H, D), ("k", K * H, D), ("v", K * H, D), ("o", D, N * H)]
    our_weights = {"q": "wq_DNH", "k": "wk_DKH", "v": "wv_DKH", "o": "wo_NHD"}
    our_biases = {"q": "bq_NH", "k": "bk_KH", "v": "bv_KH", "o": "bo_D"}
    for letter, num_out, num_in in projections:
        if i > 0 and letter in "kv":
            continue  # cross layers use the K/V of their group's first layer
        add(
            f"self_attn.{letter}_proj.weight",
            (num_out, num_in),
            f"attn/{our_weights[letter]}",
            Role.MATRIX,
            is_transposed=True,
        )
        if cfg.attention_bias:
            add(
                f"self_attn.{letter}_proj.bias",
                (num_out,),
                f"attn/{our_biases[letter]}",
                Role.BIAS,
            )
    if cfg.use_qk_norm:
        add("self_attn.query_layernorm.weight", (H,), "attn/q_norm_H", Role.NORM)
        add("self_attn.key_layernorm.weight", (H,), "attn/k_norm_H", Role.NORM)

    def add_mlp(name, path, suffix, width, index=()):
        for projection, shape, letters in (
            ("gate", (width, D), "DF"),
            ("up", (width, D), "DF"),
            ("down", (D, width), "FD"),
        ):
            add(
                f"{name}{projection}_proj.weight",
                shape,
                f"{path}w_{projection}_{suffix}{letters}",
                Role.EXPERT if index else Role.MATRIX,
                index,
                is_transposed=True,
            )

    if cfg.is_moe:
        if cfg.moe.num_shared_experts:
            add_mlp(
                "mlp.shared_mlp.",
                "moe/shared/",
                "",
                cfg.intermediate_size * cfg.moe.num_shared_experts,
            )
        router_shape = (cfg.moe.num_experts, D)
        add("mlp.gate.wg.weight", router_shape, "moe/router_DE", Role.ROUTER, is_transposed=True)
        for expert in range(cfg.moe.num_experts):
            add_mlp(
                f"mlp.experts.{expert}.", "moe/experts/", "E", cfg.intermediate_size, (expert,)
            )
    else:
        add_mlp("mlp.", "mlp/", "", cfg.intermediate_size)
    add("input_layernorm.weight", (D,), "attn_norm/scale_D", Role.NORM)
    add("post_attention_layernorm.weight", (D,), "mlp_norm/scale_D", Role.NORM)
    return table
