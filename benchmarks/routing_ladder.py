"""Trains one small mixture with each way to route on the same text, and compares the losses:

    python benchmarks/routing_ladder.py [--steps=250] [--seeds=3]

First rung, one seed: recycle and drop at capacity 1.0, 1.25 and 1.5, and dropless, each with an
auxiliary loss of weight 0, 0.001 and 0.01.  Second rung, all seeds and twice the steps: the best
of each dispatch with experts at 0.31, 0.5 and 1.0 of the learning rate.  There a way whose
capacity above 1.0 costs FLOPs is also trained for fewer steps, as many as cost the same.

Prints Markdown tables, a row when it is there: validation loss in nats a byte (dropless routing),
and means over the last tenth of the steps of the share of recycled or dropped tokens, the busiest
expert's demand over the mean, and dead experts.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from hunyuan_jax import presets
from hunyuan_jax.config import (
    CheckpointConfig,
    Config,
    MoeConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
)
from hunyuan_jax.model.count import count
from hunyuan_jax.train import loop

SEQ_LEN = 128
MODEL = dataclasses.replace(presets.tiny(), num_layers=4, hidden_size=96, num_heads=6, head_dim=16)
HEAD = (
    "| dispatch | capacity | aux weight | experts' rate | FLOPs | loss at equal tokens "
    "| at equal FLOPs | moved | demand | dead |\n|---|---|---|---|---|---|---|---|---|---|"
)


class Way(NamedTuple):
    """One way to route: fields of the model's moe section, and of the optimizer's."""

    dispatch: str
    capacity_factor: float
    aux_loss_weight: float
    expert_lr_ratio: float = 0.31

    @property
    def flops(self) -> float:
        """Training FLOPs of a token over those without a capacity: slots are computed full or
        not.
        """
        plain = count(MODEL, SEQ_LEN).flops_per_token
        slot = 6 * 3 * MODEL.hidden_size * MODEL.intermediate_size * MODEL.num_layers
        return 1 + (self.capacity_factor - 1) * slot / plain


def train(way: Way, num_steps: int, seed: int) -> dict[str, float]:
    """Validation loss and router figures of one run."""
    moe = {
        name: value for name, value in way._asdict().items() if name in MoeConfig.__match_args__
    }
    model = dataclasses.replace(MODEL, moe=dataclasses.replace(MODEL.moe, **moe))
    config = Config(
        model=model,
        optimizer=OptimizerConfig(expert_lr_ratio=way.expert_lr_ratio),
        schedule=ScheduleConfig(peak_lr=4e-3, warmup_steps=num_steps // 10, decay_ratio=0.2),
        train=TrainConfig(
            num_steps=num_steps,
            batch_size=8,
            seq_len=SEQ_LEN,
            seed=seed,
            log_every=5,
            eval_every=num_steps,
            eval_batches=32,
        ),
        checkpoint=CheckpointConfig(every=num_steps, keep=1),
    )
    with tempfile.TemporaryDirectory() as workdir:
        loop.run(config, workdir)
        rows = [
            json.loads(line) for line in (Path(workdir) / "metrics.jsonl").read_text().splitlines()
        ]
    last = [row for row in rows if "moe/recycled" in row and row["step"] > 0.9 * num_steps]
    figures = {
        "moved": [row["moe/recycled"] + row["moe/dropped"] for row in last],
        "demand": [row["moe/demand_max_over_mean"] for row in last],
        "dead": [row["moe/dead_experts"] for row in last],
    }
    loss = next(row["validation_loss"] for row in reversed(rows) if "validation_loss" in row)
    return {"loss": loss} | {name: statistics.mean(values) for name, values in figures.items()}


def row(way: Way, num_steps: int, seeds: range) -> float:
    """Prints the row of one way; returns its mean loss at equal tokens."""
    runs = [train(way, num_steps, seed) for seed in seeds]
    equal = runs
    if way.flops > 1 and len(seeds) > 1:
        equal = [train(way, round(num_steps / way.flops), seed) for seed in seeds]
    by_tokens, by_flops = (_spread([run["loss"] for run in some]) for some in (runs, equal))
    means = {name: statistics.mean(run[name] for run in runs) for name in runs[0]}
    capacity = "-" if way.dispatch == "dropless" else way.capacity_factor
    print(
        f"| {way.dispatch} | {capacity} | {way.aux_loss_weight} | {way.expert_lr_ratio} "
        f"| {way.flops:.3f} | {by_tokens} | {by_flops if equal is not runs else '-'} "
        f"| {means['moved']:.1%} | {means['demand']:.2f} | {means['dead']:.1f} |"
    )
    return means["loss"]


def _spread(losses: list[float]) -> str:
    mean = f"{statistics.mean(losses):.4f}"
    return mean if len(losses) == 1 else f"{mean} ({min(losses):.4f} to {max(losses):.4f})"


def main() -> None:
    """Prints the tables of both rungs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)
    ways = [
        Way(dispatch, capacity, weight)
        for dispatch, capacities in (
            ("dropless", [1.0]),
            ("recycle", [1.0, 1.25, 1.5]),
            ("drop", [1.0, 1.25, 1.5]),
        )
        for capacity in capacities
        for weight in (0.0, 0.001, 0.01)
    ]
    print(HEAD)
    losses = {way: row(way, arguments.steps, range(1)) for way in ways}
    print(f"\n{HEAD}")
    for dispatch in ("dropless", "recycle", "drop"):
        best = min((way for way in ways if way.dispatch == dispatch), key=losses.__getitem__)
        for ratio in (0.31, 0.5, 1.0):
            row(best._replace(expert_lr_ratio=ratio), 2 * arguments.steps, range(arguments.seeds))


if __name__ == "__main__":
    main()
