"""Validation: an objective's metrics over held-out batches."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from hunyuan_jax.train.objective import Objective


def evaluate(
    objective: Objective,
    eval_step: Callable[[Any, Any], Mapping[str, jax.Array]],
    params: Any,
    batches: Iterable[Any],
) -> dict[str, float]:
    """Returns the row of metrics.jsonl for one validation.

    It is `objective.summary` of the sums over all batches.
    """
    totals: Counter[str] = Counter()
    for sums in [eval_step(params, batch) for batch in batches]:  # dispatched before any is read
        for name, value in sums.items():
            totals[name] += float(value)
    return objective.summary(totals)
