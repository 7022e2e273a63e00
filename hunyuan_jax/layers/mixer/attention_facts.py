"""Facts of `attention.Attention`, see layers/facts.py.

Letters: D model, N query heads, K kv heads, H head dim.
"""

from hunyuan_jax.config import ModelConfig
from hunyuan_jax.layers.facts import (
    DTYPE_BYTES,
    Activations,
    Count,
    Sizes,
    Tensor,
    linear_tensor,
)
from hunyuan_jax.params.roles import Role


def count(cfg: ModelConfig, seq_len: int, *, shares: bool) -> Count:
    """A query meets (seq_len + 1) / 2 keys on average (causal, one document), and a key costs
    4 * N * H in the forward pass (scores, then values), three times that in all.
    """
    D, q_width = cfg.hidden_size, cfg.num_heads * cfg.head_dim
    kv_width = 0 if shares else cfg.num_kv_heads * cfg.head_dim
    projections = 2 * D * (q_width + kv_width)
    biases = q_width + D + 2 * kv_width if cfg.attention_bias else 0
    return Count(
        {
            "attention": projections + biases,
            "norms": 2 * cfg.head_dim if cfg.use_qk_norm else 0,
        },
        matmul_weights=projections,
        flops_per_token=6 * q_width * (seq_len + 1),
        cache_bytes_per_token=2 * kv_width * DTYPE_BYTES[cfg.dtype],
    )


def activation_bytes(cfg: ModelConfig, sizes: Sizes, *, shares: bool) -> Activations:
    """Queries, attended values, keys and values, and the output projection's result."""
    kv_heads = 0 if shares else cfg.num_kv_heads
    heads = 2 * (cfg.num_heads + kv_heads) * cfg.head_dim / sizes.tensor_ways
    return Activations(
        products=sizes.tokens * (heads + cfg.hidden_size) * sizes.element,
        weights=heads * cfg.hidden_size,
    )


def official_names(cfg: ModelConfig, *, shares: bool) -> list[Tensor]:
    """In the order the official module declares them; a layer that shares has no key and value
    projection.
    """
    D, N, K, H = cfg.hidden_size, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
    # letter -> (output, input, path and shape of our weight, of our bias)
    projections = {"q": (N * H, D, "wq_DNH", (D, N, H), "bq_NH", (N, H))}
    if not shares:
        projections["k"] = (K * H, D, "wk_DKH", (D, K, H), "bk_KH", (K, H))
        projections["v"] = (K * H, D, "wv_DKH", (D, K, H), "bv_KH", (K, H))
    projections["o"] = (D, N * H, "wo_NHD", (N, H, D), "bo_D", (D,))
    table = []
    for letter, (num_out, num_in, weight, shape, bias, bias_shape) in projections.items():
        name = f"self_attn.{letter}_proj"
        table.append(linear_tensor(name, num_out, num_in, f"attn/{weight}", our_shape=shape))
        if cfg.attention_bias:
            table.append(Tensor(f"{name}.bias", (num_out,), f"attn/{bias}", bias_shape, Role.BIAS))
    if cfg.use_qk_norm:
        # Hy3's class, which normalises first, has its own names.
        names = ("q_norm", "k_norm")
        if not cfg.norm_before_rope:
            names = ("query_layernorm", "key_layernorm")
        for name, path in zip(names, ("q_norm_H", "k_norm_H"), strict=True):
            table.append(Tensor(f"self_attn.{name}.weight", (H,), f"attn/{path}", (H,), Role.NORM))
    return table
