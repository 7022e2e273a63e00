"""The cache of a batch whose rows have lengths of their own."""

from typing import NamedTuple, Self

import jax
import jax.numpy as jnp

from hunyuan_jax.config import ModelConfig
from hunyuan_jax.layers.mixer.kv_cache import CacheDtype
from hunyuan_jax.layers.protocols import CacheEntry
from hunyuan_jax.model.pattern import pattern


class Cache(NamedTuple):
    """What the layers remember of the tokens so far.

    entries: of every layer of a stack's pattern that makes its own keys and values, by its name:
      "layer_0", in the stack of dense layers below the others "dense_layer_0".
    start_B, length_B: int32; row b has its tokens in the slots [start, length).  What the other
      slots hold does not matter.
    table_BN: int32, the pages that hold a row's slots, where rows share a pool of pages
      (layers/mixer/paged.py); starts are 0 then.
    """

    entries: dict[str, CacheEntry]
    start_B: jax.Array
    length_B: jax.Array
    table_BN: jax.Array | None = None

    def rollback(self, length_B: jax.Array) -> Self:
        """Truncates row b to its first length_B[b] tokens (int32, at most its length)."""
        return self._replace(length_B=length_B)


def empty_cache(
    cfg: ModelConfig,
    batch_size: int,
    num_slots: int,
    few_bits: CacheDtype | None = None,
    *,
    of_mtp: bool = False,
) -> Cache:
    """A cache for num_slots tokens a row, in the model's compute dtype; in pages, also in few
    bits.

    Args:
      of_mtp: that of the layer of multi-token prediction, in place of all others.
    """
    entries = {
        f"{prefix_of(name)}layer_{place}": spec.mixer.new_cache(
            stack, batch_size, num_slots, few_bits
        )
        for name, stack in cfg.stacks.items()
        if (name == "mtp_groups") == of_mtp
        for place, spec in enumerate(pattern(stack))
        if spec.shares_kv_with is None
    }
    zeros_B = jnp.zeros((batch_size,), jnp.int32)
    return Cache(entries, zeros_B, zeros_B)


def prefix_of(stack: str) -> str:
    """What the names of a stack's entries begin with."""
    return stack.removesuffix("groups")


def entries_of(entries: dict[str, CacheEntry] | None, stack: str) -> dict[str, CacheEntry] | None:
    """The entries of one stack by the names that it knows: "layer_0", ..."""
    if entries is None:
        return None
    start = f"{prefix_of(stack)}layer_"
    return {
        name.removeprefix(prefix_of(stack)): entry
        for name, entry in entries.items()
        if name.startswith(start)
    }
