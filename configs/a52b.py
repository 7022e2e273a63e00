r"""Hunyuan-Large (389 B parameters, 52 B active) at sequence length 4096, on 64 to 4096 TPU chips.

On a TPU VM pod slice, from your workstation:

    gcloud compute tpus tpu-vm ssh $TPU --zone=$ZONE --worker=all --command="\
        cd hunyuan_jax && pip install -q -e '.[tpu]' && \
        python train.py --config=configs/a52b.py --workdir=/mnt/shared/a52b \
        --config.data.source=/mnt/shared/corpus"

On GKE, with XPK, from a container image that holds this repository and its packages:

    xpk workload create --cluster=$CLUSTER --workload=a52b --tpu-type=v5p-512 --num-slices=1 \
        --docker-image=$IMAGE --command="\
        python train.py --config=configs/a52b.py --workdir=/mnt/shared/a52b \
        --config.data.source=/mnt/shared/corpus"

Every host runs the same command, and the hosts find each other.  /mnt/shared is a filesystem that
all of them see.  Before paying for a slice, see what the compiler says, on any machine:

    python -m hunyuan_jax plan --config=configs/a52b.py --topology=v5p:4x8x8

A batch is 1024 sequences (4.2 M tokens).  `grad_accum_steps` is its number of micro-batches; a
chip should hold one or two sequences at a time:

    64 chips, v5p 4x4x4      --config.optimizer.state_dtype=bfloat16
                             --config.train.grad_accum_steps=16
    256 chips, v5p 4x8x8     nothing
    512 chips, v5p 8x8x8     --config.train.grad_accum_steps=2
    1024 to 4096 chips       --config.mesh.replica=CHIPS/512 --config.mesh.data=32
                             --config.train.batch_size=CHIPS --config.train.grad_accum_steps=1
    two slices of 256        --config.mesh.num_slices=2 --config.mesh.replica=2
                             --config.train.grad_accum_steps=2

Hardware: 64 to 4096 TPU chips of the v5p class.
Time, estimated from the TPU compiler's schedule (docs/results/plan.md has commands and memory): a
micro-batch of 1.05 M tokens takes 4.30 s on v5p 4x8x8.  That is 21.1 billion tokens a day, and
2.04 million chip-hours for the paper's 7 trillion tokens.  On v6e 16x16 it takes 3.03 s: 29.9
billion tokens a day, 1.44 million chip-hours.  On tpu7x 4x4x4 0.52 M tokens take 2.43 s: 18.6
billion tokens a day, 0.58 million chip-hours.
Expected loss: not known.  Compiled for TPU, never run.

The weight of the balance loss is ours, the paper gives none.  In small runs without one, 60 % of
the tokens were recycled and two fifths of the experts died (docs/results/routing.md).
"""

import dataclasses

from ml_collections import ConfigDict

from hunyuan_jax import config, presets


def get_config() -> ConfigDict:
    """The recipe."""
    model = presets.a52b()
    moe = dataclasses.replace(model.moe, aux_loss_weight=0.01)
    return config.to_config_dict(
        config.Config(
            model=dataclasses.replace(model, moe=moe),
            mesh=config.MeshConfig(data=-1, expert=16),
            data=config.DataConfig(source="corpus", tokenizer="hy.tiktoken"),
            train=config.TrainConfig(
                num_steps=100_000, batch_size=1024, seq_len=4096, grad_accum_steps=4
            ),
            schedule=config.ScheduleConfig(peak_lr=3e-4, warmup_steps=2000),
        )
    )
