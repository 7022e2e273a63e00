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
    is_stopping: Callable[[], bool],
) -> dict[str, float] | None:
    """Returns the row of metrics.jsonl for one validation; None if the run is to stop.

    It is `objective.summary` of the sums over all batches.  `is_stopping` is asked between
    batches, of which two are on the devices: the next one is dispatched before one is read.
    """
    totals: Counter[str] = Counter()
    pending = None
    for batch in batches:
        if is_stopping():
            return None
        sums, pending = pending, eval_step(params, batch)
        _add(totals, sums)
    _add(totals, pending)
    return objective.summary(totals)


def _add(totals: Counter[str], sums: Mapping[str, jax.Array] | None) -> None:
    for name, value in (sums or {}).items():
        totals[name] += float(value)
