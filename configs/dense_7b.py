r"""Hunyuan-7B (7.50 B parameters, dense) from scratch, at sequence length 4096.

    python train.py --config=configs/dense_7b.py --workdir=/mnt/shared/dense_7b \
        --config.data.source=/mnt/shared/corpus

`hy.tiktoken` is the released tokenizer.
A batch is 2.1 M tokens, in 8 micro-batches.
No recipe was published: batch, learning rate and length of the run are ours.

Hardware: a number of devices that divides 64, the sequences of a micro-batch.
Time, expected loss: not known.  The parameter count is tested; the train step was never compiled
for a pod and never run; `python -m hunyuan_jax plan` compiles it for one.
"""

from ml_collections import ConfigDict

from hunyuan_jax import config, presets


def get_config() -> ConfigDict:
    """The recipe."""
    return config.to_config_dict(
        config.Config(
            model=presets.dense_7b(),
            mesh=config.MeshConfig(data=-1),
            data=config.DataConfig(source="corpus", tokenizer="hy.tiktoken"),
            train=config.TrainConfig(
                num_steps=100_000, batch_size=512, seq_len=4096, grad_accum_steps=8
            ),
            schedule=config.ScheduleConfig(peak_lr=3e-4, warmup_steps=2000),
        )
    )
