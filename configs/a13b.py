r"""Hunyuan-A13B (80.4 B parameters, 12.7 B active) from scratch, at sequence length 4096.

    python train.py --config=configs/a13b.py --workdir=/mnt/shared/a13b \
        --config.data.source=/mnt/shared/corpus

The model has 64 experts, top-8 routing and one shared expert.  `hy.tiktoken` is the released
tokenizer.  A batch is 4.2 M tokens.  No recipe was published: batch, learning rate and length of
the run are ours.

Hardware: a multiple of 16 devices, since experts are split 16 ways.
Time, expected loss: not known.  The train step was traced at full size, but never compiled for a
pod and never run; `python -m hunyuan_jax plan` compiles it for one.
"""

from ml_collections import ConfigDict

from hunyuan_jax import config, presets


def get_config() -> ConfigDict:
    """The recipe."""
    return config.to_config_dict(
        config.Config(
            model=presets.a13b(),
            mesh=config.MeshConfig(data=-1, expert=16),
            data=config.DataConfig(source="corpus", tokenizer="hy.tiktoken"),
            train=config.TrainConfig(
                num_steps=100_000, batch_size=1024, seq_len=4096, grad_accum_steps=8
            ),
            schedule=config.ScheduleConfig(peak_lr=3e-4, warmup_steps=2000),
        )
    )
