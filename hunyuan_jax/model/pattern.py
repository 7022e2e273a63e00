"""Which layers a model has: the one place that turns a config into kinds of layers."""

from typing import NamedTuple

from hunyuan_jax.config import ModelConfig
from hunyuan_jax.layers.ffn.moe.layer import Moe
from hunyuan_jax.layers.ffn.swiglu import Mlp
from hunyuan_jax.layers.mixer.attention import Attention
from hunyuan_jax.layers.protocols import FeedForward, Mixer


class LayerSpec(NamedTuple):
    """A layer of the pattern.

    mixer, ffn: classes, see `layers/protocols.py`.
    shares_kv_with: place in the pattern of the earlier layer whose keys and values it uses; None:
      it makes its own.
    """

    mixer: type[Mixer]
    ffn: type[FeedForward]
    shares_kv_with: int | None = None


def pattern(cfg: ModelConfig) -> tuple[LayerSpec, ...]:
    """The layers of one group; the model repeats them cfg.num_groups times.

    A group is a CLA group: a producer of keys and values and its consumers.
    """
    ffn = Moe if cfg.is_moe else Mlp
    return tuple(
        LayerSpec(Attention, ffn, shares_kv_with=None if place == 0 else 0)
        for place in range(cfg.cla_share_factor)
    )
