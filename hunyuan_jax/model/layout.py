"""Which layers a model has: the one place that turns a config into kinds of layers, by their facts
(layers/facts.py).  Imports no jax; model/pattern.py has the modules.
"""

from typing import Any, NamedTuple

from hunyuan_jax.config import ModelConfig
from hunyuan_jax.layers.facts import Activations, Count, Sizes, Tensor
from hunyuan_jax.layers.ffn import spark_facts, swiglu_facts
from hunyuan_jax.layers.ffn.moe import facts as moe_facts
from hunyuan_jax.layers.mixer import attention_facts, latent_facts
from hunyuan_jax.params.roles import Role

# Official name -> ours.
_NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "mlp_norm"}


class LayerFacts(NamedTuple):
    """One layer of the pattern.

    mixer, ffn: facts files, see layers/facts.py.
    shares_kv_with: place in the pattern of the earlier layer whose keys and values it uses; None:
      it makes its own.
    """

    mixer: Any
    ffn: Any
    shares_kv_with: int | None = None

    @property
    def shares(self) -> bool:
        """Whether it uses the keys and values of an earlier layer."""
        return self.shares_kv_with is not None

    def count(self, cfg: ModelConfig, seq_len: int) -> tuple[Count, ...]:
        """Of the mixer and the feed-forward network."""
        mixer = self.mixer.count(cfg, seq_len, shares=self.shares)
        return mixer, self.ffn.count(cfg, seq_len)

    def activation_bytes(self, cfg: ModelConfig, sizes: Sizes) -> tuple[Activations, ...]:
        """Of the mixer and the feed-forward network."""
        mixer = self.mixer.activation_bytes(cfg, sizes, shares=self.shares)
        return mixer, self.ffn.activation_bytes(cfg, sizes)

    def official_names(self, cfg: ModelConfig) -> list[Tensor]:
        """Of the mixer, of the feed-forward network, and of the norms before them."""
        dims = (cfg.hidden_size,)
        return [
            *self.mixer.official_names(cfg, shares=self.shares),
            *self.ffn.official_names(cfg),
            *(
                Tensor(f"{official}.weight", dims, f"{ours}/scale_D", dims, Role.NORM)
                for official, ours in _NORMS.items()
            ),
        ]


def group_layout(cfg: ModelConfig) -> tuple[LayerFacts, ...]:
    """The layers of one group of a stack (`ModelConfig.stacks`), which has cfg.num_groups of them.

    A group is a CLA group: a producer of keys and values and its consumers.
    """
    dense = spark_facts if cfg.spark.neuron_share else swiglu_facts
    ffn = moe_facts if cfg.is_moe else dense
    mixer = latent_facts if cfg.latent.width else attention_facts
    return tuple(
        LayerFacts(mixer, ffn, shares_kv_with=None if place == 0 else 0)
        for place in range(cfg.cla_share_factor)
    )


class Location(NamedTuple):
    """Where a layer of the model is: the stack's name and config, the group in the stack, the
    place in the group; facts: its kind.
    """

    name: str
    stack: ModelConfig
    group: int
    place: int
    facts: LayerFacts

    @property
    def path(self) -> str:
        """Of the layer's parameters."""
        return f"{self.name}/layer_{self.place}"


def locations(cfg: ModelConfig) -> list[Location]:
    """Of every layer from the bottom up; that of multi-token prediction is the last."""
    return [
        Location(name, stack, group, place, facts)
        for name, stack in cfg.stacks.items()
        for group in range(stack.num_groups)
        for place, facts in enumerate(group_layout(stack))
    ]
