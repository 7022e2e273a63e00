"""15.3 M parameters in float32: the size at which speed is compared with other libraries.

    python -m hunyuan_jax bench --config=configs/bench.py --json

Hardware: any CPU.
Time: under a minute on 2 cores.
Expected: the figures in docs/results/.
"""

from ml_collections import ConfigDict

from hunyuan_jax import config, presets


def get_config() -> ConfigDict:
    """The recipe."""
    return config.to_config_dict(
        config.Config(model=presets.bench(), train=config.TrainConfig(batch_size=8, seq_len=256))
    )
