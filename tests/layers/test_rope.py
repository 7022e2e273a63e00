"""RoPE's angles at any position."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hunyuan_jax import presets
from hunyuan_jax.layers import rope


@pytest.mark.parametrize("alpha", [1000.0, 1e5])
def test_angles_are_right_at_256k(alpha):
    cfg = dataclasses.replace(presets.a52b(), rope_alpha=alpha)
    ends = (0, 4096, 2**17, 2**18, 2**20)
    position_T = np.concatenate([np.arange(max(end - 500, 0), end + 500) for end in ends])
    cos, sin = jax.jit(lambda p: rope.cos_sin(p, cfg))(position_T[None].astype(np.int32))
    base = 1e4 * alpha ** (cfg.rope_dim / (cfg.rope_dim - 2))
    exact = position_T[:, None] * base ** -(np.arange(0, cfg.rope_dim, 2) / cfg.rope_dim)
    angle = np.arctan2(np.float64(sin[0]), np.float64(cos[0]))
    error = np.abs((angle - exact + np.pi) % (2 * np.pi) - np.pi)
    assert error.max() <= 2e-4
    # The float32 product, as the official code has it, is not.
    product = jnp.float32(2**18 - 1) * rope.inverse_frequencies(cfg)
    exact = (2**18 - 1) * base ** -(np.arange(0, cfg.rope_dim, 2) / cfg.rope_dim)
    assert np.abs(np.float64(product) - exact).max() > 1e-3


def test_angles_of_short_texts_are_the_products():
    cfg = presets.a52b()
    position_T = jnp.arange(1024)
    product = position_T.astype(jnp.float32)[:, None] * rope.inverse_frequencies(cfg)
    cos, sin = rope.cos_sin(position_T[None], cfg)
    np.testing.assert_array_equal(cos[0], jnp.cos(product))
    np.testing.assert_array_equal(sin[0], jnp.sin(product))
