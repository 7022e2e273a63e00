"""Supervised fine-tuning of any model that we load, on chats.

    python train.py --config=configs/sft.py --config.train.init_from=FOLDER \\
        --config.data.source=chats.jsonl --workdir=runs/sft
    python -m hunyuan_jax chat --checkpoint=runs/sft

The model, its tokenizer and its chat template are those of FOLDER: a model folder, a hub id or the
workdir of a run.  docs/post_training.md has the formats of data and LoRA.

Learning rates, epochs and dropout are those of the Hunyuan-Large paper, section 4.1.
For adapters instead of whole weights add --config.model.lora.rank=16
--config.schedule.peak_lr=2e-4.

Hardware: what the model needs; `python -m hunyuan_jax plan` takes the same options.
Time: 3 passes over the data.
Expected: the validation loss falls (docs/results/post_training.md).
"""

from ml_collections import ConfigDict

from hunyuan_jax import config


def get_config() -> ConfigDict:
    """The recipe."""
    return config.weights_recipe(
        model={"attention_dropout": 0.1, "hidden_dropout": 0.2},
        objective=config.ObjectiveConfig(name="sft"),
        optimizer=config.OptimizerConfig(b2=0.999, weight_decay=0.0),
        schedule=config.ScheduleConfig(
            name="cosine_with_min_lr", peak_lr=2e-5, warmup_steps=0, min_lr=2e-6
        ),
        train=config.TrainConfig(num_epochs=3.0, batch_size=8, log_every=1, eval_every=50),
        checkpoint=config.CheckpointConfig(every=100, keep=2),
    )
