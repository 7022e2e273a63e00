"""How a parameter is declared: shape, initialiser and the logical name of each dim (mapped to mesh axes by parallel/rules.py)."""

import jax
import jax.numpy as jnp
from flax import nnx


def normal(key: jax.Array, shape: tuple[int, ...], logical: tuple[str, ...], std: float) -> nnx.Param:
    """A float32 matrix drawn from N(0, std), as the official initialisation does for Linear and Embedding."""
    assert len(shape) == len(logical), (shape, logical)
    return nnx.Param(jax.random.normal(key, shape, jnp.float32) * std, logical=logical)


def ones(shape: tuple[int, ...], logical: tuple[str, ...]) -> nnx.Param:
    """A float32 norm scale."""
    assert len(shape) == len(logical), (shape, logical)
    return nnx.Param(jnp.ones(shape, jnp.float32), logical=logical)


def zeros(shape: tuple[int, ...], logical: tuple[str, ...]) -> nnx.Param:
    """A float32 bias."""
    assert len(shape) == len(logical), (shape, logical)
    return nnx.Param(jnp.zeros(shape, jnp.float32), logical=logical)
