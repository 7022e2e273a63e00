"""Trains one small model with each kind of layer on the same text, and compares the losses:

    python benchmarks/layer_kinds.py [--steps=600] [--seeds=2]

Models have equal parameters (to 1 %) and see the same batches of the Python standard library's
source as bytes.  Prints a Markdown table: validation loss in nats a byte, its ratio to the first
row, the share of active neurons, and seconds a step.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
from pathlib import Path

from hunyuan_jax import presets
from hunyuan_jax.config import (
    CheckpointConfig,
    Config,
    LatentConfig,
    ModelConfig,
    MoeConfig,
    ScheduleConfig,
    SparkConfig,
    TrainConfig,
)
from hunyuan_jax.model.count import count
from hunyuan_jax.train import loop


def models() -> dict[str, ModelConfig]:
    """The kinds of layers by name."""
    dense = dataclasses.replace(presets.tiny(), moe=MoeConfig(), intermediate_size=512)
    return {
        "SwiGLU, attention": dense,
        "Spark FFN, attention": dataclasses.replace(
            dense, intermediate_size=768, spark=SparkConfig(neuron_share=0.08)
        ),
        "Spark FFN, Spark attention": dataclasses.replace(
            dense,
            intermediate_size=768,
            spark=SparkConfig(neuron_share=0.08, attention_top_k=32),
        ),
        # Fewer neurons pay for the projections that make keys and values of every head.
        "SwiGLU, latent attention": dataclasses.replace(
            dense,
            intermediate_size=424,
            num_kv_heads=8,
            use_qk_norm=False,
            latent=LatentConfig(width=64, rotary_dim=16, group_size=32),
        ),
    }


def train(model: ModelConfig, num_steps: int, seed: int) -> dict[str, float]:
    """The last row of metrics.jsonl of each kind, merged."""
    config = Config(
        model=model,
        schedule=ScheduleConfig(peak_lr=4e-3, warmup_steps=40, decay_ratio=0.2),
        train=TrainConfig(
            num_steps=num_steps,
            batch_size=8,
            seq_len=256,
            seed=seed,
            eval_every=num_steps,
            eval_batches=16,
        ),
        checkpoint=CheckpointConfig(every=num_steps, keep=1),
    )
    row = {}
    with tempfile.TemporaryDirectory() as workdir:
        loop.run(config, workdir)
        for line in (Path(workdir) / "metrics.jsonl").read_text().splitlines():
            row |= json.loads(line)
    return row


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=2)
    arguments = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)
    print("| layers | parameters | nats a byte | ratio | active neurons | s a step |")
    print("|---|---|---|---|---|---|")
    first = None
    for name, model in models().items():
        rows = [train(model, arguments.steps, seed) for seed in range(arguments.seeds)]
        loss = sum(row["validation_loss"] for row in rows) / len(rows)
        first = first or loss
        share, seconds = rows[0].get("layers/active_share"), rows[0]["seconds_per_step"]
        active = "all" if share is None else f"{share:.2%}"
        size = count(model).total
        print(
            f"| {name} | {size:,} | {loss:.4f} | {loss / first:.4f} | {active} | {seconds:.3f} |"
        )


if __name__ == "__main__":
    main()
