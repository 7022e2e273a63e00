"""Reinforcement learning by rewards of any model that we load: GRPO with a loss per token.

    python train.py --config=configs/grpo.py --config.train.init_from=FOLDER \\
        --config.data.source=prompts.jsonl --config.objective.grpo.rewards=rewards.py:right \\
        --workdir=runs/grpo
    python -m hunyuan_jax chat --checkpoint=runs/grpo

A row of the data has `prompt`, a text or messages, and the columns that the functions of
rewards.py read.  docs/post_training.md has the settings.  The completions are drawn
by the weights that are trained, in the same process; the first of each batch are in
WORKDIR/completions.jsonl and in the report.

For adapters instead of whole weights add --config.model.lora.rank=16
--config.schedule.peak_lr=2e-5.

Hardware: what the model needs for training, and the engine's cache beside it.
Time: rollouts and steps in turn; docs/results/post_training.md has an example.
Expected: the reward rises.
"""

from ml_collections import ConfigDict

from hunyuan_jax import config


def get_config() -> ConfigDict:
    """The recipe."""
    return config.weights_recipe(
        model={"attention_dropout": 0.0, "hidden_dropout": 0.0, "moe.dispatch": "dropless"},
        objective=config.ObjectiveConfig(name="grpo"),
        optimizer=config.OptimizerConfig(b2=0.999, weight_decay=0.0),
        schedule=config.ScheduleConfig(
            name="cosine_with_min_lr", peak_lr=1e-6, warmup_steps=0, min_lr=1e-7
        ),
        train=config.TrainConfig(num_steps=200, batch_size=64, log_every=1),
        checkpoint=config.CheckpointConfig(every=50, keep=2),
    )
