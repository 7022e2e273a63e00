r"""Hunyuan-Large's first long-context stage: 32K tokens a sequence, about 10 B tokens.

It starts from the weights of configs/a52b.py, after annealing:

    python train.py --config=configs/a52b_32k.py --workdir=/mnt/shared/a52b_32k \
        --config.train.init_from=/mnt/shared/a52b --config.data.tokenizer=hy.tiktoken

The hosts are started as for configs/a52b.py.  `corpus` is a folder of token shards
(`python -m hunyuan_jax tokenize`).  A quarter of the rows comes from its documents of 16K tokens
and more, the rest from all shorter ones, packed (Hunyuan-Large report, arXiv 2411.02265, section
on long context: 25 % long text, 75 % normal, about 10 B tokens).  The report gives
no learning rate; this one is that of the end of configs/a52b.py.

Before paying for a slice, see what the compiler says:

    python -m hunyuan_jax plan --config=configs/a52b_32k.py --topology=v5p:8x8x8

Hardware: 512 TPU chips of the v5p class.
Time and memory: `plan` has the TPU compiler's estimates.
Expected loss: not known.  Compiled for TPU, never run.
"""

from ml_collections import ConfigDict

from hunyuan_jax import config, presets


def get_config() -> ConfigDict:
    """The recipe."""
    return config.to_config_dict(
        config.Config(
            model=presets.a52b_long(),
            mesh=config.MeshConfig(data=-1, context=4, expert=16),
            data=config.quarter_long("corpus", long_from=2**14, tokenizer="hy.tiktoken"),
            train=config.TrainConfig(
                num_steps=2400, batch_size=128, seq_len=2**15, init_from="runs/a52b"
            ),
            schedule=config.ScheduleConfig(
                name="cosine_with_min_lr", peak_lr=3e-5, min_lr=3e-6, warmup_steps=100
            ),
        )
    )
