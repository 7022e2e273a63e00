"""Measures what the router's figures cost: steps with and without them, alternating.

JAX_PLATFORMS=cpu python benchmarks/router_metrics.py
"""

import statistics
import time
from unittest import mock

import jax

from hunyuan_jax import presets
from hunyuan_jax.config import Config, TrainConfig
from hunyuan_jax.layers.ffn.moe import layer as moe_layer
from hunyuan_jax.layers.ffn.moe import routing
from hunyuan_jax.parallel.mesh import single_device_mesh
from hunyuan_jax.train import step as step_lib
from hunyuan_jax.train.state import build_program, init_state

NUM_PAIRS = 60


def main() -> None:
    """Prints a table; a ratio is that of two steps that follow each other, so that a machine that
    becomes slower does not count.
    """
    print(
        "| model | with, ms | without, ms | median of the ratios - 1 | quartiles | compiled FLOPs "
        "| bytes |\n|---|---|---|---|---|---|---|"
    )
    for name, model in (("tiny", presets.tiny()), ("bench", presets.bench())):
        config = Config(model=model, train=TrainConfig(batch_size=8, seq_len=256))
        program = build_program(config, single_device_mesh())
        batch = step_lib.place_batch(program, program.objective.random_batch())
        states = [init_state(program), init_state(program)]
        steps = [step_lib.make_train_step(program).lower(states[0], batch).compile()]
        with (
            mock.patch.object(routing, "health", return_value={}),
            mock.patch.object(
                moe_layer,
                "router_metrics",
                lambda stats: {name: value.mean() for name, value in stats.items()},
            ),
        ):
            steps.append(step_lib.make_train_step(program).lower(states[1], batch).compile())
        seconds = [[], []]
        for pair in range(NUM_PAIRS + 2):  # the first two warm up
            for which in (0, 1) if pair % 2 else (1, 0):
                start = time.perf_counter()
                states[which], metrics = steps[which](states[which], batch)
                jax.block_until_ready(metrics)
                seconds[which].append(time.perf_counter() - start)
        ratios = [a / b - 1 for a, b in zip(seconds[0][2:], seconds[1][2:], strict=True)]
        first, median, third = statistics.quantiles(ratios, n=4)
        medians = [1e3 * statistics.median(s[2:]) for s in seconds]
        costs = [step.cost_analysis() for step in steps]
        extra = [
            f"{costs[0][key] / costs[1][key] - 1:+.3%}" for key in ("flops", "bytes accessed")
        ]
        print(
            f"| {name} | {medians[0]:.1f} | {medians[1]:.1f} | {median:+.2%} | {first:+.2%} to "
            f"{third:+.2%} | {' | '.join(extra)} |"
        )


if __name__ == "__main__":
    main()
