"""DOC"""

from ml_collections import ConfigDict

from hunyuan_jax import config, presets


def get_config() -> ConfigDict:
    """The recipe."""
    return config.to_config_dict(
        config.Config(
            model=presets.dense_7b(),
            mesh=config.MeshConfig(data=-1),
            data=config.DataConfig(source="corpus", tokenizer="hy.tiktoken"),
            train=config.TrainConfig(num_steps=100_000, batch_size=512, seq_len=4096, grad_accum_steps=8),
            schedule=config.ScheduleConfig(peak_lr=3e-4, warmup_steps=2000),
        )
    )
