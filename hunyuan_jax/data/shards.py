"""Tokenises one unit of text into token shards; the output bytes depend on the text alone.

A unit is a list of spans with about `shard_bytes` of text.  A compressed file is a unit of its
own.  Whenever `shard_bytes` of text are read, their tokens are sorted by the hash of the
document's name and written as a shard.  Memory is therefore a few times `shard_bytes`, for files
and documents of any size.  A shard is written under a temporary name and renamed when complete.
The unit's index (`unfinished/UNIT.npy`) and then its report (`unfinished/UNIT.json`) are written
last: a unit with a report is done.
"""

import contextlib
import dataclasses
import fcntl
import functools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hunyuan_jax.data import source, tokens
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.files import replacing
from hunyuan_jax.tokenizer import Tokenizer, load_tokenizer

LIMIT_OPTION = "--max_bad_fraction"

_TEMPORARY = ".tmp"


@dataclasses.dataclass(frozen=True)
class Job:
    """Options of `tokenize`."""

    input: str
    output: str
    tokenizer: str
    text_field: str = "text"
    max_bad_fraction: float = 0.01
    shard_bytes: int = 2**27  # of text


def run_unit(
    job: Job,
    number: int,
    spans: Sequence[source.Span],
    others: Callable[[], tuple[int, int]] = lambda: (0, 0),
    progress: Callable[[source.Tally], None] = lambda tally: None,
) -> None:
    """Writes the shards, index and report of a unit.

    Args:
      job: options.
      number: index of the unit.
      spans: text of the unit.
      others: returns (documents, bad rows) of the other units so far.
      progress: called after every piece.  An exception that it raises ends the unit.

    Raises:
      ConfigError: too many bad rows.
    """
    work, stem = Path(job.output) / tokens.WORK, f"{number:05d}"
    tokenizer = _tokenizer(job.tokenizer)
    tally = source.Tally(job.max_bad_fraction, LIMIT_OPTION, others)
    shards: list[dict[str, Any]] = []
    parts: list[np.ndarray] = []
    shard, written = _Shard(), 0
    num_tokens = 0

    def flush() -> None:
        if shard.records:
            name = f"{stem}-{len(shards):03d}.array_record"
            with finished(Path(job.output) / name, work) as path:
                parts.append(shard.write(path))
                size, digest = os.path.getsize(path), tokens.file_digest(path)
            shards.append(
                {
                    "file": name,
                    "num_pieces": len(shard.records),
                    "num_bytes": size,
                    "sha256": digest,
                }
            )

    for span in spans:
        for item in source.read(span, job.text_field):
            if isinstance(item, source.Bad):
                tally.add_bad(span.name, item)
                continue
            num_tokens += 1  # a document of n pairs has n + 1
            for piece, ids in enumerate(
                _pieces(tokens.document_ids(item, span.name, tokenizer, tally))
            ):
                shard.add(item.name, piece, ids)
                num_tokens += len(ids) - 1
                if tally.total.num_bytes - written >= job.shard_bytes:
                    flush()
                    shard, written = _Shard(), tally.total.num_bytes
                progress(tally)
    flush()
    index = np.concatenate([np.zeros((3, 0), np.uint64), *parts], axis=1)
    with finished(work / f"{stem}.npy", work) as path, open(path, "wb") as file:
        np.save(file, index)
    report = {
        "num_tokens": num_tokens,
        "shards": shards,
        "files": {name: dataclasses.asdict(counts) for name, counts in tally.files.items()},
    }
    with finished(work / f"{stem}.json", work) as path:
        path.write_text(json.dumps(report), encoding="utf-8")


def add_report(tally: source.Tally, report: dict[str, Any]) -> None:
    """Adds the counts of a unit's report."""
    for name, counts in report["files"].items():
        tally.add_file(name, source.FileCounts(**counts))


def read_report(job: Job, number: int) -> dict[str, Any] | None:
    """Returns the report of a unit, or None if it is not done."""
    path = Path(job.output) / tokens.WORK / f"{number:05d}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def finish(job: Job, num_units: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Writes index and manifest from the units' files and removes the folder `unfinished`.

    Returns:
      The manifest; it contains `settings`.

    Raises:
      ConfigError: too many bad rows in total, or no document.
    """
    output, work = Path(job.output), Path(job.output) / tokens.WORK
    reports = [read_report(job, number) for number in range(num_units)]
    tally = source.Tally(job.max_bad_fraction, LIMIT_OPTION)
    for report in reports:
        add_report(tally, report)
    tally.check()
    if not tally.total.num_documents:
        raise ConfigError(
            f"--input = {job.input} holds no usable document ({tally.total.num_bad} skipped: "
            f"{tally.total.first_bad or 'no rows'}); it needs UTF-8 text. Repair the files, or "
            f"set --text_field (now {job.text_field!r}) to the field with the text; remove "
            f"{job.output}."
        )
    shards = [shard for report in reports for shard in report["shards"]]
    with finished(output / tokens.INDEX, work) as path:
        _join(
            [work / f"{number:05d}.npy" for number in range(num_units)],
            sum(shard["num_pieces"] for shard in shards),
            path,
        )
        index_digest = tokens.file_digest(path)
    tokenizer = _tokenizer(job.tokenizer)
    manifest = {
        "kind": tokens.KIND,
        "format": tokens.FORMAT,
        "settings": settings,
        "tokenizer": {
            "name": job.tokenizer,
            "fingerprint": tokenizer.fingerprint(),
            "vocab_size": tokenizer.vocab_size,
        },
        "num_documents": tally.total.num_documents,
        "num_tokens": sum(report["num_tokens"] for report in reports),
        "num_bytes": tally.total.num_bytes,
        "num_bad": tally.total.num_bad,
        "index_sha256": index_digest,
        "shards": shards,
        "files": {
            name: dataclasses.asdict(counts) for name, counts in sorted(tally.files.items())
        },
    }
    with finished(output / tokens.MANIFEST, work) as path:
        path.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    remove_work(job)
    return manifest


def remove_work(job: Job) -> None:
    """Removes the folder `unfinished`."""
    work = Path(job.output) / tokens.WORK
    for path in work.glob("*"):
        path.unlink(missing_ok=True)
    with contextlib.suppress(FileNotFoundError):
        work.rmdir()


class _Shard:
    """The pieces of one shard, in memory."""

    def __init__(self):
        self.records: list[bytes] = []
        self._hashes: list[int] = []
        self._numbers: list[int] = []
        self._num_pairs: list[int] = []

    def add(self, name: str, number: int, ids: np.ndarray) -> None:
        """Adds a piece of a document."""
        self.records.append(tokens.pack_record(name, number, ids))
        self._hashes.append(tokens.name_hash(name))
        self._numbers.append(number)
        self._num_pairs.append(len(ids) - 1)

    def write(self, path: Path) -> np.ndarray:
        """Writes the pieces, sorted by the hash of their document's name.

        Returns:
          Pairs, hashes and numbers of the sorted pieces, uint64 [3, P].

        Raises:
          OSError: the shard cannot be written, for example because the disk is full.
        """
        from array_record.python.array_record_module import ArrayRecordWriter

        columns = np.array([self._num_pairs, self._hashes, self._numbers], np.uint64)
        order = np.argsort(columns[1], kind="stable")
        try:
            writer = ArrayRecordWriter(str(path), tokens.WRITER_OPTIONS)
            for i in order:
                writer.write(self.records[i])
            writer.close()
        except RuntimeError as error:
            raise OSError(" ".join(str(error).split())) from error
        return columns[:, order]


def _pieces(parts: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """Yields the ids of a document in pieces of PIECE_PAIRS + 1; the last may be shorter.

    Each piece begins with the last id of the piece before it.
    """
    waiting = np.zeros(0, np.uint8)
    for part in parts:
        waiting = np.concatenate([waiting, part]) if len(waiting) else part
        start = 0
        while len(waiting) - start > tokens.PIECE_PAIRS + 1:
            yield waiting[start : start + tokens.PIECE_PAIRS + 1]
            start += tokens.PIECE_PAIRS
        waiting = waiting[start:]
    yield waiting


def _join(paths: Sequence[Path], num_pieces: int, joined: Path) -> None:
    """Concatenates the indices of all units in a file, with pairs summed up to `ends`.

    The result is memory-mapped, so it may be larger than memory.
    """
    index = np.lib.format.open_memmap(joined, mode="w+", dtype=np.uint64, shape=(3, num_pieces))
    start, num_pairs = 0, np.uint64(0)
    for path in paths:
        part = np.load(path)
        stop = start + part.shape[1]
        index[0, start:stop] = num_pairs + np.cumsum(part[0], dtype=np.uint64)
        index[1:, start:stop] = part[1:]
        num_pairs += part[0].sum(dtype=np.uint64)
        start = stop
    index.flush()


@contextlib.contextmanager
def finished(path: Path, work: Path) -> Iterator[Path]:
    """Yields a temporary path in `work`, which is renamed to `path` when it is on disk.

    Raises:
      ConfigError: the file cannot be written.
    """
    temporary = work / f"{path.name}.{os.getpid()}{_TEMPORARY}"
    try:
        with replacing(path, temporary):
            yield temporary
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise ConfigError(
            f"{path} cannot be written ({error}). Make room or repair it; the same command "
            "continues."
        ) from error


@functools.cache
def _tokenizer(name: str) -> Tokenizer:
    return load_tokenizer(name)


def make_folder(job: Job) -> None:
    """Creates the output folder.

    Raises:
      ConfigError: it cannot be created, or holds something other than token shards.
    """
    output = Path(job.output)
    if output.is_dir() and any(output.iterdir()) and not tokens.is_shards(output):
        raise ConfigError(
            f"--output = {job.output} holds something other than token shards; give a new or "
            "empty folder."
        )
    try:
        (output / tokens.WORK).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"--output = {job.output} cannot be made ({error.strerror}); give a folder that can."
        ) from error


@contextlib.contextmanager
def alone(job: Job) -> Iterator[None]:
    """Locks the output folder, and removes the temporary files of a killed command.

    Raises:
      ConfigError: another command has the lock.
    """
    folder = os.open(job.output, os.O_RDONLY)
    try:
        try:
            # The system releases the lock when the process ends, however it ends.
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"another command is writing to --output = {job.output}; wait for it, or give "
                "another folder."
            ) from error
        for path in (Path(job.output) / tokens.WORK).glob(f"*{_TEMPORARY}"):
            path.unlink(missing_ok=True)
        yield
    finally:
        os.close(folder)
