"""What the kernels' benchmarks share: the choice between a GPU's clock and the TPU compiler's
cycles, rivals kept apart, one table.
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

_MEMORY = 16 * 2**30  # bytes that a compilation may take


def main(
    description: str,
    tpu_rows: Callable[[list[str]], Iterable[dict[str, Any]]],
    gpu_rows: Callable[[], Iterable[dict[str, Any]]],
) -> None:
    """The command line of a benchmark: prints one table, and writes it as JSON if asked to.

    Args:
      description: one line for --help.
      tpu_rows: (names of chips) -> rows made from static cycles, where there is no GPU.
      gpu_rows: rows measured on the first GPU.
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
    """The rows as aligned text, a column for each key; what a row lacks is a dash."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns, *([_cell(row.get(column)) for column in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    )


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)


def apart(fn: Callable, *args: Any) -> Any:
    """fn(*args) in a process of its own, or None, with the reason printed, if it raises or libtpu
    ends the process.

    What the process writes to standard error, such as the compiler's stack traces, is not shown
    but for the reason of its end.
    """
    spawn = multiprocessing.get_context("spawn")
    with (
        tempfile.NamedTemporaryFile("r", errors="replace") as log,
        ProcessPoolExecutor(1, spawn, initializer=_set_apart, initargs=(log.name,)) as pool,
    ):
        try:
            return pool.submit(fn, *args).result()
        except BrokenProcessPool:
            fatal = (line.partition("] ")[2].strip() for line in log if line.startswith("F"))
            reason = ": ".join(["the process ended", *itertools.islice(fatal, 1)])
        # Whatever a rival raises for what it does not support, the other rows are wanted.
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
    print(f"{args}: {reason[:300]}")
    return None


def _set_apart(log: str) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    with open(log, "w") as file:
        os.dup2(file.fileno(), 2)


def median_ms(call: Callable, args: Iterable[Any], num_runs: int = 50) -> float:
    """The median time of a call on the device, in batches of ten to hide what the host takes to
    launch one.
    """
    import jax

    call, args = jax.jit(call), list(args)
    jax.block_until_ready(call(*args))
    times = []
    for _ in range(num_runs):
        begin = time.perf_counter()
        for _ in range(10):
            out = call(*args)
        jax.block_until_ready(out)
        times.append((time.perf_counter() - begin) / 10)
    return 1e3 * statistics.median(times)


def rival_ms(rival: str, call: Callable, args: Iterable[Any]) -> float | None:
    """`median_ms`, or None, with the reason printed, for what a rival does not support."""
    try:
        return median_ms(call, args)
    except Exception as error:
        print(f"{rival}: {(str(error).splitlines() or [type(error).__name__])[0][:160]}")
        return None
