"""Reports the steps that optim/guard.py skipped.

The loop calls it only when it waits for the devices anyway.
"""

import math
from collections.abc import Callable

import jax
import numpy as np

from hunyuan_jax.config import Config
from hunyuan_jax.errors import ConfigError

_NUM_NAMES_SHOWN = 20


class SkippedSteps:
    """The steps dispatched since the last report."""

    def __init__(
        self,
        config: Config,
        documents_of: Callable[[int], list[str]],
        show: Callable[[str], None],
    ):
        """Starts without steps.

        Args:
          config: the run's.
          documents_of: step (from 1) -> names of the documents in its batch.
          show: prints a line for the user.
        """
        self._config, self._documents_of, self._show = config, documents_of, show
        self._pending: list[tuple[int, dict[str, jax.Array]]] = []

    def add(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Records a dispatched step without waiting for it."""
        self._pending.append(
            (step, {name: metrics[name] for name in ("loss", "grad_norm", "skipped_in_row")})
        )

    def report(self) -> None:
        """Waits for the recorded steps; shows each skipped one with the documents of its batch.

        Raises:
          ConfigError: config.train.max_skipped_steps were skipped in a row.
        """
        pending, self._pending = self._pending, []
        for step, metrics in pending:
            loss, grad_norm, in_row = (
                np.asarray(metrics[name]).item()
                for name in ("loss", "grad_norm", "skipped_in_row")
            )
            if not in_row:
                continue
            names = list(dict.fromkeys(self._documents_of(step)))
            shown = ", ".join(names[:_NUM_NAMES_SHOWN]) + (
                f" and {len(names) - _NUM_NAMES_SHOWN} more" if names[_NUM_NAMES_SHOWN:] else ""
            )
            is_finite = math.isfinite(loss) and math.isfinite(grad_norm)
            why = (
                f"a gradient norm of {grad_norm:.4g} is a spike"
                if is_finite
                else f"loss {loss:.4g}, gradient norm {grad_norm:.4g}"
            )
            self._show(f"step {step} was skipped: {why}; documents: {shown}")
            if in_row >= self._config.train.max_skipped_steps:
                raise ConfigError(
                    f"{in_row} steps in a row were skipped, up to step {step}: {why}. The limit "
                    f"is config.train.max_skipped_steps = {self._config.train.max_skipped_steps}. "
                    "Continue from the last checkpoint with a lower config.schedule.peak_lr (now "
                    f"{self._config.schedule.peak_lr}) or a longer warm-up, look at the documents "
                    "named above, or raise config.optimizer.spike_factor (now "
                    f"{self._config.optimizer.spike_factor}) if these are not spikes."
                )
