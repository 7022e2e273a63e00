"""Dropout of attention weights by a hash of (head's seed, query, key).

The hash is plain uint32 arithmetic, so XLA, TPU kernels, Triton kernels and their backward passes
drop the same weights.
"""

import jax
import jax.numpy as jnp
import numpy as np

# The finalizer "lowbias32" of Chris Wellons' hash prospector, and two odd constants (golden ratio,
# sqrt(3) in fixed point) that spread consecutive positions.
_ROUNDS = ((16, 0x7FEB352D), (15, 0x846CA68B))
_SPREAD_QUERY, _SPREAD_KEY = 0x9E3779B9, 0xBB67AE85


def _u32(value: int) -> np.uint32:
    return np.uint32(value)


def mix(x: jax.Array) -> jax.Array:
    """Hashes uint32, bijectively; an input bit flips each output bit about half of the time."""
    for shift, factor in _ROUNDS:
        x = (x ^ (x >> _u32(shift))) * _u32(factor)
    return x ^ (x >> _u32(16))


def head_seeds(seed: jax.Array, batch: int, heads: int) -> jax.Array:
    """Returns uint32 [B, N], one seed per sequence and head.

    seed: int32 or uint32 of shape [] or [2]; [B, N] is returned as uint32.
    """
    words = jnp.asarray(seed).astype(jnp.uint32)
    if words.ndim == 2:
        return words
    words = words.reshape(-1)
    index_BN = (
        jnp.arange(batch, dtype=jnp.uint32)[:, None] * _u32(heads)
        + jnp.arange(heads, dtype=jnp.uint32)[None, :]
    )
    seed_BN = mix(index_BN * _u32(_SPREAD_QUERY))
    for i in range(words.shape[0]):
        seed_BN = mix(seed_BN ^ words[i])
    return seed_BN


def is_kept(head_seed: jax.Array, query: jax.Array, key: jax.Array, rate: float) -> jax.Array:
    """Returns bool, False with probability `rate` (to 2^-24); the arrays broadcast.

    Args:
      head_seed: uint32, one of `head_seeds`.
      query, key: int32 indices in 0..T-1 and 0..S-1.  One mix runs per query, one per element.
    """
    row = mix(head_seed ^ (query.astype(jnp.uint32) * _u32(_SPREAD_QUERY)))
    bits = mix(row ^ (key.astype(jnp.uint32) * _u32(_SPREAD_KEY)))
    # 24 bits as int32: neither TPU nor Triton compares unsigned numbers as cheaply.
    return (bits >> _u32(8)).astype(jnp.int32) >= np.int32(round(rate * 2**24))
