"""The modules of the layers that model/layout.py says a model has."""

from typing import NamedTuple

from hunyuan_jax.config import ModelConfig
from hunyuan_jax.layers.ffn import spark_facts, swiglu_facts
from hunyuan_jax.layers.ffn.moe import facts as moe_facts
from hunyuan_jax.layers.ffn.moe.layer import Moe
from hunyuan_jax.layers.ffn.spark import SparkMlp
from hunyuan_jax.layers.ffn.swiglu import Mlp
from hunyuan_jax.layers.mixer import attention_facts, latent_facts
from hunyuan_jax.layers.mixer.attention import Attention
from hunyuan_jax.layers.mixer.latent import LatentAttention
from hunyuan_jax.layers.protocols import FeedForward, Mixer
from hunyuan_jax.model.layout import group_layout

_MIXERS = {attention_facts: Attention, latent_facts: LatentAttention}
_FFNS = {swiglu_facts: Mlp, moe_facts: Moe, spark_facts: SparkMlp}


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
    """The layers of one group of a stack, which has cfg.num_groups of them."""
    return tuple(
        LayerSpec(_MIXERS[layer.mixer], _FFNS[layer.ffn], layer.shares_kv_with)
        for layer in group_layout(cfg)
    )
