"""Metrics of a run: metrics.jsonl, TensorBoard events, and the live progress line."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

# Dense bf16 peak of one device in FLOP/s, by a substring of device_kind; vendors' figures.  jax lists a v4 chip as one device
# and a v7x chip as two.
_PEAK_FLOPS = (
    ("TPU v4", 275e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5e", 197e12),
    ("TPU v5", 459e12),
    ("TPU v6", 918e12),
    ("TPU7x", 2307e12 / 2),
    ("H100", 989e12),
    ("H200", 989e12),
)


def peak_flops(device_kind: str) -> float | None:
    """bf16 peak of a device in FLOP/s, or None where it is not known (a CPU)."""
    return next((peak for name, peak in _PEAK_FLOPS if name in device_kind), None)


class MetricsWriter:
    """Appends one JSON object per logged step to DIR/metrics.jsonl and scalars to DIR/tensorboard."""

    def __init__(self, workdir: str | os.PathLike, first_step: int):
        """Drops rows of steps after `first_step`, which the run is about to repeat."""
        from tensorboardX import SummaryWriter

        path = Path(workdir) / "metrics.jsonl"
        kept = [line for line in _lines(path) if json.loads(line)["step"] <= first_step]
        path.write_text("".join(kept), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8")
        self._tensorboard = SummaryWriter(str(Path(workdir) / "tensorboard"), purge_step=first_step + 1)

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        """Writes scalars and (JSON only) lists."""
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._file.flush()
        for name, value in metrics.items():
            if isinstance(value, float):
                self._tensorboard.add_scalar(name, value, step)
        self._tensorboard.flush()

    def close(self) -> None:
        """Flushes everything."""
        self._file.close()
        self._tensorboard.close()


def moe_health(metrics: dict[str, np.ndarray]) -> dict[str, Any]:
    """The router figures of a step under the names of metrics.jsonl, {} for a dense model.

    moe/load: per layer, the share of the served tokens each expert has; moe/load_max_over_mean: of the worst layer; and the
    means over layers of moe/recycled, moe/dropped, moe/entropy (nats), moe/aux_loss and moe/z_loss.
    """
    if "load_LE" not in metrics:
        return {}
    load_LE = metrics["load_LE"]
    scalars = {f"moe/{name}": float(metrics[name]) for name in ("recycled", "dropped", "entropy", "aux_loss", "z_loss")}
    return {
        **scalars,
        "moe/load_max_over_mean": float((load_LE.max(-1) / load_LE.mean(-1)).max()),
        "moe/load": [[round(float(share), 5) for share in load_E] for load_E in load_LE],
    }


class ProgressLine:
    """A live line with step, loss, tokens/s and time left; plain lines where the output is not a terminal."""

    def __init__(self, num_steps: int, first_step: int, is_shown: bool = True):
        console = Console(file=sys.stderr, quiet=not is_shown)
        self._is_live = console.is_terminal and is_shown
        self._num_steps = num_steps
        self._progress = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
            console=console,
            disable=not self._is_live,
        )
        self._task = self._progress.add_task("compiling", total=num_steps, completed=first_step)
        self._progress.start()

    def update(self, step: int, loss: float, tokens_per_second: float, seconds_per_step: float) -> None:
        """Shows a logged step."""
        text = f"loss {loss:.4f}  {tokens_per_second:,.0f} tokens/s"
        if self._is_live:
            self._progress.update(self._task, completed=step, description=text)
        else:
            left = (self._num_steps - step) * seconds_per_step
            self.print(f"step {step}/{self._num_steps}  {text}  {left // 60:.0f}:{left % 60:02.0f} left")

    def print(self, text: str) -> None:
        """A line that stays, above the live one."""
        self._progress.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Leaves the terminal as it was."""
        self._progress.stop()


def _lines(path: Path) -> list[str]:
    """Whole lines of a file that may not exist; a last line cut off by a crash is left out."""
    if not path.is_file():
        return []
    return [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
