"""Progress bars, and work on several items at a time with results in order."""

import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Self, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

# Each worker holds one tensor: two overlap reading, transposing and writing within twice the
# largest tensor.
_NUM_WORKERS = 2
_SECONDS_PER_LINE = 10.0

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(
    work: Callable[[Item], Result], items: Iterable[Item]
) -> Iterator[tuple[Item, Result]]:
    """Yields (item, work(item)) in the order of items; at most as many results exist at a time as
    there are workers.
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


class ProgressBar:
    """A live bar on standard error; lines of text where that is not a terminal.

    Both show a label, how much of the total is done, a text and the time left.
    """

    def __init__(
        self,
        label: str,
        total: int,
        done: int = 0,
        *,
        seconds_per_line: float = _SECONDS_PER_LINE,
        is_shown: bool = True,
    ):
        """label: such as "step"; done: of the total, before this process began.

        seconds_per_line: least time between two lines of text; 0 shows every update.
        """
        self._label, self._total, self._first = label, total, done
        self._begin, self._seconds_per_line = time.monotonic(), seconds_per_line
        self._next_line = self._begin + seconds_per_line
        console = Console(file=sys.stderr, quiet=not is_shown)
        self._is_live = console.is_terminal and is_shown
        self._bar = Progress(
            TextColumn("{task.fields[amount]}", markup=False, table_column=Column(no_wrap=True)),
            BarColumn(bar_width=None),  # what the texts leave of the terminal's width
            TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
            TimeRemainingColumn(compact=True, table_column=Column(no_wrap=True)),
            console=console,
            expand=True,
            disable=not self._is_live,
        )
        self._task = self._bar.add_task(
            "", total=total, completed=done, amount=f"{label} {self.amount(done)}"
        )
        self._bar.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def amount(self, done: int) -> str:
        """Returns how much is done of the total, as text."""
        return f"{done}/{self._total}"

    def update(self, done: int, text: str, seconds_left: float | None = None) -> None:
        """Shows the state of the work; the time left follows from the speed if not given."""
        now, amount = time.monotonic(), f"{self._label} {self.amount(done)}"
        self._bar.update(self._task, completed=done, description=text, amount=amount)
        if self._is_live or (now < self._next_line and done < self._total):
            return
        self._next_line = now + self._seconds_per_line
        if seconds_left is None:
            speed = (done - self._first) / max(now - self._begin, 1e-6)
            seconds_left = (self._total - done) / speed if speed else math.inf
        is_known = math.isfinite(seconds_left)
        left = f"  {seconds_left // 60:.0f}:{seconds_left % 60:02.0f} left" if is_known else ""
        self.print(f"{amount}  {text}{left}")

    def print(self, text: str) -> None:
        """Shows a line that stays, above the live one."""
        self._bar.console.print(text, highlight=False, markup=False, soft_wrap=not self._is_live)

    def close(self) -> None:
        """Leaves the terminal as it was."""
        self._bar.stop()


class Meter(ProgressBar):
    """A progress bar over bytes, with their speed."""

    def __init__(self, label: str, total: int):
        self._done = 0
        super().__init__(label, total)

    def amount(self, done: int) -> str:
        """Returns gigabytes done of the total."""
        return f"{done / 1e9:.3f}/{self._total / 1e9:.3f} GB"

    def add(self, num_bytes: int) -> None:
        """Counts bytes that are done."""
        self._done += num_bytes
        seconds = max(time.monotonic() - self._begin, 1e-6)
        self.update(self._done, f"{self._done / seconds / 1e9:.2f} GB/s")
