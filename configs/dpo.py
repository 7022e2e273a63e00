"""Direct preference optimisation of any model that we load.

    python train.py --config=configs/dpo.py --config.train.init_from=FOLDER \\
        --config.data.source=pairs.jsonl --workdir=runs/dpo
    python -m hunyuan_jax chat --checkpoint=runs/dpo

The model, its tokenizer and its chat template are those of FOLDER, usually the workdir of
configs/sft.py.  docs/post_training.md has the formats of data and the losses.

As in the Hunyuan-Large paper, section 4.2, the loss has a term of the chosen answers, and what is
validated and exported is a moving average of the weights.  The paper leaves open how much of each.
To train on the model's own answers too, as the paper does, set
--config.objective.dpo.online.share=0.5 and a judge (docs/post_training.md).
For adapters instead of whole weights add --config.model.lora.rank=16
--config.schedule.peak_lr=2e-5.

Hardware: what the model needs; `python -m hunyuan_jax plan` takes the same options.
Time: one pass over the data, after one forward pass for the reference.
Expected: the loss begins at ln 2 = 0.693 and sft_weight times that of the chosen answers.
"""

from ml_collections import ConfigDict

from hunyuan_jax import config


def get_config() -> ConfigDict:
    """The recipe."""
    return config.weights_recipe(
        model={"attention_dropout": 0.0, "hidden_dropout": 0.0, "moe.dispatch": "dropless"},
        objective=config.ObjectiveConfig(name="dpo", dpo=config.DpoConfig(sft_weight=0.1)),
        optimizer=config.OptimizerConfig(b2=0.999, weight_decay=0.0),
        schedule=config.ScheduleConfig(
            name="cosine_with_min_lr", peak_lr=1e-6, warmup_steps=0, min_lr=1e-7
        ),
        train=config.TrainConfig(
            num_epochs=1.0, batch_size=8, ema_decay=0.99, log_every=1, eval_every=50
        ),
        checkpoint=config.CheckpointConfig(every=100, keep=2),
    )
