"""Where the wall time of a run goes: the share spent in productive steps and the causes of the
rest, over all restarts of a workdir.

DIR/goodput.jsonl is the ledger, one JSON object a line, never rewritten:

  {"time": t, "start": n}                                a process took up the work after step n
  {"time": t, "step": n, "seconds": {cause: seconds}}    what passed since the row before; n steps
  are done {"time": t, "step": n, "end": "finished" | "stopped"}  it ended on purpose

`time` is the wall clock when the process started plus what a monotonic clock has counted since: a
change of the wall clock inside a process changes nothing, and between two processes it cannot make
a time negative.  Imports no jax.
"""

import contextlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from hunyuan_jax.runlog.metrics import read_objects

FILE = "goodput.jsonl"
PRODUCTIVE = "productive"

# Every second has one of these; the order is that of the report.
CAUSES = {
    PRODUCTIVE: "training steps that the run still has",
    "startup": "from the start of a process to its first step: mesh, text, initial state",
    "restore": "reading a checkpoint",
    "compile": "tracing and compiling the first step of a process",
    "skipped": "training steps whose loss or gradient was refused, so that they changed nothing",
    "data": "waiting for a batch while the devices had nothing to do",
    "evaluation": "validation",
    "checkpoint": "saving, as far as the loop waits for it",
    "profile": "starting and writing a trace",
    "repeated": "steps after the newest checkpoint that a crash lost, and that were done again",
    "down": "from the last sign of life of a process to the start of the next, unless the run was "
    "finished",
}


class Ledger:
    """Totals of a ledger's rows, in the order in which they were written."""

    def __init__(self, rows: Iterable[dict[str, Any]] = ()):
        self.seconds: Counter[str] = Counter()
        self.num_starts = 0
        self._last: dict[str, Any] | None = None
        self._step = 0
        self._productive: list[tuple[int, int, float]] = []  # (step before, step after, seconds)
        for row in rows:
            self.add(row)

    def add(self, row: dict[str, Any]) -> None:
        """Adds a row to the totals."""
        if "start" in row:
            self.num_starts += 1
            if self._last is not None and self._last.get("end") != "finished":
                self.seconds["down"] += max(0.0, row["time"] - self._last["time"])
            self._lose_steps_after(row["start"])
            self._step = row["start"]
        for cause, seconds in row.get("seconds", {}).items():
            self.seconds[cause] += seconds
            if cause == PRODUCTIVE:
                self._productive.append((self._step, row["step"], seconds))
        self._step = row.get("step", self._step)
        self._last = row

    @property
    def total(self) -> float:
        """Wall seconds so far: the sum over all causes."""
        return sum(self.seconds.values())

    @property
    def goodput(self) -> float:
        """Share of the wall time in productive steps; 0 before there is any."""
        return self.seconds[PRODUCTIVE] / self.total if self.total else 0.0

    def _lose_steps_after(self, step: int) -> None:
        while self._productive and self._productive[-1][1] > step:
            first, last, seconds = self._productive.pop()
            lost = seconds * (last - max(first, step)) / max(last - first, 1)
            self.seconds[PRODUCTIVE] -= lost
            self.seconds["repeated"] += lost
            if first < step:
                self._productive.append((first, step, seconds - lost))


class Goodput:
    """The clock of one process: every moment belongs to one cause, and the ledger is written as
    the run goes on.

    Starts in "startup"; nothing is written before `start`.
    """

    def __init__(
        self, now: Callable[[], float] = time.perf_counter, wall: Callable[[], float] = time.time
    ):
        self._now, self._offset = now, wall() - now()
        self._cause, self._since = "startup", now()
        self._spent: Counter[str] = Counter()
        self._file = None
        self.ledger = Ledger()

    def start(self, workdir: str | os.PathLike | None, step: int) -> None:
        """Opens the workdir's ledger, resuming at `step`.

        Without a workdir it is kept in memory only: process 0 writes for all.
        """
        if workdir is not None:
            path = Path(workdir) / FILE
            self.ledger = Ledger(read_rows(path))
            is_cut = path.is_file() and path.read_bytes()[-1:] not in (
                b"",
                b"\n",
            )  # by a crash in the middle of a row
            self._file = path.open("a", encoding="utf-8")
            self._file.write("\n" if is_cut else "")
        self._add({"time": self._offset + self._now() - self._elapsed(), "start": step})
        self.flush(step)

    def switch(self, cause: str, spent_on: str | None = None) -> None:
        """Counts the time from here on as `cause`.

        The time since the last switch is counted as `spent_on`, by default as the cause named
        then.
        """
        now = self._now()
        self._spent[spent_on or self._cause] += now - self._since
        self._cause, self._since = cause, now

    @contextlib.contextmanager
    def time(self, cause: str) -> Iterator[None]:
        """Counts the time inside as `cause`, except that of an inner `time`."""
        outer = self._cause
        self.switch(cause)
        try:
            yield
        finally:
            self.switch(outer)

    def spent(self, *causes: str) -> float:
        """Seconds of some causes since the last `flush`, as of the last `switch`."""
        return sum(self._spent[cause] for cause in causes)

    def flush(self, step: int, skipped: float = 0.0) -> None:
        """Writes a row after `step` steps, none of them still running.

        `skipped` is the share of the steps since the last row that were skipped.
        """
        self.switch(self._cause)
        spent, self._spent = self._spent, Counter()
        spent["skipped"] = skipped * spent[PRODUCTIVE]
        spent[PRODUCTIVE] -= spent["skipped"]
        self._add(
            {
                "time": self._offset + self._since,
                "step": step,
                "seconds": {k: round(v, 6) for k, v in spent.items() if v > 0},
            }
        )

    def end(self, step: int, reason: str) -> None:
        """Writes the last row; `reason` is "finished" or "stopped"."""
        self.flush(step)
        self._add({"time": self._offset + self._since, "step": step, "end": reason})

    def close(self) -> None:
        """Closes the file.  Time that was not flushed is lost: the next process counts it as
        "down".
        """
        if self._file:
            self._file.close()

    def _elapsed(self) -> float:
        return sum(self._spent.values()) + self._now() - self._since

    def _add(self, row: dict[str, Any]) -> None:
        self.ledger.add(row)
        if self._file:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Returns the rows of a ledger; [] if there is none.  Damaged rows are left out, such as one
    that a crash cut off.
    """
    return [row for row in read_objects(path) if _is_row(row)]


def _is_row(row: dict[str, Any]) -> bool:
    seconds = row.get("seconds", {})
    numbers = [
        row.get("time"),
        row.get("start", row.get("step")),
        *(seconds.values() if isinstance(seconds, dict) else [None]),
    ]
    return all(isinstance(number, int | float) for number in numbers)
