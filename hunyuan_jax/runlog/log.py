"""The log of a run: rows of metrics, the progress bar, where the time goes, and traces."""

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import platform
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hunyuan_jax.config import Config
from hunyuan_jax.files import write_whole
from hunyuan_jax.parallel import hosts
from hunyuan_jax.progress import ProgressBar
from hunyuan_jax.runlog.goodput import PRODUCTIVE, Goodput
from hunyuan_jax.runlog.metrics import MetricsWriter, layer_figures, moe_health, require_wandb
from pallas_kernels import chips

_PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


@dataclasses.dataclass(frozen=True)
class Work:
    """How large the model and a step are.

    parameters, active_parameters: of the model, and of those the ones that a token uses;
    flops_per_token: of training, forward and backward; tokens_per_step: over all hosts.
    """

    parameters: int
    active_parameters: int
    flops_per_token: int
    tokens_per_step: int


class Log:
    """Keeps the clock of a run on every process; process 0 alone writes and shows.

    `time` names the cause of what the loop is about to wait for.  Time goes to "startup" until
    `start`, then to steps.
    """

    def __init__(self, config: Config, workdir: str | os.PathLike):
        """Starts the clock.

        Raises:
          ConfigError: wandb is asked for and missing.
        """
        self._config, self._workdir = config, Path(workdir)
        self._goodput = Goodput()
        self._metrics: dict[str, jax.Array] | None = None  # of the last step given to the devices
        self._writer: MetricsWriter | None = None
        self._progress: ProgressBar | None = None
        self._is_profiling = False
        self._ending: str | None = None
        require_wandb(config.train.wandb_project)

    def open(
        self,
        first_step: int,
        mesh: jax.sharding.Mesh,
        schedule: Callable[[int | np.ndarray], jax.Array],
        work: Work,
    ) -> None:
        """Opens the files and shows the progress line of a run with `first_step` steps done.

        `schedule`: number of updates -> learning rate.
        """
        config = self._config
        self._schedule, self._work = schedule, work
        peak = chips.peak_flops(mesh.devices.flat[0].device_kind)
        self._peak = peak and peak * mesh.size
        if hosts.is_first():
            self._writer = MetricsWriter(self._workdir, first_step, config)
        self._progress = ProgressBar(
            "step",
            config.train.num_steps,
            first_step,
            seconds_per_line=0,
            is_shown=hosts.is_first(),
        )
        self.print(
            f"{'resuming at step ' + str(first_step) if first_step else 'starting'}: "
            f"{_describe(work, mesh)}"
        )

    def set_config(self, config: Config) -> None:
        """Replaces the config before `open`, when its number of steps is known."""
        self._config = config

    def print(self, text: str) -> None:
        """Prints a line on process 0; may be called before `open`."""
        if self._progress:
            self._progress.print(text)
        elif hosts.is_first():
            print(text, file=sys.stderr, flush=True)

    def warn(self, text: str) -> None:
        """Prints a line about this process, on any process and from any thread."""
        if hosts.is_first():
            self.print(text)
        else:
            print(f"process {jax.process_index()}: {text}", file=sys.stderr, flush=True)

    def start(self, step: int, num_skipped: int, mesh: jax.sharding.Mesh) -> None:
        """Ends the startup, with `step` steps done, `num_skipped` of them skipped.

        The next step compiles.
        """
        self._step = self._logged_step = self._flushed_step = step
        self._num_skipped = num_skipped
        self._goodput.start(self._workdir if hosts.is_first() else None, step)
        self._goodput.switch(PRODUCTIVE)
        self._training_seconds = 0.0
        self._is_compiled = False
        if hosts.is_first():
            text = json.dumps(_environment(mesh), indent=2)
            write_whole(self._workdir / "environment.json", f"{text}\n".encode())

    @contextlib.contextmanager
    def time(self, cause: str) -> Iterator[None]:
        """Counts the time inside as spent on `cause`, one of `goodput.CAUSES`.

        Waits for the devices' unfinished steps first; that time is not part of it.  "data" is the
        exception: it waits for nothing, and counts only if the devices ran out of work meanwhile.
        """
        if cause == "data":
            self._goodput.switch(cause)
            yield
            is_busy = self._metrics is not None and not self._metrics["loss"].is_ready()
            self._goodput.switch(PRODUCTIVE, spent_on=PRODUCTIVE if is_busy else cause)
            return
        jax.block_until_ready(self._metrics)
        with self._goodput.time(cause):
            yield
        if self._metrics is not None:
            self._flush()

    @contextlib.contextmanager
    def running(self, step: int) -> Iterator[None]:
        """Wraps the call of the train step: counts the first as compiling, and names each in a
        trace by its number.
        """
        if hosts.is_first() and step in self._config.train.profiled and not self._is_profiling:
            options = jax.profiler.ProfileOptions()
            # following Python crashes at the end of a trace while other threads save
            # a checkpoint
            options.python_tracer_level = 0
            with self.time("profile"):
                jax.profiler.start_trace(self._workdir / "profile", profiler_options=options)
            self._is_profiling = True
        compiling = (
            contextlib.nullcontext() if self._is_compiled else self._goodput.time("compile")
        )
        with jax.profiler.StepTraceAnnotation("train", step_num=step), compiling:
            yield
        self._is_compiled = True

    def step(self, step: int, metrics: dict[str, jax.Array]) -> bool:
        """Records a dispatched step and returns whether it was logged.

        Every train.log_every steps, and for the first and the last, it waits for the step and logs
        it.
        """
        train, is_first = self._config.train, self._metrics is None
        self._step, self._metrics = step, metrics
        if self._is_profiling and step == train.profiled[-1]:
            self._stop_trace()
        is_logged = step % train.log_every == 0 or is_first or step == train.num_steps
        if is_logged:
            self._log(step, jax.tree.map(np.asarray, metrics))
        return is_logged

    def validation(self, step: int, row: dict[str, float]) -> None:
        """Logs what `evaluate` found: figures named validation_NAME."""
        self._write(step, row)
        figures = (
            f"{name.removeprefix('validation_').replace('_', ' ')} {value:.4f}"
            for name, value in row.items()
        )
        self.print(f"step {step}: validation {', '.join(figures)}")

    def stop(self, is_finished: bool) -> None:
        """Ends the last step; the time from here to `close` is spent waiting for saves."""
        jax.block_until_ready(self._metrics)
        self._flush()
        self._goodput.switch("checkpoint")
        self._ending = "finished" if is_finished else "stopped"

    def close(self) -> None:
        """Flushes everything, and leaves the terminal as it was."""
        if self._is_profiling:
            self._stop_trace()
        if self._ending:
            self._goodput.end(self._step, self._ending)
        self._goodput.close()
        if self._writer:
            self._writer.close()
        if self._progress:
            self._progress.close()

    def _log(self, step: int, metrics: dict[str, np.ndarray]) -> None:
        self._flush()
        seconds = self._training_seconds / (step - self._logged_step)
        row = {
            "loss": float(metrics["loss"]),
            "learning_rate": float(self._schedule(metrics["num_updates"])),
            "grad_norm": float(metrics["grad_norm"]),
            "skipped_steps": int(metrics["num_skipped"]),
            "seconds_per_step": seconds,
            "tokens_per_second": self._work.tokens_per_step / seconds,
        }
        if self._peak:
            row["mfu"] = self._work.flops_per_token * row["tokens_per_second"] / self._peak
        ledger = self._goodput.ledger
        lost = {
            f"goodput/{cause}_seconds": total
            for cause, total in ledger.seconds.items()
            if total > 0
        }
        row |= {
            name.removeprefix("objective/"): float(value)
            for name, value in metrics.items()
            if name.startswith("objective/")
        }
        self._write(
            step,
            {
                **row,
                **moe_health(metrics),
                **layer_figures(metrics),
                "goodput": ledger.goodput,
                **lost,
            },
        )
        self._progress.update(
            step,
            f"loss {float(metrics['loss']):.4f}  {row['tokens_per_second']:,.0f} tokens/s",
            (self._config.train.num_steps - step) * seconds,
        )
        self._logged_step, self._training_seconds = step, 0.0

    def _flush(self) -> None:
        """A row of the ledger; the devices are idle."""
        self._goodput.switch(PRODUCTIVE)
        self._training_seconds += self._goodput.spent(PRODUCTIVE, "data")
        num_steps, self._flushed_step = self._step - self._flushed_step, self._step
        if not num_steps:
            self._goodput.flush(self._step)
            return
        before, self._num_skipped = self._num_skipped, int(self._metrics["num_skipped"])
        self._goodput.flush(self._step, (self._num_skipped - before) / num_steps)

    def _stop_trace(self) -> None:
        with self.time("profile"):
            jax.block_until_ready(self._metrics)  # or the devices would still be at the last steps
            jax.profiler.stop_trace()
        self._is_profiling = False
        self.print(
            f"wrote a trace of steps {self._config.train.profile_steps} to "
            f"{self._workdir / 'profile'}"
        )

    def _write(self, step: int, row: dict[str, Any]) -> None:
        if self._writer:
            self._writer.write(step, row)


def _describe(work: Work, mesh: jax.sharding.Mesh) -> str:
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    return (
        f"{work.parameters / 1e6:,.1f} M parameters, {work.active_parameters / 1e6:,.1f} M "
        f"active; {mesh.size} device(s), {axes}"
    )


def _environment(mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """Returns what a report says about the machine: versions, devices, host."""
    versions = {}
    for name in _PACKAGES:
        with contextlib.suppress(
            importlib.metadata.PackageNotFoundError
        ):  # libtpu is not everywhere
            versions[name] = importlib.metadata.version(name)
    return {
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "processes": jax.process_count(),
        "devices": f"{mesh.size} x {mesh.devices.flat[0].device_kind}",
        "python": platform.python_version(),
        **versions,
    }
