r"""Hunyuan-0.5B (539 M parameters, dense) from scratch, at sequence length 4096.

    python train.py --config=configs/dense_0_5b.py --workdir=/mnt/shared/dense_0_5b \
        --config.data.source=/mnt/shared/corpus

`hunyuan-0.5b/tokenizer.json` is the released tokenizer.
A batch is 0.26 M tokens, in 8 micro-batches.
No recipe was published: batch, learning rate and length of the run are ours.

Hardware: a number of devices that divides 8, the sequences of a micro-batch.
Time, expected loss: not known.  The parameter count is tested; the train step was never compiled
for a pod and never run; `python -m hunyuan_jax plan` compiles it for one.
"""

from ml_collections import ConfigDict

from hunyuan_jax import config, presets


def get_config() -> ConfigDict:
    """The recipe."""
    return config.to_config_dict(
        config.Config(
            model=presets.dense_0_5b(),
            mesh=config.MeshConfig(data=-1),
            data=config.DataConfig(source="corpus", tokenizer="hunyuan-0.5b/tokenizer.json"),
            train=config.TrainConfig(
                num_steps=100_000, batch_size=64, seq_len=4096, grad_accum_steps=8
            ),
            schedule=config.ScheduleConfig(peak_lr=6e-4, warmup_steps=2000),
        )
    )
