"""Which attention weights are dropped: a hash of (seed of the head, query, key), so that every
kernel and its backward pass agree.

Plain integer operations on uint32 that broadcast: they mean the same in XLA, inside a TPU kernel
and inside a Triton kernel.
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
    """A bijection of uint32 in which every input bit flips every output bit about half of the
    time.
    """
    for shift, factor in _ROUNDS:
        x = (x ^ (x >> _u32(shift))) * _u32(factor)
    return x ^ (x >> _u32(16))


def head_seeds(seed: jax.Array, batch: int, heads: int) -> jax.Array:
    """uint32 [B, N], one seed per sequence and head, from a seed of shape [], [2] or already [B,
    N].
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
    """bool, False with probability `rate` (to 2^-24).

    Args:
      head_seed: uint32, one of `head_seeds`.
      query, key: int32 slots in 0..T-1 and 0..S-1; all three broadcast.  The first mix is per
        query, only the second per element.
    """
    row = mix(head_seed ^ (query.astype(jnp.uint32) * _u32(_SPREAD_QUERY)))
    bits = mix(row ^ (key.astype(jnp.uint32) * _u32(_SPREAD_KEY)))
    # 24 bits as int32: neither TPU nor Triton compares unsigned numbers as cheaply.
    return (bits >> _u32(8)).astype(jnp.int32) >= np.int32(round(rate * 2**24))
