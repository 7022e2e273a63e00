"""The training loop: resume, step, log, evaluate, save.

Every process of a run executes it in lock-step.
"""

import contextlib
import dataclasses
import functools
import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from hunyuan_jax import malloc
from hunyuan_jax.checkpoint import manifest
from hunyuan_jax.checkpoint.owner import owned
from hunyuan_jax.checkpoint.store import (
    Store,
    claim_workdir,
    describe_workdir,
    require_same_run,
)
from hunyuan_jax.config import Config, ScheduleConfig, from_dict, to_dict, without_effect
from hunyuan_jax.data.stream import Batch, BatchIterator, DataStream
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.files import user_path
from hunyuan_jax.model.count import count
from hunyuan_jax.optim.schedule import build_schedule
from hunyuan_jax.parallel import hosts, settings
from hunyuan_jax.parallel.mesh import join_processes, make_mesh
from hunyuan_jax.runlog.log import Log, Work
from hunyuan_jax.runlog.watchdog import Watchdog
from hunyuan_jax.tokenizer import load_tokenizer
from hunyuan_jax.train import step as step_lib
from hunyuan_jax.train import stop as stop_lib
from hunyuan_jax.train.evaluate import evaluate
from hunyuan_jax.train.objective import BuildObjective
from hunyuan_jax.train.pretrain import Pretrain
from hunyuan_jax.train.skipped_steps import SkippedSteps
from hunyuan_jax.train.start import keep_files, read_weights
from hunyuan_jax.train.state import (
    Program,
    TrainState,
    build_program,
    convert,
    describe_base,
    from_items,
    init_state,
    not_finite,
    to_items,
    used_params,
    with_state_dtype,
)


def run(
    config: Config, workdir: str | os.PathLike, build_objective: BuildObjective = Pretrain
) -> int:
    """Trains to config.train.num_steps, from the newest checkpoint of workdir if there is one.

    SIGTERM and Ctrl-C save and stop all processes, whichever of them receives the signal.  The
    same command then continues.

    Returns:
      The exit status: 130 after Ctrl-C, else 0.

    Raises:
      ConfigError: something the user must change.
    """
    workdir = user_path(workdir, "--workdir")
    join_processes()
    process = f"process {jax.process_index()} of {jax.process_count()}"
    stacks = Path(workdir) / f"stacks-{jax.process_index()}.txt"
    with (
        settings.stated(),
        _owned_together(workdir) as require_owner,
        contextlib.closing(Watchdog(config.train.watchdog_minutes, stacks, process)) as watchdog,
    ):
        trainer = _Trainer(config, workdir, build_objective, watchdog, require_owner)
        trainer.start()
        return trainer.train()


@contextlib.contextmanager
def _owned_together(workdir: str | os.PathLike) -> Iterator[Callable[[], None]]:
    """As `owned`, by process 0 for all."""
    with contextlib.ExitStack() as stack:
        require_owner = _nothing
        with hosts.fail_together():
            if hosts.is_first():
                report = functools.partial(print, file=sys.stderr, flush=True)
                require_owner = stack.enter_context(owned(workdir, report))
        yield require_owner


def _nothing() -> None:
    """The other processes have nothing to look at."""


class _Trainer:
    """One process of a run: its text, checkpoints, log and train state."""

    def __init__(
        self,
        config: Config,
        workdir: str | os.PathLike,
        build_objective: BuildObjective,
        watchdog: Watchdog,
        require_owner: Callable[[], None],
    ):
        """Checks what can fail quickly before anything slow: the mesh, the text, the workdir."""
        self._config, self._workdir, self._watchdog = config, workdir, watchdog
        self._require_owner = require_owner
        self._log = Log(config, workdir)
        self._program = program = build_program(config, make_mesh(config.mesh), build_objective)
        self._rows, self._to_devices = step_lib.feed(program)
        self._stream, self._batches = self._open_text()
        self._text = self._stream.identity()
        if config.train.num_epochs:
            self._plan_epochs()
        self._train_step = step_lib.make_train_step(self._program)
        self._eval_step = step_lib.make_eval_step(self._program)
        hosts.require_same(
            config=to_dict(self._config), text=self._text, workdir=describe_workdir(workdir)
        )
        self._store = Store(workdir, config.checkpoint, self._log.warn)

    def _open_text(self) -> tuple[DataStream, BatchIterator]:
        config = self._config
        with hosts.fail_together(), self._watchdog.doing("reading its text"):
            tokenizer = load_tokenizer(config.data.tokenizer)
            if tokenizer.vocab_size > config.model.vocab_size:
                raise ConfigError(
                    f"config.data.tokenizer = {config.data.tokenizer!r} has "
                    f"{tokenizer.vocab_size} ids; config.model.vocab_size = "
                    f"{config.model.vocab_size} must be at least that."
                )
            stream = self._program.objective.open_stream(tokenizer)
            if hosts.is_first():
                require_same_run(self._workdir, config)
            return stream, self._program.objective.batches(stream, self._rows)

    def _plan_epochs(self) -> None:
        """Sets config.train.num_steps to that of train.num_epochs."""
        train, objective = self._config.train, self._program.objective
        num_rows = train.num_epochs * self._stream.rows_per_epoch
        num_steps = max(1, math.ceil(num_rows / train.batch_size))
        self._config = dataclasses.replace(
            self._config, train=dataclasses.replace(train, num_steps=num_steps)
        )
        self._log.set_config(self._config)
        self._program = build_program(self._config, self._program.mesh, lambda _: objective)

    # --- Start-up

    def start(self) -> None:
        """Restores the newest checkpoint, or initialises the train state; opens the log.

        Raises:
          ConfigError: the checkpoint is of another run or text, or all checkpoints are damaged.
        """
        objective = self._program.objective
        with self._watchdog.doing("preparing its data"):
            objective.prepare(
                self._program,
                os.fspath(self._workdir),
                lambda: self._initial_state().params,
            )
            with hosts.fail_together():
                self._constants = objective.read_constants(self._program.mesh)
        with self._watchdog.doing("restoring a checkpoint"):
            restored = self._restored()
        if restored is None:
            self._first_step, self._state, facts = 0, self._initial_state(), None
        else:
            self._first_step, self._state, facts = restored
        self._watchdog.finished(self._first_step)
        self._require_finite(facts is not None)
        with hosts.fail_together():
            if facts:
                self._batches.set_state(facts["position"]["batches"])
            self._validation = self._stream.validation(self._config.train.eval_batches, self._rows)
            if hosts.is_first():
                if not facts:
                    keep_files(self._workdir, self._config)
                claim_workdir(self._workdir, self._config)
            self._log.open(
                self._first_step,
                self._program.mesh,
                self._program.schedule,
                _work(self._program),
            )
        self._log.print(f"data: {self._stream}")
        if self._config.model.lora.quantize != "none":
            self._log.print(describe_base(self._program, self._state.params))
        for line in without_effect(self._config):
            self._log.print(line)
        for line in self._changes(facts) if facts else ():
            self._log.print(line)
        self._num_looks, self._is_stopping = 0, False
        # A signal has ended the validation of the step that was saved then.
        self._owes_validation = bool(facts) and facts["validation_loss"] is None
        self._skipped = SkippedSteps(self._config, self._documents_of, self._log.print)
        self._saves = _Saves(self._config)

    def _restored(self) -> tuple[int, TrainState, manifest.Facts] | None:
        """Returns (steps done, state, facts) of the newest good checkpoint; None if there is
        none.
        """

        def target_of(facts):
            manifest.require_same_run(
                facts["fixed"], self._config, f"the newest checkpoint of {self._workdir} was"
            )
            if (before := facts["position"]["corpus"]) != self._text:
                raise ConfigError(
                    f"the text of config.data has changed since {self._workdir} was started: it "
                    f"was {before}, now {self._text}. Restore the text, or use another --workdir."
                )
            return to_items(with_state_dtype(self._program, facts["state_dtype"]).state)

        with self._log.time("restore"):
            restored = self._store.restore_newest(target_of)
        if restored is None:
            return None
        step, items, facts = restored
        state = from_items(items)
        state_dtype = self._config.optimizer.state_dtype
        if facts["state_dtype"] == state_dtype:
            return step, state, facts
        self._log.print(
            f"the state of step {step} is converted from {facts['state_dtype']} to {state_dtype}."
        )
        return step, convert(self._program, state), facts

    def _initial_state(self) -> TrainState:
        config = self._config
        with self._watchdog.doing("making its first state"):
            if not config.train.init_from:
                weights = self._program.objective.initial_weights(self._program.mesh)
                return init_state(self._program, weights)
            with hosts.fail_together():
                weights = read_weights(config.train.init_from, config.model, self._program.mesh)
            return init_state(self._program, weights)

    def _require_finite(self, is_restored: bool) -> None:
        init_from = self._config.train.init_from
        if not is_restored and not init_from:
            return
        if names := not_finite(self._state.params):
            where = (
                f"the checkpoint of step {self._first_step} in {self._workdir}"
                if is_restored
                else f"config.train.init_from = {init_from!r}"
            )
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ConfigError(
                f"{where} holds values that are not finite, in {', '.join(names[:3])}{more}; "
                "every step would be skipped. Start from other weights."
            )

    def _changes(self, facts: manifest.Facts) -> Iterator[str]:
        """Yields a line for each change since the checkpoint that acts on the numbers."""
        if changed := self._changed_versions(facts):
            yield (
                f"step {self._first_step} was made with {changed}: the losses from here may "
                "differ in their last bits."
            )
        for name, (before, now) in manifest.changed_fields(facts, self._config).items():
            if name == "train.init_from":
                yield (
                    f"config.train.init_from = {now!r} has no effect: the run continues from its "
                    f"step {self._first_step}. Use another --workdir to start from other weights."
                )
            elif name != "optimizer.state_dtype":  # its conversion has been said
                yield (
                    f"config.{name} is {now!r} from here on; up to step {self._first_step} it was "
                    f"{before!r}."
                )
        if line := self._changed_rate(facts):
            yield line

    def _changed_rate(self, facts: manifest.Facts) -> str:
        """Returns a line if the learning rate of the next step is not the one that was planned
        when the checkpoint was saved, else "".
        """
        if "schedule" not in facts:
            return ""  # an earlier version saved it
        step, config = int(self._state.guard.num_accepted), self._config
        before = build_schedule(from_dict(ScheduleConfig, facts["schedule"]), facts["num_steps"])
        planned, now = float(before(step)), float(self._program.schedule(step))
        if math.isclose(planned, now, rel_tol=1e-6):
            return ""
        length = facts["schedule"]["num_steps"] or facts["num_steps"]
        return (
            f"the learning rate of the next step is {now:.4g}; the plan of the checkpoint (step "
            f"{self._first_step}, planned for {length} steps) had {planned:.4g}. config.schedule "
            f"is planned anew over {config.schedule.num_steps or config.train.num_steps} steps. "
            "To keep the old plan, whose last learning rate then stays, stop now, set "
            f"config.schedule.num_steps = {length}, and change nothing else of it."
        )

    def _changed_versions(self, facts: manifest.Facts) -> str:
        """Returns the versions and the mesh of a checkpoint that differ now, as text."""
        today = manifest.facts(self._config, self._program.mesh.shape, {}, None)
        return ", ".join(
            f"{name} {value}"
            for kind in ("versions", "mesh")
            for name, value in facts[kind].items()
            if today[kind].get(name) != value
        )

    def _documents_of(self, step: int) -> list[str]:
        """Returns SOURCE/NAME of the documents in the batch of `step` (from 1)."""
        batch = self._stream.describe(step - 1)["rows"]
        return [
            f"{row['source']}/{document['name']}" for row in batch for document in row["documents"]
        ]

    # --- Training

    def train(self) -> int:
        """Trains to the last step, or until a signal; returns the exit status.

        Nothing here waits for the device except logging, evaluation and saving.
        """
        num_steps = self._config.train.num_steps
        with (
            stop_lib.full_disk_explained(self._store),
            contextlib.closing(self._log),
            contextlib.closing(self._batches),
            stop_lib.closing_store(self._store, self._watchdog),
            stop_lib.stop_signals() as signals,
        ):
            owes = self._owes_validation and self._is_validated(self._first_step)
            if self._first_step >= num_steps and not owes:
                self._log.print(
                    f"{self._workdir} is at step {self._first_step} of {num_steps} already; raise "
                    "config.train.num_steps to go on."
                )
                return 0
            self._log.start(
                self._first_step, int(self._state.guard.num_skipped), self._program.mesh
            )
            if owes:
                self._evaluate(self._first_step, signals)
            for step in range(self._first_step + 1, num_steps + 1):
                if self._run_step(step, signals):
                    # Another process may have received the signal.
                    received = signals[0] if signals else signal.SIGTERM
                    self._log.stop(is_finished=step == num_steps)
                    stop_lib.wait_for_save(received, step, self._store, self._log)
                    return 130 if received == signal.SIGINT else 0
            self._log.stop(is_finished=True)
            self._log.print(self._next_commands())
        return 0

    def _next_commands(self) -> str:
        """What to type after a finished run."""
        folder = shlex.quote(os.fspath(self._workdir))
        objective = self._config.objective
        is_of_text = objective.name == "distill" and objective.distill.rows == "text"
        if objective.name != "pretrain" and not is_of_text:
            return (
                f"done; it answers:     python -m hunyuan_jax chat --checkpoint={folder}\n"
                f"      its curves:      python -m hunyuan_jax report --workdir={folder}\n"
                f"      official folder: python -m hunyuan_jax export --checkpoint={folder} "
                f"--output=FOLDER"
            )
        prompt = "def " if self._config.data.source == "stdlib" else "The "
        return (
            f"done; it writes:       python -m hunyuan_jax generate --checkpoint={folder} "
            f'--prompt="{prompt}"\n'
            f"      its curves:      python -m hunyuan_jax report --workdir={folder}\n"
            f"      official folder: python -m hunyuan_jax export --checkpoint={folder} "
            f"--output=FOLDER"
        )

    def _run_step(self, step: int, signals: list[signal.Signals]) -> bool:
        """Runs one step, then logs, evaluates and saves if due.

        Returns:
          Whether the run stops after this step because a process received a signal.
        """
        metrics = self._update(step)
        is_logged = self._log.step(step, metrics)
        self._skipped.add(step, metrics)
        validation_loss = self._evaluate(step, signals)
        # Read once: a signal that arrives while saving waits for the next step.
        is_stopping = self._looks_for_stop(signals)
        is_saving = self._is_saving(step, is_logged, validation_loss) or is_stopping
        if is_logged or is_saving:
            with hosts.fail_together():
                self._require_owner()
                self._skipped.report()
                self._store.check()
                if is_saving:
                    self._store.require_room()
        if is_saving:
            self._save(step, validation_loss)
        self._watchdog.finished(step)
        return is_stopping

    def _update(self, step: int) -> dict[str, jax.Array]:
        """Dispatches the train step on the next batch; returns its metrics."""
        with self._log.time("data"), self._watchdog.doing("waiting for a batch"):
            self._batches.follow(self._state)
            batch = next(self._batches)
        is_first = step == self._first_step + 1
        doing = "compiling its first step" if is_first else "in a step"
        with self._log.running(step), self._watchdog.doing(doing):
            batch = self._placed(batch)
            if is_first:
                # Before it runs, so that it does not run beside the memory that compiling used.
                self._train_step = self._train_step.lower(self._state, batch).compile()
                malloc.trim()
            self._state, metrics = self._train_step(self._state, batch)
        return metrics

    def _placed(self, batch: Batch) -> dict[str, Any]:
        """Returns a batch as the steps take it."""
        return self._to_devices(batch) | self._constants

    def _is_validated(self, step: int) -> bool:
        train = self._config.train
        is_due = step % train.eval_every == 0 or step == train.num_steps
        return bool(self._validation) and is_due

    def _looks_for_stop(self, signals: list[signal.Signals]) -> bool:
        """Whether a process has received a signal; all processes call it equally often."""
        if not self._is_stopping:
            self._num_looks += 1
            self._is_stopping = hosts.reached_stop(self._num_looks, bool(signals))
        return self._is_stopping

    def _evaluate(self, step: int, signals: list[signal.Signals]) -> float | None:
        """Returns the validation loss if it is due after `step` and finite, else None.

        A signal ends it between two batches, without a result.
        """
        if not self._is_validated(step):
            return None
        with self._log.time("evaluation"), self._watchdog.doing("in validation"):
            found = evaluate(
                self._program.objective,
                self._eval_step,
                used_params(self._state),
                map(self._placed, self._validation),
                lambda: self._looks_for_stop(signals),
            )
        malloc.trim()  # returns what compiling the first validation used
        if found is None:
            self._log.print(f"step {step}: validation was stopped by a signal.")
            return None
        self._log.validation(step, found)
        loss = found["validation_loss"]
        return loss if math.isfinite(loss) else None

    # --- Saving

    def _is_saving(self, step: int, is_logged: bool, validation_loss: float | None) -> bool:
        """Whether a checkpoint is due: by steps, by time, as the best one or as the last one."""
        is_best = (
            self._config.checkpoint.keep_best > 0
            and validation_loss is not None
            and validation_loss < self._store.best_loss
        )
        is_last = step == self._config.train.num_steps
        return self._saves.is_due(step, is_logged) or is_best or is_last

    def _save(self, step: int, validation_loss: float | None) -> None:
        with self._log.time("checkpoint"), self._watchdog.doing("saving"):
            position = {"batches": self._batches.get_state(), "corpus": self._text}
            facts = manifest.facts(
                self._config, self._program.mesh.shape, position, validation_loss
            )
            self._store.save(step, to_items(self._state), facts)
        self._saves.saved()


def _work(program: Program) -> Work:
    """Returns what the log needs to turn seconds into tokens/s and MFU."""
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

        Waits for the other processes only if `is_logged`: the loop then waits for the devices
        anyway.
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
