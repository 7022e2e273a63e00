"""Rotary position embedding: half-split rotation and the official frequency variants
(docs/model.md, RoPE).
"""

import jax
import jax.numpy as jnp

from hunyuan_jax.config import ModelConfig


def inverse_frequencies(cfg: ModelConfig) -> jax.Array:
    """Inverse frequencies, float32 [rope_dim / 2].

    alpha: base = theta * alpha^(d / (d - 2)), whatever the length.  default: theta^(-2i/d), as in
    transformers.  plain and linear: the same rounded to bfloat16, which is what Hunyuan-Large's
    class stores (an error of up to 0.37 %).
    """
    exponent = jnp.arange(0, cfg.rope_dim, 2, dtype=jnp.float32) / cfg.rope_dim
    if cfg.rope_type == "alpha":
        return (
            1.0
            / (cfg.rope_theta * cfg.rope_alpha ** (cfg.rope_dim / (cfg.rope_dim - 2))) ** exponent
        )
    inverse_h = 1.0 / cfg.rope_theta**exponent
    return inverse_h if cfg.rope_type == "default" else _round_to_bfloat16(inverse_h)


def cos_sin(positions_BT: jax.Array, cfg: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """cos and sin of every angle, float32 [B, T, rope_dim / 2]."""
    positions = positions_BT.astype(jnp.float32)
    angles_BTh = positions[..., None] * inverse_frequencies(cfg)
    if cfg.rope_type != "linear":
        return jnp.cos(angles_BTh), jnp.sin(angles_BTh)
    # The official linear variant does all of its arithmetic in bfloat16: 512 positions give only
    # 385 distinct values.
    scaled = _round_to_bfloat16(_round_to_bfloat16(positions) / cfg.rope_factor)
    angles_BTh = _round_to_bfloat16(scaled[..., None] * inverse_frequencies(cfg))
    return _round_to_bfloat16(jnp.cos(angles_BTh)), _round_to_bfloat16(jnp.sin(angles_BTh))


def rotate(x_BTNH: jax.Array, cos_sin_BTh: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates every 2 h entries of H, their first half against their second, in float32.

    The result has x's dtype.
    """
    cos, sin = (x_BTh[:, :, None, :] for x_BTh in cos_sin_BTh)
    x = x_BTNH.reshape(*x_BTNH.shape[:2], -1, 2 * cos.shape[-1]).astype(jnp.float32)
    first, second = jnp.split(x, 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.reshape(x_BTNH.shape).astype(x_BTNH.dtype)


def _round_to_bfloat16(x: jax.Array) -> jax.Array:
    # A pair of casts may be folded away by XLA (excess precision is allowed); reduce_precision may
    # not.
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
