"""A 4.7 M parameter Hunyuan-Large on the source files of Python's standard library, as bytes.

    python train.py --config=configs/tiny.py --workdir=runs/tiny
    python -m hunyuan_jax generate --checkpoint=runs/tiny --prompt="def "

Needs no download.

Hardware: any CPU.
Time: 4 to 6 minutes on 2 cores, with 1.2 GB of memory.
Expected: the training loss falls from 5.8 to about 1.3 nats a byte (docs/results/).
"""

from ml_collections import ConfigDict

from hunyuan_jax import config, presets


def get_config() -> ConfigDict:
    """The recipe."""
    return config.to_config_dict(
        config.Config(
            model=presets.tiny(),
            schedule=config.ScheduleConfig(peak_lr=4e-3, warmup_steps=40, decay_ratio=0.4),
            train=config.TrainConfig(
                num_steps=730,
                batch_size=8,
                seq_len=256,
                log_every=10,
                eval_every=200,
                eval_batches=16,
            ),
            checkpoint=config.CheckpointConfig(every=400, keep=2),
        )
    )
