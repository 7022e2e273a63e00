"""What a layer is made of: a mixer over the tokens of a row and a feed-forward network per token.

A new kind of either is one module with the methods below, its facts beside it (layers/facts.py),
and a line each in `model/layout.py` and `model/pattern.py`.
Letters: B batch, T new tokens, S slots of the cache, D model, P groups (repetitions of the
pattern of layers), h = H / 2.
"""

from typing import Any, ClassVar, NamedTuple, Protocol, Self

import jax
from jax.sharding import Mesh

from hunyuan_jax.config import ModelConfig


class Sequence(NamedTuple):
    """What every layer knows about the new tokens of a call.

    cos_sin_BTh: RoPE tables, float32.
    segment_BT: int32 document of each token; tokens see their own document only, 0 is padding.
    start_B, length_B: int32; the tokens continue the slots [start, length) of their row's cache.
      None if they continue nothing: training, and the prompt that fills a cache.
    table_BN: int32; the pages that hold a row's slots, from slot 0 on.  None if the cache is
      contiguous.
    """

    cos_sin_BTh: tuple[jax.Array, jax.Array]
    segment_BT: jax.Array
    start_B: jax.Array | None = None
    length_B: jax.Array | None = None
    table_BN: jax.Array | None = None


class CacheEntry(Protocol):
    """The cache of one place in the pattern: of the layers there of all P groups.  A pytree that
    owns its layout: [P, B, S, ...], B rows of S slots or, where the sequence has a table, pages.
    """

    def append(self, group: Any, new: Any, sequence: Sequence, mesh: Mesh) -> Self:
        """The entry with the mixer's `new` in T slots of a group, behind each row's tokens.

        Rows must have room for them.  Without a length the tokens go into the first slots.
        """
        ...

    def view(self, group: Any) -> Any:
        """What a mixer reads of a group, in the layout that mixers expect."""
        ...

    def pinned(self, mesh: Mesh) -> Self:
        """The same entry, laid out over the mesh as every call expects it."""
        ...


class LayerCache(NamedTuple):
    """A layer's part of the cache.

    entry: None if nothing is kept (training).
    group: index of the group the layer is in: a traced int32, or an int where groups are unrolled.
    seen: what the new tokens attend to, set by the layer that makes it and read by the layers that
      share it.
    """

    entry: Any
    group: Any
    seen: Any = None


class Mixer(Protocol):
    """Mixes the tokens of a row.  Constructed as `Mixer(cfg, mesh, key, shares=...)`, where
    `shares` says whether it uses what an earlier layer of its group has put into `LayerCache`.

    attribute: the name under which a layer holds it, part of its parameters' paths.
    """

    attribute: ClassVar[str]

    @staticmethod
    def new_cache(
        cfg: ModelConfig, batch_size: int, num_slots: int, few_bits: str | None = None
    ) -> CacheEntry | None:
        """An empty entry for P = cfg.num_groups layers; None if the mixer keeps nothing.

        few_bits: "int8" or "fp8", for entries in pages; None is the compute dtype.
        """
        ...

    def __call__(
        self, y_BTD: jax.Array, sequence: Sequence, cache: LayerCache, key: jax.Array | None
    ) -> tuple[jax.Array, LayerCache]:
        """(output [B, T, D], the cache with the new tokens).

        Args:
          y_BTD: normalised activations.
          key: typed key for dropout; None: no dropout.
        """
        ...


class FeedForward(Protocol):
    """Transforms each token.  Constructed as `FeedForward(cfg, mesh, key)`.

    attribute: the name under which a layer holds it, part of its parameters' paths.
    """

    attribute: ClassVar[str]

    def __call__(
        self, y_BTD: jax.Array, is_valid_BT: jax.Array, key: jax.Array | None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """(output [B, T, D], figures to log, empty if there are none).

        Args:
          y_BTD: normalised activations.
          is_valid_BT: false for padding.
          key: typed key of this (seed, step, layer); None outside training.
        """
        ...

    @staticmethod
    def metrics(figures: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """What a run logs, from the figures [P, f, ...] of all layers.

        An array "layers/NAME_L" is logged as its mean, layers/NAME, and as layers/NAME_by_layer.
        """
        ...
