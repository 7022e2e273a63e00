"""The training loop: resume, step, log, evaluate, save; on one process or, in step, on all that the run was started as."""

import contextlib
import functools
import math
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from hunyuan_jax.checkpoint.store import Store, claim_workdir, describe_workdir
from hunyuan_jax.config import Config, ConfigError, to_dict
from hunyuan_jax.data import loader, source
from hunyuan_jax.model.count import count
from hunyuan_jax.obs.metrics import MetricsWriter, ProgressLine, moe_health, peak_flops
from hunyuan_jax.parallel import hosts
from hunyuan_jax.parallel.mesh import join_processes, make_mesh
from hunyuan_jax.tokenizer import load_tokenizer
from hunyuan_jax.train import step as step_lib
from hunyuan_jax.train.start import read_weights
from hunyuan_jax.train.state import abstract_state, build_program, init_state


def run(config: Config, workdir: str | os.PathLike) -> int:
    """Trains to config.train.num_steps, continuing from the newest checkpoint of workdir.  Returns the exit status.

    SIGTERM and Ctrl-C save and stop, on all processes if one receives it: 0 after SIGTERM (the same command continues), 130 where
    Ctrl-C was pressed.

    Raises:
      ConfigError: something the user must change.
    """
    # --- What can go wrong quickly goes first: the mesh, the text, the workdir.
    join_processes()
    train = config.train
    program = build_program(config, make_mesh(config.mesh))
    train_step, eval_step = step_lib.make_train_step(program), step_lib.make_eval_step(program)
    sharding, batch_shape = step_lib.batch_sharding(program), (train.batch_size, train.seq_len)
    to_devices = functools.partial(hosts.global_batch, sharding=sharding, shape=batch_shape)
    sizes = {"batch_size": train.batch_size, "seq_len": train.seq_len, "rows": hosts.process_rows(sharding, batch_shape)}
    with hosts.raised_by_all():
        tokenizer = load_tokenizer(config.data.tokenizer)
        if tokenizer.vocab_size > config.model.vocab_size:
            raise ConfigError(
                f"config.data.tokenizer = {config.data.tokenizer!r} has {tokenizer.vocab_size} ids; "
                f"config.model.vocab_size = {config.model.vocab_size} must be at least that."
            )
        documents = source.open_source(config.data)
        train_documents, validation_documents = source.split_documents(documents, config.data.validation_fraction)
        if hosts.is_first():
            claim_workdir(workdir, config)
        batches = loader.train_iterator(train_documents, tokenizer, seed=train.seed, **sizes)
    corpus = {"num_documents": documents.report.num_documents, "num_bytes": documents.report.num_bytes}
    hosts.require_same(config=to_dict(config), text=corpus, workdir=describe_workdir(workdir))

    # --- Resume, or start.
    store = Store(workdir, config.checkpoint.keep)
    first_step = store.latest_step() or 0
    if first_step:
        state, position = store.restore(first_step, abstract_state(program))
    else:
        with hosts.raised_by_all():
            weights = read_weights(train.init_from, config.model) if train.init_from else None
        state, position = init_state(program, weights), None
    with hosts.raised_by_all():
        if position and position["corpus"] != corpus:
            raise ConfigError(
                f"config.data.source = {config.data.source!r} has changed since {workdir} was started: it held {position['corpus']}, "
                f"now {corpus}. Restore the text, or use another --workdir."
            )
        if position:
            batches.set_state(position["batches"])
        validation = loader.validation_batches(validation_documents, tokenizer, num_batches=train.eval_batches, **sizes)
        writer = MetricsWriter(workdir, first_step) if hosts.is_first() else None

    progress = ProgressLine(train.num_steps, first_step, is_shown=hosts.is_first())
    progress.print(f"{'resuming at step ' + str(first_step) if first_step else 'starting'}: {_describe(config, program)}")
    progress.print(f"data: {documents.report}")
    if first_step >= train.num_steps:
        progress.print(f"{workdir} is at step {first_step} of {train.num_steps} already; raise config.train.num_steps to go on.")
    log = _Log(config, program, writer, progress)

    # --- The loop proper.  Nothing here waits for the device except logging, evaluation and saving.
    with (
        contextlib.closing(batches),
        contextlib.closing(store),
        contextlib.closing(writer) if writer else contextlib.nullcontext(),
        contextlib.closing(progress),
        _stop_signals() as stop,
    ):
        log.start(first_step)
        for step in range(first_step + 1, train.num_steps + 1):
            state, metrics = train_step(state, to_devices(next(batches)))
            if step % train.log_every == 0 or step in (first_step + 1, train.num_steps):
                log.step(step, metrics)
            if validation and (step % train.eval_every == 0 or step == train.num_steps):
                log.validation(step, _evaluate(eval_step, state.params, map(to_devices, validation)))
            is_stopping = hosts.reached_stop(step, bool(stop))  # read once: a signal that comes while saving waits for the next step
            if step % config.checkpoint.every == 0 or step == train.num_steps or is_stopping:
                store.save(step, state, {"batches": batches.get_state(), "corpus": corpus})
            if is_stopping:
                received = stop[0] if stop else signal.SIGTERM  # which may have come to another process
                progress.print(f"{received.name}: saved step {step}; the same command continues from there.")
                return 130 if received == signal.SIGINT else 0
    return 0


class _Log:
    """Turns device metrics into rows and the progress line, and keeps the clock."""

    def __init__(self, config: Config, program: Any, writer: MetricsWriter | None, progress: ProgressLine):
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
        self._write(step, {**row, **moe_health(metrics)})
        self._progress.update(step, loss, row["tokens_per_second"], seconds)
        self.start(step)

    def validation(self, step: int, loss: float) -> None:
        self._write(step, {"validation_loss": loss})
        self._progress.print(f"step {step}: validation loss {loss:.4f} nats a token")
        self.start(step)  # the next rate is of training alone

    def _write(self, step: int, row: dict[str, Any]) -> None:
        if self._writer:
            self._writer.write(step, row)


def _evaluate(eval_step, params, batches) -> float:
    """Mean cross entropy over the targets of all batches."""
    sums = [eval_step(params, batch) for batch in batches]
    return float(sum(total for total, _ in sums) / sum(num for _, num in sums))


def _describe(config: Config, program: Any) -> str:
    counts = count(config.model, config.train.seq_len)
    mesh = " x ".join(f"{axis} {size}" for axis, size in program.mesh.shape.items())
    return f"{counts.total / 1e6:,.1f} M parameters, {counts.active / 1e6:,.1f} M active; {program.mesh.size} device(s), {mesh}"


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[signal.Signals]]:
    """A list that SIGTERM or Ctrl-C put themselves into; the second Ctrl-C interrupts at once.

    Among several processes SIGTERM is left to jax, whose handler tells the others (`hosts.reached_stop`); Ctrl-C is passed on to it.
    """
    received: list[signal.Signals] = []
    is_alone = jax.process_count() == 1

    def handler(number, frame):
        if received:
            raise KeyboardInterrupt
        received.append(signal.Signals(number))
        if not is_alone:
            os.kill(os.getpid(), signal.SIGTERM)

    handled = (signal.SIGTERM, signal.SIGINT) if is_alone else (signal.SIGINT,)
    previous = {number: signal.signal(number, handler) for number in handled}
    try:
        yield received
    finally:
        for number, old in previous.items():
            signal.signal(number, old)
