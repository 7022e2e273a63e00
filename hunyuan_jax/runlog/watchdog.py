"""Writes the stacks of all threads when a run makes no progress.

A hung collective prints nothing by itself.
"""

import contextlib
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path


class Watchdog:
    """A thread that writes the stacks of all threads to standard error and a file.

    It does so when no step has finished for some minutes, start-up included, and again after each
    further such time.  It never stops the run.
    """

    def __init__(self, minutes: float, file: Path, process: str):
        """minutes: 0 = never; process: such as "process 3 of 4"."""
        self._seconds, self._file, self._process = 60 * minutes, file, process
        self._doing, self._step, self._since = "starting", 0, time.monotonic()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        if minutes:
            self._thread.start()

    def finished(self, step: int) -> None:
        """Records that `step` steps are done."""
        self._step, self._since = step, time.monotonic()

    @contextlib.contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Names what the run is busy with inside, such as "saving".

        The report shows it, so that a long compilation is not taken for a hang.
        """
        before, self._doing = self._doing, what
        try:
            yield
        finally:
            self._doing = before

    def close(self) -> None:
        """Ends the thread."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        reported = self._since
        while not self._stopped.wait(
            max(0.0, max(self._since, reported) + self._seconds - time.monotonic())
        ):
            now = time.monotonic()
            if now - max(self._since, reported) < self._seconds:
                continue  # a step has finished meanwhile
            reported = now
            text = (
                f"watchdog: no step has finished for {(now - self._since) / 60:.1f} minutes. "
                f"{self._process} has done {self._step} steps "
                f"and is {self._doing}. The stacks of its threads follow; they are in "
                f"{self._file} too.\n{_stacks()}"
            )
            print(text, file=sys.stderr, flush=True)
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("a", encoding="utf-8") as file:
                file.write(text)


def _stacks() -> str:
    """Returns the stacks of all other Python threads, by name; innermost call last."""
    # Not by faulthandler: it follows the frames of threads that go on running, and has crashed a
    # run that was only slow.
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = sys._current_frames()
    # Its own frame would hold `frames`, which holds it: what all threads had in their variables
    # would live until a garbage collection.
    del frames[threading.get_ident()]
    return "\n".join(
        f"Thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in frames.items()
    )
