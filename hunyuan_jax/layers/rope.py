"""Rotary position embedding: half-split rotation and the official frequency variants
(docs/model.md, RoPE).
"""

import jax
import jax.numpy as jnp
import numpy as np

from hunyuan_jax.config import ModelConfig

# Positions at a time whose angles are float32 products: those are right to 3e-5 rad.
_SPAN = 1024


def inverse_frequencies(cfg: ModelConfig) -> jax.Array:
    """Inverse frequencies, float32 [rope_dim / 2].

    alpha: base = theta * alpha^(d / (d - 2)), whatever the length.  default: theta^(-2i/d), as in
    transformers.  plain and linear: the same rounded to bfloat16, which is what Hunyuan-Large's
    class stores (an error of up to 0.37 %).
    """
    exponent = jnp.arange(0, cfg.rope_dim, 2, dtype=jnp.float32) / cfg.rope_dim
    inverse_h = 1.0 / _base(cfg) ** exponent
    return inverse_h if cfg.rope_type in ("alpha", "default") else _round_to_bfloat16(inverse_h)


def cos_sin(positions_BT: jax.Array, cfg: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """cos and sin of every angle, float32 [B, T, rope_dim / 2]."""
    if cfg.rope_type in ("alpha", "default"):
        angles_BTh = _angles(positions_BT, cfg)
        return jnp.cos(angles_BTh), jnp.sin(angles_BTh)
    positions = positions_BT.astype(jnp.float32)
    if cfg.rope_type == "plain":
        angles_BTh = positions[..., None] * inverse_frequencies(cfg)
        return jnp.cos(angles_BTh), jnp.sin(angles_BTh)
    # The official linear variant does all of its arithmetic in bfloat16: 512 positions give only
    # 385 distinct values.
    scaled = _round_to_bfloat16(_round_to_bfloat16(positions) / cfg.rope_factor)
    angles_BTh = _round_to_bfloat16(scaled[..., None] * inverse_frequencies(cfg))
    return _round_to_bfloat16(jnp.cos(angles_BTh)), _round_to_bfloat16(jnp.sin(angles_BTh))


def _angles(positions_BT: jax.Array, cfg: ModelConfig) -> jax.Array:
    """Angles of any position up to 2^30, float32; whole turns may be missing.

    A float32 product is off by up to 0.008 rad at position 262143, and the power behind its factor
    by more.  So the angle of the multiple of 1024 below a position is computed in integers: turns
    in units of 2^-32, of which the whole ones overflow.  Below 1024 the angle is the product.
    """
    exponent_h = np.arange(0, cfg.rope_dim, 2, dtype=np.float64) / cfg.rope_dim
    turns_h = _base(cfg) ** -exponent_h * _SPAN / (2 * np.pi)  # of _SPAN positions
    units_h = np.round(turns_h % 1 * 2.0**32).astype(np.uint64).astype(np.uint32)
    span_BT, rest_BT = jnp.divmod(positions_BT, _SPAN)
    units_BTh = span_BT.astype(jnp.uint32)[..., None] * units_h
    # As int32 it is the nearest whole turn's remainder, from -1/2 to 1/2 turn.
    remainder_BTh = jax.lax.bitcast_convert_type(units_BTh, jnp.int32).astype(jnp.float32)
    angle_BTh = remainder_BTh * np.float32(2 * np.pi / 2.0**32)
    return angle_BTh + rest_BT.astype(jnp.float32)[..., None] * inverse_frequencies(cfg)


def _base(cfg: ModelConfig) -> float:
    if cfg.rope_type != "alpha":
        return cfg.rope_theta
    return cfg.rope_theta * cfg.rope_alpha ** (cfg.rope_dim / (cfg.rope_dim - 2))


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
