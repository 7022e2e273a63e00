"""`python -m hunyuan_jax tokenize`: text to token shards with all cores of a machine.

The plan (`unfinished/plan.json`) cuts the input into units (shards.py).  Small files share a unit.
A large .jsonl is cut into byte ranges; the plan has the number of each range's first row.  The
same command continues a job that was killed.  A different job in the same folder is refused.
"""

import concurrent.futures
import contextlib
import dataclasses
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np

from hunyuan_jax.data import shards, source, tokens
from hunyuan_jax.data.shards import Job
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.progress import ProgressBar
from hunyuan_jax.tokenizer import load_tokenizer

_COMPRESSED_WEIGHT = 4  # estimated bytes of text per byte of a compressed file
_BLOCK = 2**20

# Spawned, not forked: the parent has threads.
_PROCESSES = multiprocessing.get_context("spawn")
_DOCUMENTS, _BAD, _BYTES = range(3)  # what a row of `counts` holds


@dataclasses.dataclass(frozen=True)
class Plan:
    """The units of a job."""

    settings: dict[str, Any]  # must not change between attempts
    units: list[list[source.Span]]


def tokenize(job: Job, num_workers: int) -> dict[str, Any]:
    """Runs the remaining units of a job with `num_workers` processes; returns the manifest.

    Raises:
      ConfigError: no text, too many bad rows, a worker died, the disk is full, or the output
        folder belongs to another job or command.
    """
    # One row of counts for earlier attempts, and one for each worker.  Each row has one writer, so
    # no lock is needed that a killed worker could hold.
    shared = _PROCESSES.RawArray("q", 3 * (num_workers + 1))
    next_row, is_stopped = _PROCESSES.Value("i", 1), _PROCESSES.RawValue("b", 0)
    arguments = (shared, next_row, is_stopped)
    with contextlib.ExitStack() as stack:
        with concurrent.futures.ProcessPoolExecutor(
            num_workers, _PROCESSES, _start_worker, arguments
        ) as pool:
            try:
                plan = prepare(job, pool.map)
                if plan is None:
                    return tokens.read_manifest(job.output)
                stack.enter_context(shards.alone(job))
                _run_units(job, plan, pool, _rows(shared))
            except BrokenProcessPool as error:
                raise ConfigError(
                    "a worker process has died, perhaps for lack of memory; the same command "
                    "continues. Lower --num_workers or --shard_mb if it happens again."
                ) from error
            finally:
                is_stopped.value = 1
                pool.shutdown(cancel_futures=True)
        return shards.finish(job, len(plan.units), plan.settings)


def prepare(job: Job, map_spans: Callable[..., Iterator[int]] = map) -> Plan | None:
    """Returns the plan of a job, new or from an earlier attempt; None if the job is done.

    Raises:
      ConfigError: no text, or the output folder belongs to another job.
    """
    spans = source.find_files(job.input, "--input")
    settings = {
        "input": job.input,
        "tokenizer": load_tokenizer(job.tokenizer).fingerprint(),
        "text_field": job.text_field,
        "shard_bytes": job.shard_bytes,
        "files": [[span.name, source.size_of(span.path)] for span in spans],
    }
    shards.make_folder(job)
    output, work = Path(job.output), Path(job.output) / tokens.WORK
    path = work / "plan.json"
    if (output / tokens.MANIFEST).is_file():
        _require_same(job, tokens.read_manifest(output)["settings"], settings)
        shards.remove_work(job)
        return None
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        _require_same(job, found["settings"], settings)
        return Plan(settings, [[source.Span(*span) for span in unit] for unit in found["units"]])
    plan = Plan(settings, _units(spans, job.shard_bytes, map_spans))
    with shards.finished(path, work) as temporary:
        temporary.write_text(
            json.dumps(
                {
                    "settings": settings,
                    "units": [[[*dataclasses.astuple(s)] for s in unit] for unit in plan.units],
                }
            )
        )
    return plan


def _require_same(job: Job, found: dict[str, Any], settings: dict[str, Any]) -> None:
    changed = [name for name, value in settings.items() if found[name] != value]
    if changed:
        raise ConfigError(
            f"--output = {job.output} was begun with other {', '.join(changed)}; give another "
            "folder, or remove this one to begin again."
        )


def _units(
    spans: list[source.Span], shard_bytes: int, map_spans: Callable[..., Iterator[int]]
) -> list[list[source.Span]]:
    """Groups the spans into units of about `shard_bytes`, in order.

    The ranges of a large .jsonl are units of their own.
    """
    units: list[list[source.Span]] = [[]]
    filled = 0
    for span in spans:
        size = source.size_of(span.path)
        if source.can_split(span.path) and size > shard_bytes:
            units += [[part] for part in _ranges(span, size, shard_bytes, map_spans)]
            units.append([])
            filled = 0
            continue
        weight = size * (1 if source.is_plain(span.path) else _COMPRESSED_WEIGHT)
        if units[-1] and filled + weight > shard_bytes:
            units.append([])
            filled = 0
        units[-1].append(span)
        filled += weight
    return [unit for unit in units if unit]


def _ranges(
    span: source.Span, size: int, step: int, map_spans: Callable[..., Iterator[int]]
) -> Iterator[source.Span]:
    """Yields ranges of `step` bytes of a .jsonl file.

    The first row of a range is the first row that begins in it.
    """
    print(f"counting the rows of {span.name}", file=sys.stderr, flush=True)
    starts = range(0, size, step)
    first_row = 1
    for start, num_lines in zip(
        starts,
        map_spans(_count_lines, [span.path] * len(starts), starts, [step] * len(starts)),
        strict=True,
    ):
        yield dataclasses.replace(
            span, start=start, stop=min(start + step, size), first_row=first_row
        )
        # A row after a line break that is the last byte of this range begins in the next.
        first_row += num_lines + (start == 0)


def _count_lines(path: str, start: int, length: int) -> int:
    """Returns the number of line breaks in [start - 1, start - 1 + length).

    The rows after them begin in [start, start + length).
    """
    first = max(start - 1, 0)
    left = start - 1 + length - first
    count = 0
    with source.open_binary(path) as file:
        file.seek(first)
        while left > 0 and (block := file.read(min(left, _BLOCK))):
            count += block.count(b"\n")
            left -= len(block)
    return count


def _run_units(
    job: Job, plan: Plan, pool: concurrent.futures.Executor, counts: np.ndarray
) -> None:
    """Runs the units that have no report yet, and shows the progress."""
    done = source.Tally(job.max_bad_fraction, shards.LIMIT_OPTION)
    left = []
    for number in range(len(plan.units)):
        report = shards.read_report(job, number)
        if report is None:
            left.append(number)
        else:
            shards.add_report(done, report)
    counts[0] = done.total.num_documents, done.total.num_bad, done.total.num_bytes
    futures = {pool.submit(_run_unit, job, number, plan.units[number]) for number in left}
    start, first_bytes = time.perf_counter(), int(counts[0, _BYTES])
    with ProgressBar("unit", len(plan.units), len(plan.units) - len(left)) as progress:
        while futures:
            finished, futures = concurrent.futures.wait(
                futures, timeout=0.2, return_when=concurrent.futures.FIRST_COMPLETED
            )
            for future in finished:
                future.result()
            total = counts.sum(0)
            speed = (total[_BYTES] - first_bytes) / (time.perf_counter() - start)
            progress.update(len(plan.units) - len(futures), _described(total, speed))


# --- in a worker ---


def _start_worker(shared: Any, next_row: Any, is_stopped: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with next_row.get_lock():
        _worker.row, next_row.value = next_row.value, next_row.value + 1
    _worker.counts, _worker.is_stopped = _rows(shared), is_stopped


def _end_with_parent() -> None:
    """Exits when the parent is killed; the worker would wait for work for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)


class _Worker:
    """State of a worker process: all counts, the index of its row, and the stop flag."""

    counts: np.ndarray
    row: int
    is_stopped: Any


_worker = _Worker()


class _StoppedError(Exception):
    """Another worker has failed, or the user pressed Ctrl-C."""


def _run_unit(job: Job, number: int, spans: list[source.Span]) -> None:
    counts, row = _worker.counts, _worker.row
    before = counts[row].copy()

    def others() -> tuple[int, int]:
        documents, bad, _ = np.delete(counts, row, axis=0).sum(0) + before
        return int(documents), int(bad)

    def progress(tally: source.Tally) -> None:
        total = tally.total
        counts[row] = before + np.array([total.num_documents, total.num_bad, total.num_bytes])
        if _worker.is_stopped.value:
            raise _StoppedError

    shards.run_unit(job, number, spans, others, progress)


def _rows(shared: Any) -> np.ndarray:
    return np.frombuffer(shared, np.int64).reshape(-1, 3)


# --- progress ---


def _described(counts: np.ndarray, speed: float) -> str:
    """Returns the text of the progress bar; `speed` is in bytes/s."""
    return (
        f"{counts[_DOCUMENTS]:,} documents, {counts[_BYTES] / 1e6:,.0f} MB, "
        f"{speed / 1e6:.1f} MB/s, {counts[_BAD]:,} bad rows"
    )
