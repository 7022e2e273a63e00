"""Facts of `latent.LatentAttention`, see layers/facts.py.

Letters: D model, N heads, H head dim, L latent entries, R rotary entries, g latent entries with a
common scale.
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
    """A query meets (seq_len + 1) / 2 keys on average, and a key costs 2 * N * (2 H + R) in the
    forward pass (scores, then values), three times that in all.

    The cache of a producer keeps L / 2 bytes of 4-bit codes, bfloat16 scales and the rotary key.
    """
    N, H, latent = cfg.num_heads, cfg.head_dim, cfg.latent
    L, R = latent.width, latent.rotary_dim
    weights = _layer_weights(cfg) + (0 if shares else cfg.hidden_size * (L + R))
    cache_bytes = L // 2 + 2 * (L // latent.group_size) + R * DTYPE_BYTES[cfg.dtype]
    return Count(
        {"attention": weights, "norms": 0 if shares else L},
        matmul_weights=weights,
        flops_per_token=3 * N * (2 * H + R) * (seq_len + 1),
        cache_bytes_per_token=0 if shares else cache_bytes,
    )


def activation_bytes(cfg: ModelConfig, sizes: Sizes, *, shares: bool) -> Activations:
    """Queries, up-projected keys and values of every head, attended values, and the output."""
    N, H, latent = cfg.num_heads / sizes.tensor_ways, cfg.head_dim, cfg.latent
    heads = N * (3 * (H + latent.rotary_dim) + H)
    latents = 0 if shares else latent.width + latent.rotary_dim
    return Activations(
        products=sizes.tokens * (heads + latents + cfg.hidden_size) * sizes.element,
        weights=_layer_weights(cfg) / sizes.tensor_ways + latents * cfg.hidden_size,
    )


def official_names(cfg: ModelConfig, *, shares: bool) -> list[Tensor]:
    """Names of this project's own folders; there is no official release of such a model."""
    D, N, H, latent = cfg.hidden_size, cfg.num_heads, cfg.head_dim, cfg.latent
    L, R = latent.width, latent.rotary_dim

    def linear(name, num_out, num_in, path, our_shape):
        name, path = f"self_attn.{name}", f"latent/{path}"
        return linear_tensor(name, num_out, num_in, path, our_shape=our_shape)

    table = [linear("q_proj", N * (H + R), D, "wq_DNZ", (D, N, H + R))]
    if not shares:
        norm = ("self_attn.latent_layernorm.weight", (L,), "latent/latent_norm_L", (L,))
        table += [
            linear("latent_proj", L, D, "w_latent_DL", (D, L)),
            linear("rotary_proj", R, D, "w_rotary_DR", (D, R)),
            Tensor(*norm, Role.NORM),
        ]
    return [
        *table,
        linear("key_up_proj", N * H, L, "w_key_LNH", (L, N, H)),
        linear("value_up_proj", N * H, L, "w_value_LNH", (L, N, H)),
        linear("o_proj", D, N * H, "wo_NHD", (N, H, D)),
    ]


def _layer_weights(cfg: ModelConfig) -> int:
    """Weights that every layer has: queries, both up-projections, and the output."""
    N, H, L, R = cfg.num_heads, cfg.head_dim, cfg.latent.width, cfg.latent.rotary_dim
    return N * (cfg.hidden_size * (2 * H + R) + 2 * L * H)
