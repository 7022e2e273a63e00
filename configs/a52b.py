"""Hunyuan-Large (389 B parameters, 52 B active) at sequence length 4096.

    python -m hunyuan_jax count --config=configs/a52b.py

State: its shapes are traced in the tests; it has not been compiled for a pod yet, and never run.
"""

from ml_collections import ConfigDict

from hunyuan_jax import config, presets


def get_config() -> ConfigDict:
    """The recipe."""
    return config.to_config_dict(
        config.Config(
            model=presets.a52b(),
            mesh=config.MeshConfig(data=-1, expert=16),
            data=config.DataConfig(source="corpus", tokenizer="hy.tiktoken"),
            train=config.TrainConfig(num_steps=100_000, batch_size=1024, seq_len=4096),
            schedule=config.ScheduleConfig(peak_lr=3e-4, warmup_steps=2000),
        )
    )
