r"""Hy3 (295 B parameters, 21 B active) at sequence length 8192, on TPU pods.

    python train.py --config=configs/hy3.py --workdir=/mnt/shared/hy3 \
        --config.data.source=/mnt/shared/corpus --config.data.tokenizer=/models/Hy3

The experts are balanced without a loss: their selection biases move by 1e-3 a step against the
load.  The layer of multi-token prediction is trained too, with a tenth of the loss.  A batch is
16.8 M tokens.  No recipe was published: batch, learning rate and length of the run are ours.

To continue from the released weights on your own text, with the biases and the layer of
multi-token prediction as they are:

    python train.py --config=configs/hy3.py --workdir=/mnt/shared/tuned \
        --config.train.init_from=/models/Hy3 --config.data.tokenizer=/models/Hy3 \
        --config.data.source=/mnt/shared/text --config.model.moe.bias_rate=0 \
        --config.model.mtp_loss_weight=0 --config.schedule.peak_lr=1e-5

With adapters only, add --config.model.lora.rank=8.  Hy-MT2-30B-A3B is `presets.hy_mt2_30b()`.

Hardware: 256 TPU chips of the v5p class; experts are split 4 ways.
Time and memory: docs/results/plan.md has the TPU compiler's estimates with their command.
Expected loss: not known.  Compiled for TPU, never run.
"""

import dataclasses

from ml_collections import ConfigDict

from hunyuan_jax import config, presets


def get_config() -> ConfigDict:
    """The recipe."""
    model = presets.hy3()
    # 352 slots an expert and sequence instead of 342: whole tiles of a TPU.
    moe = dataclasses.replace(model.moe, dispatch="drop", capacity_factor=1.03125, bias_rate=1e-3)
    return config.to_config_dict(
        config.Config(
            model=dataclasses.replace(model, moe=moe, mtp_loss_weight=0.1),
            mesh=config.MeshConfig(data=-1, expert=4),
            data=config.DataConfig(source="corpus", tokenizer="tokenizer.json"),
            train=config.TrainConfig(
                num_steps=100_000, batch_size=2048, seq_len=8192, grad_accum_steps=4
            ),
            schedule=config.ScheduleConfig(peak_lr=2e-4, warmup_steps=2000),
        )
    )
