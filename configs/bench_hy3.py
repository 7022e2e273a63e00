"""21.1 M parameters of Hy3's kind in float32, for the comparison with transformers' class.

    python -m hunyuan_jax bench --config=configs/bench_hy3.py --json

Hardware: any CPU.
Time: under a minute on 2 cores.
Expected: the figures in docs/family.md.
"""

from ml_collections import ConfigDict

from hunyuan_jax import config, presets


def get_config() -> ConfigDict:
    """The recipe."""
    train = config.TrainConfig(batch_size=8, seq_len=256)
    return config.to_config_dict(config.Config(model=presets.bench_hy3(), train=train))
