"""Work on many tensors at once, in order, with a bar on a terminal and a line now and then
elsewhere.
"""

import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

# Each worker holds one tensor: two overlap reading, transposing and writing within twice the
# largest tensor.
_NUM_WORKERS = 2
_SECONDS_PER_LINE = 10.0

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(
    work: Callable[[Item], Result], items: Iterable[Item]
) -> Iterator[tuple[Item, Result]]:
    """(item, work(item)) in the order of items; no more results exist at a time than there are
    workers.
    """
    with ThreadPoolExecutor(_NUM_WORKERS) as pool:
        running: deque = deque()
        try:
            for item in items:
                if len(running) == _NUM_WORKERS:
                    first, future = running.popleft()
                    yield first, future.result()
                    del future
                running.append((item, pool.submit(work, item)))
            while running:
                first, future = running.popleft()
                yield first, future.result()
                del future
        finally:
            for _, future in running:
                future.cancel()


class Meter:
    """Bytes done of a total, shown on standard error."""

    def __init__(self, title: str, total: int):
        self.done = 0
        self._title, self._total = title, total
        self._begin = self._last = time.monotonic()
        self._bar: Progress | None = None
        if sys.stderr.isatty():
            from rich.console import Console

            columns = (
                TextColumn(title),
                BarColumn(),
                DownloadColumn(),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=Console(stderr=True))

    def __enter__(self) -> "Meter":
        if self._bar:
            self._bar.start()
            self._task = self._bar.add_task(self._title, total=self._total)
        return self

    def __exit__(self, *error) -> None:
        if self._bar:
            self._bar.stop()
        elif error[0] is None:
            self._line()

    def add(self, num_bytes: int) -> None:
        """Counts bytes that are done."""
        self.done += num_bytes
        if self._bar:
            self._bar.advance(self._task, num_bytes)
        elif time.monotonic() - self._last > _SECONDS_PER_LINE:
            self._last = time.monotonic()
            self._line()

    def _line(self) -> None:
        seconds = max(time.monotonic() - self._begin, 1e-6)
        speed = self.done / seconds
        left = (
            f", {(self._total - self.done) / speed:.0f} s left"
            if self.done < self._total and speed
            else ""
        )
        print(
            f"{self._title}: {self.done / 1e9:.3f} of {self._total / 1e9:.3f} GB in {seconds:.1f} "
            f"s, {speed / 1e9:.2f} GB/s{left}",
            file=sys.stderr,
            flush=True,
        )
