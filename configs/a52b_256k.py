r"""Hunyuan-Large's second long-context stage: 256K tokens a sequence, about 10 B tokens.

It starts from the weights of configs/a52b_32k.py, and spreads each sequence over 32 chips:

    python train.py --config=configs/a52b_256k.py --workdir=/mnt/shared/a52b_256k \
        --config.train.init_from=/mnt/shared/a52b_32k --config.data.tokenizer=hy.tiktoken

Long documents are those of 128K tokens and more; the rest is said in configs/a52b_32k.py.

    python -m hunyuan_jax plan --config=configs/a52b_256k.py --topology=v5p:8x8x8

Hardware: 512 TPU chips of the v5p class.
Time and memory: `plan` has the TPU compiler's estimates; docs/results/long_context.md has the
memory by line item.
Expected loss: not known.  Compiled for TPU, never run.
"""

from ml_collections import ConfigDict

from hunyuan_jax import config, presets


def get_config() -> ConfigDict:
    """The recipe."""
    return config.to_config_dict(
        config.Config(
            model=presets.a52b_long(),
            mesh=config.MeshConfig(data=-1, context=32, expert=16),
            data=config.quarter_long("corpus", long_from=2**17, tokenizer="hy.tiktoken"),
            train=config.TrainConfig(
                num_steps=2400, batch_size=16, seq_len=2**18, init_from="runs/a52b_32k"
            ),
            schedule=config.ScheduleConfig(
                name="cosine_with_min_lr", peak_lr=3e-5, min_lr=3e-6, warmup_steps=100
            ),
        )
    )
