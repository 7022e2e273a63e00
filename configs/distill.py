"""A smaller model of any that we load: its weights are cut out of the larger one's, which then
teaches it.

    python train.py --config=configs/distill.py --config.objective.distill.teacher=FOLDER \\
        --config.model.num_layers=8 --config.model.moe.num_experts=4 \\
        --config.data.source=corpus --workdir=runs/draft
    python -m hunyuan_jax generate --checkpoint=runs/draft --prompt="The "

The student is FOLDER's model with the fields that are set: fewer layers, heads, experts, columns.
FOLDER is a model folder, a hub id or the workdir of a run.  The tokenizer is its own.
docs/distillation.md has the losses, and how weights are inherited, in stages too.

For a student that exists already add --config.train.init_from=STUDENT; for chats
--config.objective.distill.rows=chats.

Hardware: what the student needs for training, and the teacher's weights beside it.
Time: a step of the student and a forward pass of the teacher.
Expected: the validation loss of a student trained alone, in less than half of its steps
(docs/results/distillation.md).
"""

from ml_collections import ConfigDict

from hunyuan_jax import config


def get_config() -> ConfigDict:
    """The recipe."""
    return config.weights_recipe(
        model={"attention_dropout": 0.0, "hidden_dropout": 0.0},
        objective=config.ObjectiveConfig(name="distill"),
        schedule=config.ScheduleConfig(
            name="cosine_with_min_lr", peak_lr=1e-3, warmup_steps=0, min_lr=1e-4
        ),
        train=config.TrainConfig(num_steps=1000, batch_size=8, log_every=10, eval_every=100),
        checkpoint=config.CheckpointConfig(every=100, keep=2),
    )
