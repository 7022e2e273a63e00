"""Small models whose layers are of another kind than the paper's."""

import dataclasses

from hunyuan_jax import presets
from hunyuan_jax.config import LatentConfig, MoeConfig, SparkConfig

_DENSE = dataclasses.replace(
    presets.tiny(),
    vocab_size=64,
    hidden_size=32,
    num_layers=4,
    num_heads=4,
    pad_token_id=-1,
    remat="none",
    moe=MoeConfig(),
)
LATENT = dataclasses.replace(
    _DENSE,
    intermediate_size=48,
    num_kv_heads=4,
    head_dim=8,
    use_qk_norm=False,
    latent=LatentConfig(width=32, rotary_dim=8, group_size=16),
)
SPARK = dataclasses.replace(
    _DENSE,
    intermediate_size=96,
    head_dim=16,
    spark=SparkConfig(neuron_share=0.1, attention_top_k=6),
)
