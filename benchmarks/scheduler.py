"""Measures what the engine's own Python costs a step, apart from jax and the device.

    python benchmarks/scheduler.py [ROWS]

Rows draw greedily, without stop ids and log-probabilities, in two pools as on two cores.  Counted
is CPU time: of the plan (`Scheduler.plan`), of the arrays that the device reads (`Lines`), of the
lists that its tokens become (`drawn_rows`), and of what each request is told (`Scheduler.update`).
The tokens that "come back" lie ready; calls of jax are not counted.
"""

import itertools
import statistics
import sys
import time

import numpy as np

from hunyuan_jax.infer.pages import Pages
from hunyuan_jax.infer.plan_array import Lines
from hunyuan_jax.infer.programs import Results
from hunyuan_jax.infer.request import Request
from hunyuan_jax.infer.runner import drawn_rows
from hunyuan_jax.infer.scheduler import Choice, Drawn, Scheduler, Shapes
from hunyuan_jax.infer.settings import Sampling

NUM_POOLS, PAGE_SIZE, CONTEXT = 2, 64, 8192
TOKENS_OF_STEPS = (1, 8, 32)
PARTS = ("plan", "arrays", "lists", "news")


def main(num_rows: str = "64") -> None:
    """Prints a markdown table of medians; low: of the tenth part of the steps that cost least, as
    other work on the machine disturbs the rest.
    """
    print(f"| tokens a row | {', '.join(PARTS)}, us | together | low |\n|---|---|---|---|")
    for num_steps in TOKENS_OF_STEPS:
        steps = measure(int(num_rows), num_steps)
        parts = ", ".join(f"{statistics.median(part):.0f}" for part in zip(*steps, strict=True))
        together = sorted(map(sum, steps))
        low = together[len(steps) // 10]
        print(f"| {num_steps} | {parts} | {statistics.median(together):.0f} | {low:.0f} |")


def measure(num_rows: int, num_steps: int) -> list[list[float]]:
    """CPU microseconds of each part, for each of several steps of so many tokens a row."""
    of_pool, num_columns = num_rows // NUM_POOLS, CONTEXT // PAGE_SIZE
    shapes = Shapes(PAGE_SIZE, PAGE_SIZE, (1, 4, 16), of_pool, num_steps)
    pools = [Pages(of_pool * num_columns) for _ in range(NUM_POOLS)]
    scheduler = Scheduler(pools, shapes)
    lines = Lines(NUM_POOLS, 1, of_pool, num_columns)
    sampling = Sampling(temperature=0, max_new_tokens=CONTEXT, stop_ids=()).resolved({})
    for i in range(num_rows):
        prompt = tuple(range(i, 2 * i + PAGE_SIZE))  # their pages fill at different steps
        scheduler.add(Choice(Request(str(i), prompt, sampling), 0, CONTEXT - len(prompt)))
    results = Results(np.full((num_steps, of_pool), 5, np.int32), None)
    steps = []
    while min((c.num_drawn for c in scheduler.running), default=0) < CONTEXT // 2:
        at = [time.thread_time()]
        plan = scheduler.plan()
        at.append(time.thread_time())
        for choice, num_known in plan.changed:
            lines.write(choice, num_known)
        for pool in range(NUM_POOLS):
            lines.drawing(plan, [pool], of_pool)
        at.append(time.thread_time())
        of_rows = [drawn_rows(results, range(len(r.choices)), r.choices, 1) for r in plan.rows]
        at.append(time.thread_time())
        scheduler.update(plan, [Drawn([5] * chunk.is_last) for chunk in plan.chunks], of_rows)
        at.append(time.thread_time())
        if plan.num_steps == num_steps and not plan.chunks:
            steps.append([1e6 * (b - a) for a, b in itertools.pairwise(at)])
    return steps


if __name__ == "__main__":
    main(*sys.argv[1:])
