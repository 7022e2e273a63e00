"""The KV cache: one entry per CLA group (specification section 6; the official code stores one per
layer).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from hunyuan_jax.config import ModelConfig


class KvCache(NamedTuple):
    """Keys and values of the slots filled so far; slots are filled in order, the same ones for
    every row of the batch.

    k_PBSKH, v_PBSKH: keys rotated and normalised without scale, and values, of each CLA group;
      where the groups' parameters lie apart, tuples of P arrays, the keys as [B, K, H, S].
    segment_BS: int32, 1 where a slot holds a token, 0 where it is padding or empty.
    num_filled: int32 scalar.
    """

    k_PBSKH: jax.Array
    v_PBSKH: jax.Array
    segment_BS: jax.Array
    num_filled: jax.Array


def empty_cache(cfg: ModelConfig, batch_size: int, num_slots: int) -> KvCache:
    """A cache in the model's compute dtype for num_slots tokens a row."""
    shape = (cfg.num_groups, batch_size, num_slots, cfg.num_kv_heads, cfg.head_dim)
    return KvCache(
        jnp.zeros(shape, cfg.dtype),
        jnp.zeros(shape, cfg.dtype),
        jnp.zeros((batch_size, num_slots), jnp.int32),
        jnp.zeros((), jnp.int32),
    )


def grow_cache(cache: KvCache, num_slots: int) -> KvCache:
    """The same cache with room for num_slots tokens a row.

    A prompt is run with a cache of its own length, so that it does not attend to slots that only
    later tokens will fill.
    """
    num_new = num_slots - cache.segment_BS.shape[1]
    k_PBSKH, v_PBSKH = (
        jnp.pad(x, ((0, 0), (0, 0), (0, num_new), (0, 0), (0, 0)))
        for x in (cache.k_PBSKH, cache.v_PBSKH)
    )
    return KvCache(
        k_PBSKH, v_PBSKH, jnp.pad(cache.segment_BS, ((0, 0), (0, num_new))), cache.num_filled
    )


def split_cache(cache: KvCache) -> KvCache:
    """The same cache with arrays for each CLA group, keys as [B, K, H, S].

    XLA:CPU multiplies heads in that order, and would transpose all keys for every token.  Values
    it masks first, and transposes on the way; as [B, K, S, H] it would fuse the mask with the
    write of new rows, and write to a copy.
    """
    return cache._replace(
        k_PBSKH=tuple(cache.k_PBSKH.transpose(0, 1, 3, 4, 2)), v_PBSKH=tuple(cache.v_PBSKH)
    )
