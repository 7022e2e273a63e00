"""What every thread is doing, written down when a run makes no progress: a hung collective says nothing by itself."""

import contextlib
import faulthandler
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO


class Watchdog:
    """A thread that writes the stacks of all threads to standard error and a file when no step has finished for some minutes, and again
    after as long; it stops nothing."""

    def __init__(self, minutes: float, file: Path, process: str):
        """minutes: 0 = never; process: such as "process 3 of 4"."""
        self._seconds, self._file, self._process = 60 * minutes, file, process
        self._doing, self._step, self._since = "in a step", 0, time.monotonic()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        if minutes:
            self._thread.start()

    def finished(self, step: int) -> None:
        """`step` steps are done."""
        self._step, self._since = step, time.monotonic()

    @contextlib.contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """The loop is busy with something that may last, such as "saving"; what it says of compiling tells a long wait from a hang."""
        before, self._doing = self._doing, what
        yield
        self._doing = before

    def close(self) -> None:
        """Ends the thread."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        reported = self._since
        while not self._stopped.wait(max(0.0, max(self._since, reported) + self._seconds - time.monotonic())):
            now = time.monotonic()
            if now - max(self._since, reported) < self._seconds:
                continue  # a step has finished meanwhile
            reported = now
            text = (
                f"watchdog: no step has finished for {(now - self._since) / 60:.1f} minutes. {self._process} has done {self._step} steps "
                f"and is {self._doing}. The stacks of its threads follow; they are in {self._file} too.\n"
            )
            _write(sys.__stderr__, text)  # the real one: a notebook's has no file behind it
            with self._file.open("a", encoding="utf-8") as file:
                _write(file, text)


def _write(stream: TextIO, text: str) -> None:
    stream.write(text)
    stream.flush()
    faulthandler.dump_traceback(stream, all_threads=True)
