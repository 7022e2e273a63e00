"""RMS normalisation, in the order of the official code (docs/model.md, Forward pass)."""

import jax
import jax.numpy as jnp
from flax import nnx

from hunyuan_jax.params import declare as params


def rms_normalize(x: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) over the last dim, statistics in float32, result in x's dtype; no scale."""
    x32 = x.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)).astype(x.dtype)


class RmsNorm(nnx.Module):
    """Scaled RMS norm over D: the cast back to x's dtype comes before the multiplication by the
    scale.
    """

    def __init__(self, dim: int, eps: float):
        self.scale_D = params.param((dim,), ("norm",), params.ones, params.Role.NORM)
        self.eps = eps

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """[B, T, D] in x's dtype."""
        return rms_normalize(x_BTD, self.eps) * self.scale_D[...].astype(x_BTD.dtype)
