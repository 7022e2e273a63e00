"""How a run ends: signals, the last save, a full disk."""

import contextlib
import errno
import os
import signal
import time
from collections.abc import Iterator

import jax

from hunyuan_jax.checkpoint.store import Store
from hunyuan_jax.runlog.log import Log
from hunyuan_jax.runlog.watchdog import Watchdog


@contextlib.contextmanager
def stop_signals() -> Iterator[list[signal.Signals]]:
    """Yields a list to which SIGTERM and Ctrl-C are appended; a second signal interrupts at once.

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


def wait_for_save(received: signal.Signals, step: int, store: Store, log: Log) -> None:
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
def closing_store(store: Store, watchdog: Watchdog) -> Iterator[None]:
    """Waits at the end for saves and uploads, unless the block raised KeyboardInterrupt."""

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
def full_disk_explained(store: Store) -> Iterator[None]:
    """Turns an OSError of a full disk into the store's ConfigError.

    Metrics and logs need space too, so any write of the block may raise it.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise store.disk_full() from error
