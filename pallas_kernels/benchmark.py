"""Command line, timing and tables shared by the kernels' benchmarks.

With a GPU they measure times; without one they count the TPU compiler's static cycles.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

_MEMORY = 16 * 2**30  # bytes a subprocess may use


def main(
    description: str,
    tpu_rows: Callable[[list[str]], Iterable[dict[str, Any]]],
    gpu_rows: Callable[[], Iterable[dict[str, Any]]],
) -> None:
    """Runs a benchmark from the command line: prints one table, and writes it with --json.

    Args:
      description: one line, for --help.
      tpu_rows: (names of chips) -> rows of static cycles; used without a GPU.
      gpu_rows: () -> rows measured on the first GPU.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", help="a file for the same rows")
    parser.add_argument(
        "--chips", default="v5e,v5p,v6e", help="without a GPU: the TPUs to compile for"
    )
    values = parser.parse_args()
    rows = list(
        gpu_rows() if os.path.exists("/dev/nvidiactl") else tpu_rows(values.chips.split(","))
    )
    print(table(rows))
    if values.json:
        with open(values.json, "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=1)


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the rows as aligned text, one column per key; "-" for a key a row lacks."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns, *([_cell(row.get(column)) for column in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    )


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)


def in_subprocess(fn: Callable, *args: Any) -> Any:
    """Returns fn(*args) from a process of its own, or None if it raises or the process crashes.

    The reason is printed.  Of the process's standard error (the compiler's stack traces) only the
    first fatal line is shown.
    """
    spawn = multiprocessing.get_context("spawn")
    with (
        tempfile.NamedTemporaryFile("r", errors="replace") as log,
        ProcessPoolExecutor(1, spawn, initializer=_limit_process, initargs=(log.name,)) as pool,
    ):
        try:
            return pool.submit(fn, *args).result()
        except BrokenProcessPool:
            fatal = (line.partition("] ")[2].strip() for line in log if line.startswith("F"))
            reason = ": ".join(["the process crashed", *itertools.islice(fatal, 1)])
        # Rivals raise anything for what they do not support; the other rows are still wanted.
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
    print(f"{args}: {reason[:300]}")
    return None


def _limit_process(log: str) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    with open(log, "w") as file:
        os.dup2(file.fileno(), 2)


def median_ms(call: Callable, args: Iterable[Any], num_runs: int = 50) -> float:
    """Returns the median time of a jitted call in milliseconds.

    Calls are timed in batches of ten, which hides the host's launch overhead: num_runs batches, or
    at least three for as long as they take less than a second together.
    """
    import jax

    call, args = jax.jit(call), list(args)
    jax.block_until_ready(call(*args))
    times = []
    while len(times) < num_runs and (len(times) < 3 or 10 * sum(times) < 1):
        begin = time.perf_counter()
        for _ in range(10):
            out = call(*args)
        jax.block_until_ready(out)
        times.append((time.perf_counter() - begin) / 10)
    return 1e3 * statistics.median(times)


def rival_ms(rival: str, call: Callable, args: Iterable[Any]) -> float | None:
    """Returns `median_ms`, or None if the rival raises; the reason is printed."""
    try:
        return median_ms(call, args)
    except Exception as error:
        print(f"{rival}: {(str(error).splitlines() or [type(error).__name__])[0][:160]}")
        return None
