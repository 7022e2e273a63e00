"""The training loop: resume, step, log, evaluate, save; on one process or, in step, on all that the run was started as."""

import contextlib
import functools
import os
import signal
from collections.abc import Iterator

import jax

from hunyuan_jax.checkpoint.store import Store, claim_workdir, describe_workdir
from hunyuan_jax.config import Config, ConfigError, to_dict
from hunyuan_jax.data import loader
from hunyuan_jax.parallel import hosts
from hunyuan_jax.parallel.mesh import join_processes, make_mesh
from hunyuan_jax.tokenizer import load_tokenizer
from hunyuan_jax.train import evaluate
from hunyuan_jax.train import step as step_lib
from hunyuan_jax.train.log import Log
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
    log = Log(config, workdir)
    train = config.train
    program = build_program(config, make_mesh(config.mesh))
    train_step, eval_step = step_lib.make_train_step(program), step_lib.make_eval_step(program)
    sharding, batch_shape = step_lib.batch_sharding(program), (train.batch_size, train.seq_len)
    to_devices = functools.partial(hosts.global_batch, sharding=sharding, shape=batch_shape)
    rows = hosts.process_rows(sharding, batch_shape)
    with hosts.raised_by_all():
        tokenizer = load_tokenizer(config.data.tokenizer)
        if tokenizer.vocab_size > config.model.vocab_size:
            raise ConfigError(
                f"config.data.tokenizer = {config.data.tokenizer!r} has {tokenizer.vocab_size} ids; "
                f"config.model.vocab_size = {config.model.vocab_size} must be at least that."
            )
        opened = loader.open_corpus(config.data, tokenizer)
        order = loader.Order(opened, config.data, train)
        if hosts.is_first():
            claim_workdir(workdir, config)
        batches = loader.train_iterator(order, rows)
    corpus = opened.identity()
    hosts.require_same(config=to_dict(config), text=corpus, workdir=describe_workdir(workdir))

    # --- Resume, or start.
    store = Store(workdir, config.checkpoint.keep)
    first_step = store.latest_step() or 0
    if first_step:
        with log.time("restore"):
            state, position = store.restore(first_step, abstract_state(program))
    else:
        with hosts.raised_by_all():
            weights = read_weights(train.init_from, config.model) if train.init_from else None
        state, position = init_state(program, weights), None
    with hosts.raised_by_all():
        if position and position["corpus"] != corpus:
            raise ConfigError(
                f"the text of config.data has changed since {workdir} was started: it was {position['corpus']}, "
                f"now {corpus}. Restore the text, or use another --workdir."
            )
        if position:
            batches.set_state(position["batches"])
        validation = order.validation(train.eval_batches, rows)
        validation = evaluate.with_target_bytes(validation, tokenizer)
        log.open(first_step, program)
    log.print(f"data: {order}")

    # --- The loop proper.  Nothing here waits for the device except logging, evaluation and saving.
    with (
        contextlib.closing(log),
        contextlib.closing(batches),
        contextlib.closing(store),
        _stop_signals() as stop,
    ):
        if first_step >= train.num_steps:
            log.print(f"{workdir} is at step {first_step} of {train.num_steps} already; raise config.train.num_steps to go on.")
            return 0
        log.start(first_step, program)
        for step in range(first_step + 1, train.num_steps + 1):
            with log.time("data"):
                batch = next(batches)
            with log.running(step):
                state, metrics = train_step(state, to_devices(batch))
            log.step(step, metrics)
            if validation and (step % train.eval_every == 0 or step == train.num_steps):
                with log.time("evaluation"):
                    found = evaluate.evaluate(eval_step, state.params, map(to_devices, validation))
                log.validation(step, found)
            is_stopping = hosts.reached_stop(step, bool(stop))  # read once: a signal that comes while saving waits for the next step
            if step % config.checkpoint.every == 0 or step == train.num_steps or is_stopping:
                with log.time("checkpoint"):
                    store.save(step, state, {"batches": batches.get_state(), "corpus": corpus})
            if is_stopping:
                received = stop[0] if stop else signal.SIGTERM  # which may have come to another process
                log.stop(is_finished=step == train.num_steps)
                log.print(f"{received.name}: saved step {step}; the same command continues from there.")
                return 130 if received == signal.SIGINT else 0
        log.stop(is_finished=True)
    return 0


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
