"""The training loop: resume, step, log, evaluate, save.

Every process of a run executes it in lock-step.
"""

import contextlib
import errno
import functools
import math
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from hunyuan_jax import malloc as heap
from hunyuan_jax.checkpoint import manifest
from hunyuan_jax.checkpoint.store import Store, claim_workdir, describe_workdir
from hunyuan_jax.config import Config, to_dict
from hunyuan_jax.data.stream import read_ahead
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.model.count import count
from hunyuan_jax.parallel import hosts
from hunyuan_jax.parallel.mesh import join_processes, make_mesh
from hunyuan_jax.runlog.log import Log, Work
from hunyuan_jax.runlog.watchdog import Watchdog
from hunyuan_jax.tokenizer import load_tokenizer
from hunyuan_jax.train import step as step_lib
from hunyuan_jax.train.evaluate import evaluate
from hunyuan_jax.train.skipped_steps import SkippedSteps
from hunyuan_jax.train.start import read_weights
from hunyuan_jax.train.state import (
    Program,
    TrainState,
    abstract_state,
    build_program,
    convert,
    from_items,
    init_state,
    to_items,
    with_state_dtype,
)


def run(config: Config, workdir: str | os.PathLike) -> int:
    """Trains to config.train.num_steps, from the newest checkpoint of workdir if there is one.

    SIGTERM and Ctrl-C save and stop all processes, whichever of them receives the signal.  The
    same command then continues.

    Returns:
      The exit status: 130 after Ctrl-C, else 0.

    Raises:
      ConfigError: something the user must change.
    """
    join_processes()
    process = f"process {jax.process_index()} of {jax.process_count()}"
    stacks = Path(workdir) / f"stacks-{jax.process_index()}.txt"
    with contextlib.closing(Watchdog(config.train.watchdog_minutes, stacks, process)) as watchdog:
        return _run(config, workdir, watchdog)


def _run(config: Config, workdir: str | os.PathLike, watchdog: Watchdog) -> int:
    # --- What can go wrong quickly goes first: the mesh, the text, the workdir.
    log = Log(config, workdir)
    train = config.train
    program = build_program(config, make_mesh(config.mesh))
    train_step, eval_step = step_lib.make_train_step(program), step_lib.make_eval_step(program)
    spec = program.objective.eval_spec | program.objective.batch_spec
    shapes = {name: field.shape for name, field in spec.items()}
    shardings = step_lib.batch_shardings(program, spec)
    to_devices = functools.partial(hosts.global_batch, shardings=shardings, shapes=shapes)
    name = next(iter(program.objective.batch_spec))  # all fields are split alike in dim 0
    rows = hosts.process_rows(shardings[name], shapes[name])
    with hosts.fail_together(), watchdog.doing("reading its text"):
        tokenizer = load_tokenizer(config.data.tokenizer)
        if tokenizer.vocab_size > config.model.vocab_size:
            raise ConfigError(
                f"config.data.tokenizer = {config.data.tokenizer!r} has {tokenizer.vocab_size} "
                "ids; "
                f"config.model.vocab_size = {config.model.vocab_size} must be at least that."
            )
        stream = program.objective.open_stream(tokenizer)
        if hosts.is_first():
            claim_workdir(workdir, config)
        batches = read_ahead(stream, rows)
    corpus = stream.identity()
    hosts.require_same(config=to_dict(config), text=corpus, workdir=describe_workdir(workdir))

    # --- Resume, or start.
    store = Store(workdir, config.checkpoint, log.warn)
    with watchdog.doing("restoring a checkpoint"):
        first_step, state, facts = _restored(config, workdir, program, corpus, store, log) or (
            0,
            None,
            None,
        )
    if facts is None:
        with watchdog.doing("making its first state"):
            with hosts.fail_together():
                weights = (
                    read_weights(train.init_from, config.model, program.mesh)
                    if train.init_from
                    else None
                )
            state = init_state(program, weights)
    watchdog.finished(first_step)
    with hosts.fail_together():
        if facts:
            batches.set_state(facts["position"]["batches"])
        validation = stream.validation(train.eval_batches, rows)
        log.open(first_step, program.mesh, program.schedule, _work(program))
    log.print(f"data: {stream}")
    if facts and (changed := _changed_versions(facts, config, program)):
        log.print(
            f"step {first_step} was made with {changed}: the losses from here may differ in their "
            "last bits."
        )

    def documents_of(step):
        batch = stream.describe(step - 1)["rows"]
        return [
            f"{row['source']}/{document['name']}" for row in batch for document in row["documents"]
        ]

    skipped = SkippedSteps(config, documents_of, log.print)
    schedule = _Saves(config)

    # --- The loop proper.  Nothing here waits for the device except logging, evaluation and
    # saving.
    with (
        _disk_full_explained(store),
        contextlib.closing(log),
        contextlib.closing(batches),
        _waited_for(store, watchdog),
        _stop_signals() as stop,
    ):
        if first_step >= train.num_steps:
            log.print(
                f"{workdir} is at step {first_step} of {train.num_steps} already; raise "
                "config.train.num_steps to go on."
            )
            return 0
        log.start(first_step, int(state.guard.num_skipped), program.mesh)
        for step in range(first_step + 1, train.num_steps + 1):
            with log.time("data"), watchdog.doing("waiting for a batch"):
                batch = next(batches)
            with (
                log.running(step),
                watchdog.doing(
                    "compiling its first step" if step == first_step + 1 else "in a step"
                ),
            ):
                state, metrics = train_step(state, to_devices(batch))
            is_logged = log.step(step, metrics)
            skipped.add(step, metrics)
            validation_loss = None
            if validation and (step % train.eval_every == 0 or step == train.num_steps):
                with log.time("evaluation"), watchdog.doing("in validation"):
                    found = evaluate(
                        program.objective, eval_step, state.params, map(to_devices, validation)
                    )
                log.validation(step, found)
                validation_loss = (
                    found["validation_loss"] if math.isfinite(found["validation_loss"]) else None
                )
            is_stopping = hosts.reached_stop(
                step, bool(stop)
            )  # read once: a signal that comes while saving waits for the next step
            is_best = (
                config.checkpoint.keep_best > 0
                and validation_loss is not None
                and validation_loss < store.best_loss
            )
            is_saving = (
                schedule.is_due(step, is_logged)
                or is_best
                or step == train.num_steps
                or is_stopping
            )
            if is_logged or is_saving:
                with hosts.fail_together():
                    skipped.report()
                    store.check()
                    if is_saving:
                        store.require_room()
            if is_saving:
                with log.time("checkpoint"), watchdog.doing("saving"):
                    position = {"batches": batches.get_state(), "corpus": corpus}
                    store.save(
                        step,
                        to_items(state),
                        manifest.facts(config, program.mesh.shape, position, validation_loss),
                    )
                schedule.saved()
            watchdog.finished(step)
            if step == first_step + 1:
                heap.trim()  # of what compiling took
            if is_stopping:
                received = (
                    stop[0] if stop else signal.SIGTERM
                )  # which may have come to another process
                log.stop(is_finished=step == train.num_steps)
                _stop(received, step, store, log)
                return 130 if received == signal.SIGINT else 0
        log.stop(is_finished=True)
    return 0


def _restored(
    config: Config,
    workdir: str | os.PathLike,
    program: Program,
    corpus: dict[str, Any],
    store: Store,
    log: Log,
) -> tuple[int, TrainState, manifest.Facts] | None:
    """Returns (steps done, state, facts) of the newest good checkpoint; None if there is none.

    Raises:
      ConfigError: it is of another run or text, or all checkpoints are damaged.
    """

    def target_of(facts):
        manifest.require_same_run(
            facts["fixed"], config, f"the newest checkpoint of {workdir} was"
        )
        if (before := facts["position"]["corpus"]) != corpus:
            raise ConfigError(
                f"the text of config.data has changed since {workdir} was started: it was "
                f"{before}, now {corpus}. Restore the text, or use "
                "another --workdir."
            )
        return to_items(abstract_state(with_state_dtype(program, facts["state_dtype"])))

    with log.time("restore"):
        restored = store.restore_newest(target_of)
    if restored is None:
        return None
    step, items, facts = restored
    state = from_items(items)
    if facts["state_dtype"] == config.optimizer.state_dtype:
        return step, state, facts
    log.print(
        f"the state of step {step} is converted from {facts['state_dtype']} to "
        f"{config.optimizer.state_dtype}."
    )
    return step, convert(program, state), facts


def _work(program: Program) -> Work:
    counts = count(program.config.model, program.config.train.seq_len)
    return Work(
        parameters=counts.total,
        active_parameters=counts.active,
        flops_per_token=counts.flops_per_token,
        tokens_per_step=math.prod(program.objective.batch_spec["tokens"].shape),
    )


class _Saves:
    """Decides when the next checkpoint is due; the same on all processes."""

    def __init__(self, config: Config):
        self._cfg, self._last = config.checkpoint, time.monotonic()

    def is_due(self, step: int, is_logged: bool) -> bool:
        """Whether to save after `step`.

        Only if `is_logged` may it wait for the other processes: the loop then waits for the
        devices anyway.
        """
        if self._cfg.every and step % self._cfg.every == 0:
            return True
        if not self._cfg.every_minutes or not is_logged:
            return False
        return bool(
            hosts.broadcast_from_first(
                time.monotonic() - self._last >= 60 * self._cfg.every_minutes
            )
        )

    def saved(self) -> None:
        """Records that a checkpoint was saved."""
        self._last = time.monotonic()


def _stop(received: signal.Signals, step: int, store: Store, log: Log) -> None:
    """Waits for the save of the last step, and prints how long it takes."""
    usual = (
        f"the last one took {store.save_seconds:.1f} s"
        if store.save_seconds
        else "the first one of this process"
    )
    log.print(f"{received.name}: saving step {step}; {usual}.")
    start = time.monotonic()
    store.wait()
    log.print(
        f"{received.name}: saved step {step} in {time.monotonic() - start:.1f} s; the same "
        "command continues from there."
    )


@contextlib.contextmanager
def _waited_for(store: Store, watchdog: Watchdog) -> Iterator[None]:
    """Waits at the end for saves and uploads, unless Ctrl-C was pressed twice."""

    def close():
        with watchdog.doing("waiting for saves and uploads"):
            store.close()

    with contextlib.ExitStack() as stack:
        stack.callback(close)
        try:
            yield
        except KeyboardInterrupt:
            stack.pop_all()
            raise


@contextlib.contextmanager
def _disk_full_explained(store: Store) -> Iterator[None]:
    """Explains a full disk wherever it is met: metrics and logs need space too."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise store.disk_full() from error


def _changed_versions(facts: dict[str, Any], config: Config, program: Program) -> str:
    """Returns the versions that a checkpoint was made with and that differ now, as text."""
    today = manifest.facts(config, program.mesh.shape, {}, None)["versions"]
    return ", ".join(
        f"{name} {version}"
        for name, version in facts["versions"].items()
        if today.get(name) != version
    )


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[signal.Signals]]:
    """Yields a list that receives SIGTERM and Ctrl-C; a second Ctrl-C interrupts at once.

    With several processes jax handles SIGTERM and tells the others (`hosts.reached_stop`); Ctrl-C
    is passed on to it as SIGTERM.
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
