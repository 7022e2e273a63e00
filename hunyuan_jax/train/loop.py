"""The training loop: resume, step, log, evaluate, save."""

import contextlib
import math
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from hunyuan_jax.checkpoint.store import Store, claim_workdir
from hunyuan_jax.config import Config, ConfigError
from hunyuan_jax.data import loader, source
from hunyuan_jax.model.count import count
from hunyuan_jax.obs.metrics import MetricsWriter, ProgressLine, moe_health, peak_flops
from hunyuan_jax.parallel.mesh import make_mesh
from hunyuan_jax.tokenizer import load_tokenizer
from hunyuan_jax.train import step as step_lib
from hunyuan_jax.train.state import abstract_state, build_program, init_state


def run(config: Config, workdir: str | os.PathLike) -> int:
    """Trains to config.train.num_steps, continuing from the newest checkpoint of workdir.  Returns the exit status.

    SIGTERM and Ctrl-C save and stop: 0 after SIGTERM (the same command continues), 130 after Ctrl-C.

    Raises:
      ConfigError: something the user must change.
    """
    # --- What can go wrong quickly goes first: the mesh, the text, the workdir.
    train = config.train
    program = build_program(config, make_mesh(config.mesh))
    train_step, eval_step = step_lib.make_train_step(program), step_lib.make_eval_step(program)
    tokenizer = load_tokenizer(config.data.tokenizer)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"config.data.tokenizer = {config.data.tokenizer!r} has {tokenizer.vocab_size} ids; "
            f"config.model.vocab_size = {config.model.vocab_size} must be at least that."
        )
    documents = source.open_source(config.data)
    train_documents, validation_documents = source.split_documents(documents, config.data.validation_fraction)
    claim_workdir(workdir, config)

    # --- Resume, or start.
    store = Store(workdir, config.checkpoint.keep)
    batches = loader.train_iterator(train_documents, tokenizer, batch_size=train.batch_size, seq_len=train.seq_len, seed=train.seed)
    corpus = {"num_documents": documents.report.num_documents, "num_bytes": documents.report.num_bytes}
    first_step = store.latest_step() or 0
    if first_step:
        state, position = store.restore(first_step, abstract_state(program))
        if position["corpus"] != corpus:
            raise ConfigError(
                f"config.data.source = {config.data.source!r} has changed since {workdir} was started: it held {position['corpus']}, "
                f"now {corpus}. Restore the text, or use another --workdir."
            )
        batches.set_state(position["batches"])
    else:
        state = init_state(program)

    progress = ProgressLine(train.num_steps, first_step)
    progress.print(f"{'resuming at step ' + str(first_step) if first_step else 'starting'}: {_describe(config, program)}")
    progress.print(f"data: {documents.report}")
    if first_step >= train.num_steps:
        progress.print(f"{workdir} is at step {first_step} of {train.num_steps} already; raise config.train.num_steps to go on.")
    writer = MetricsWriter(workdir, first_step)
    validation = loader.validation_batches(
        validation_documents, tokenizer, batch_size=train.batch_size, seq_len=train.seq_len, num_batches=train.eval_batches
    )
    log = _Log(config, program, writer, progress)

    # --- The loop proper.  Nothing here waits for the device except logging, evaluation and saving.
    sharding = step_lib.batch_sharding(program)
    with (
        contextlib.closing(batches),
        contextlib.closing(store),
        contextlib.closing(writer),
        contextlib.closing(progress),
        _stop_signals() as stop,
    ):
        log.start(first_step)
        for step in range(first_step + 1, train.num_steps + 1):
            state, metrics = train_step(state, jax.device_put(next(batches), sharding))
            if step % train.log_every == 0 or step in (first_step + 1, train.num_steps):
                log.step(step, metrics)
            if validation and (step % train.eval_every == 0 or step == train.num_steps):
                log.validation(step, _evaluate(eval_step, state.params, validation, sharding))
            is_stopping = bool(stop)  # read once: a signal that comes while saving waits for the next step
            if step % config.checkpoint.every == 0 or step == train.num_steps or is_stopping:
                store.save(step, state, {"batches": batches.get_state(), "corpus": corpus})
            if is_stopping:
                progress.print(f"{stop[0].name}: saved step {step}; the same command continues from there.")
                return 130 if stop[0] == signal.SIGINT else 0
    return 0


class _Log:
    """Turns device metrics into rows and the progress line, and keeps the clock."""

    def __init__(self, config: Config, program: Any, writer: MetricsWriter, progress: ProgressLine):
        self._config, self._schedule, self._writer, self._progress = config, program.schedule, writer, progress
        self._tokens_per_step = config.train.batch_size * config.train.seq_len
        peak = peak_flops(program.mesh.devices.flat[0].device_kind)
        self._peak = peak and peak * program.mesh.size
        self._flops_per_token = count(config.model, config.train.seq_len).flops_per_token

    def start(self, step: int) -> None:
        self._last_step, self._last_time = step, time.perf_counter()

    def step(self, step: int, metrics: dict[str, jax.Array]) -> None:
        metrics = jax.tree.map(np.asarray, metrics)  # waits for the step
        loss = float(metrics["loss"])
        if not math.isfinite(loss):
            raise ConfigError(
                f"the loss is {loss} at step {step}; the run has stopped without saving this state. Continue from the last checkpoint "
                f"with a lower config.schedule.peak_lr (now {self._config.schedule.peak_lr}) or a longer warm-up."
            )
        seconds = (time.perf_counter() - self._last_time) / (step - self._last_step)
        row = {
            "loss": loss,
            "learning_rate": float(self._schedule(step - 1)),
            "grad_norm": float(metrics["grad_norm"]),
            "seconds_per_step": seconds,
            "tokens_per_second": self._tokens_per_step / seconds,
        }
        if self._peak:
            row["mfu"] = self._flops_per_token * row["tokens_per_second"] / self._peak
        self._writer.write(step, {**row, **moe_health(metrics)})
        self._progress.update(step, loss, row["tokens_per_second"], seconds)
        self.start(step)

    def validation(self, step: int, loss: float) -> None:
        self._writer.write(step, {"validation_loss": loss})
        self._progress.print(f"step {step}: validation loss {loss:.4f} nats a token")
        self.start(step)  # the next rate is of training alone


def _evaluate(eval_step, params, batches, sharding) -> float:
    """Mean cross entropy over the targets of all batches."""
    sums = [eval_step(params, jax.device_put(batch, sharding)) for batch in batches]
    return float(sum(total for total, _ in sums) / sum(num for _, num in sums))


def _describe(config: Config, program: Any) -> str:
    counts = count(config.model, config.train.seq_len)
    mesh = " x ".join(f"{axis} {size}" for axis, size in program.mesh.shape.items())
    return f"{counts.total / 1e6:,.1f} M parameters, {counts.active / 1e6:,.1f} M active; {program.mesh.size} device(s), {mesh}"


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[signal.Signals]]:
    """A list that SIGTERM or Ctrl-C put themselves into; the second Ctrl-C interrupts at once."""
    received: list[signal.Signals] = []

    def handler(number, frame):
        if received:
            raise KeyboardInterrupt
        received.append(signal.Signals(number))

    previous = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, old in previous.items():
            signal.signal(number, old)
