"""Documents of text files: which files a source has, what is in them, and what cannot be used.

A document arrives in parts of about a million characters, cut where no token of any tokenizer here
can span (behind a line break), so that a file of any size takes little memory.  Imports neither
jax nor grain: a misspelled path is answered before anything slow is loaded.
"""

import codecs
import contextlib
import dataclasses
import fnmatch
import glob
import gzip
import io
import json
import os
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from hunyuan_jax import files
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.tokenizer.vocabulary import replace_surrogates

TEXT_SUFFIXES = (".txt", ".py", ".md")
SUFFIXES = (*TEXT_SUFFIXES, ".jsonl", ".parquet", ".array_record")
COMPRESSIONS = (".gz", ".zst")  # of text and .jsonl; the others compress inside

PART_CHARS = 2**20
MAX_ROW_BYTES = 2**26  # a longer .jsonl row is a bad one: parsing it takes several times its size
_TEXT_AT_ONCE = 2**26  # bytes; a longer text file is read twice, first to see that it is UTF-8
_BATCH_ROWS = 256  # of .parquet and .array_record

# Folders and files left out of a walk, as name patterns.  The standard library loses its tests and
# what depends on the machine that built it, so that one Python version gives one corpus; a user's
# folder loses .git, .venv and the like.
_STDLIB_SKIPPED = (
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "__pycache__",
    "config-*",
    "_sysconfigdata*",
)
_FOLDER_SKIPPED = (".*",)

_NUM_PATHS_SHOWN = 5


@dataclasses.dataclass(frozen=True, slots=True)
class Span:
    """A file, or the .jsonl rows that begin at bytes [start, stop) of it."""

    name: str  # relative to the source, with '/', printable
    path: str
    start: int = 0
    stop: int | None = None
    first_row: int = 1


@dataclasses.dataclass(frozen=True, slots=True)
class Document:
    """One text.  `name` is its file's, plus ':row' (from 1) where a file holds several; it decides
    the split.

    `parts` may be a generator: it must be used up before the next document is asked for.
    """

    name: str
    parts: Iterable[str]


@dataclasses.dataclass(frozen=True, slots=True)
class Bad:
    """What could not be used, and why; `where` is the file's name, and the row if any."""

    where: str
    reason: str


@dataclasses.dataclass
class FileCounts:
    """What one file gave."""

    num_documents: int = 0
    num_bytes: int = 0  # of UTF-8
    num_bad: int = 0
    first_bad: str = ""


class Tally:
    """Counts documents and bad rows by file, and says when there are too many of the latter."""

    def __init__(
        self,
        max_bad_fraction: float,
        option: str,
        others: Callable[[], tuple[int, int]] = lambda: (0, 0),
    ):
        """`others` returns (documents, bad rows) counted elsewhere, `option` is what the limit is
        called.
        """
        self.files: dict[str, FileCounts] = {}
        self.total = FileCounts()
        self._max_bad_fraction, self._option, self._others = max_bad_fraction, option, others

    def add_document(self, file: str, num_bytes: int) -> None:
        """Counts a good document."""
        self.add_file(file, FileCounts(num_documents=1, num_bytes=num_bytes))

    def add_bytes(self, file: str, num_bytes: int) -> None:
        """Counts another part of the last document."""
        self.add_file(file, FileCounts(num_bytes=num_bytes))

    def add_bad(self, file: str, bad: Bad) -> None:
        """Counts a bad row.

        Raises:
          ConfigError: there are too many of them.
        """
        self.add_file(file, FileCounts(num_bad=1, first_bad=f"{bad.where}: {bad.reason}"))
        self.check(f"{bad.where}: {bad.reason}")

    def add_file(self, file: str, counts: FileCounts) -> None:
        """Adds what somebody else has counted."""
        for sums in (self.files.setdefault(file, FileCounts()), self.total):
            sums.num_documents += counts.num_documents
            sums.num_bytes += counts.num_bytes
            sums.num_bad += counts.num_bad
            sums.first_bad = sums.first_bad or counts.first_bad

    def check(self, last: str = "") -> None:
        """Compares the share of bad rows with the limit.

        The share is of at least 1000 rows: one bad row of three stops no run, unless none is
        allowed.

        Raises:
          ConfigError: the share is above the limit, naming the `last` bad row ("": names the
            first).
        """
        num_documents, num_bad = self._others()
        num_bad += self.total.num_bad
        num_rows = num_documents + self.total.num_documents + num_bad
        if num_bad > self._max_bad_fraction * max(num_rows, 1000):
            example = f"the last is {last}" if last else f"the first is {self.total.first_bad}"
            raise ConfigError(
                f"{num_bad} of {num_rows} rows cannot be used, {example}. That is more than "
                f"{self._option} = {self._max_bad_fraction} "
                "allows (of at least 1000 rows). Repair or remove the file, or raise the limit."
            )

    def __str__(self) -> str:
        """For the log: sums, and the files with bad rows."""
        bad = {name: counts for name, counts in self.files.items() if counts.num_bad}
        lines = [f"{self.total.num_documents} documents, {self.total.num_bytes / 1e6:.1f} MB"]
        if bad:
            lines[0] += f"; {self.total.num_bad} bad row(s) skipped in {len(bad)} file(s)"
        for name, counts in list(bad.items())[:_NUM_PATHS_SHOWN]:
            lines.append(f"  {name}: {counts.num_bad} skipped, first: {counts.first_bad}")
        if len(bad) > _NUM_PATHS_SHOWN:
            lines.append(f"  and {len(bad) - _NUM_PATHS_SHOWN} more file(s)")
        return "\n".join(lines)


def find_files(source: str, option: str) -> list[Span]:
    """Sorted files of a source: "stdlib", or a folder, a file or a glob of text, on this machine
    or behind an fsspec URL (gs://...).

    Hidden files and folders are not visited, unless the source names them.  `option` is what
    errors call the source.

    Raises:
      ConfigError: the source does not exist, or holds no file of a known kind.
    """
    if source == "stdlib":
        root = sysconfig.get_path("stdlib")
        found = [
            (Path(path).relative_to(root).as_posix(), path)
            for path in _walk(root, _STDLIB_SKIPPED)
            if path.endswith(".py")
        ]
    else:
        try:
            found = _find_remote(source, option) if "://" in source else _find_local(source)
        except OSError as error:  # no network
            raise ConfigError(f"{option} = {source!r} cannot be read: {error}") from error
        if not found:
            raise ConfigError(
                f"{option} = {source!r} does not exist; it must be 'stdlib', or a folder, file or "
                f"glob of {_kinds()}. "
                f"Correct the path (a relative one starts at {os.getcwd()})."
            )
    names = {_printable(name): path for name, path in found if _kind(path) is not None}
    if not names:
        raise ConfigError(
            f"{option} = {source!r} holds no {_kinds()} file; only these are read. Point it at a "
            "folder, file or glob that has some."
        )
    return [Span(name, path) for name, path in sorted(names.items())]


def read(span: Span, text_field: str) -> Iterator[Document | Bad]:
    """Documents of a file or span in order, and what could not be used.

    Raises:
      ConfigError: a package that the kind of file needs is not installed, or a URL that cannot be
        read.
    """
    kind = _kind(span.path)
    try:
        if kind == ".jsonl":
            yield from _read_rows(span, text_field)
        elif kind == ".parquet":
            yield from _read_parquet(span, text_field)
        elif kind == ".array_record":
            yield from _read_array_record(span)
        else:
            yield from _read_text(span)
    except OSError as error:
        if "://" in span.path:  # perhaps but for a moment, and the rest of the file would be lost
            raise ConfigError(
                f"{span.path} cannot be read ({error}); the same command may succeed later."
            ) from error
        yield Bad(span.name, f"cannot be read ({error.strerror or error})")


def open_binary(path: str) -> BinaryIO:
    """A local file or an fsspec URL, as it is stored."""
    if "://" not in path:
        return open(path, "rb")
    return io.BufferedReader(
        _fsspec().open(path, "rb").open(), 2**17
    )  # a bucket's own files have no readline with a limit


def size_of(path: str) -> int:
    """Bytes of a local file or an fsspec URL, as it is stored; 0 for one that is gone."""
    try:
        return _fsspec().url_to_fs(path)[0].size(path) if "://" in path else os.path.getsize(path)
    except OSError:
        return 0


def can_split(path: str) -> bool:
    """Whether spans of a file can be read by themselves."""
    return path.lower().endswith(".jsonl")


def is_plain(path: str) -> bool:
    """Whether a file has the size of its text, about."""
    return path.lower().endswith((*TEXT_SUFFIXES, ".jsonl"))


# --- finding ---


def _kind(path: str) -> str | None:
    """The suffix that says how a file is read, or None."""
    lower = path.lower()
    stem = next(
        (lower.removesuffix(suffix) for suffix in COMPRESSIONS if lower.endswith(suffix)), lower
    )
    kind = os.path.splitext(stem)[1]
    if kind not in SUFFIXES or (stem != lower and kind in (".parquet", ".array_record")):
        return None
    return kind


def _find_local(source: str) -> list[tuple[str, str]]:
    """(name relative to the source's root, path) of a file, a folder or a glob."""
    path = files.user_path(source)
    if os.path.isfile(path):
        root, paths = os.path.dirname(path), [path]
    elif os.path.isdir(path):
        root, paths = path, list(_walk(path, _FOLDER_SKIPPED))
    else:
        root, paths = (
            _glob_root(path),
            [match for match in glob.glob(path, recursive=True) if os.path.isfile(match)],
        )
    return [(Path(path).relative_to(root).as_posix(), path) for path in paths] or (
        [("", path)] if os.path.isdir(path) else []
    )


def _find_remote(source: str, option: str) -> list[tuple[str, str]]:
    fs, path = files.filesystem(source, option)
    if glob.has_magic(path):
        root, found = _glob_root(path), [match for match in fs.glob(path) if fs.isfile(match)]
    elif fs.isdir(path):
        root, found = path, fs.find(path)
    else:
        root, found = os.path.dirname(path), [path] if fs.exists(path) else []
    names = [(match.removeprefix(root).lstrip("/"), fs.unstrip_protocol(match)) for match in found]
    return [
        (name, url)
        for name, url in names
        if not any(piece.startswith(".") for piece in name.split("/"))
    ]


def _fsspec():
    import fsspec.core  # a quarter of a second, which a local source need not wait for

    return fsspec.core


def _walk(root: str, skipped: Sequence[str]) -> Iterator[str]:
    """Paths of the files under `root`; names that match a pattern in `skipped` are neither entered
    nor returned.
    """
    for folder, folder_names, file_names in os.walk(root):
        folder_names[:] = [name for name in folder_names if not _matches_any(name, skipped)]
        yield from (
            os.path.join(folder, name) for name in file_names if not _matches_any(name, skipped)
        )


def _matches_any(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _glob_root(pattern: str) -> str:
    """The folder in front of the first wildcard: unlike the matches' common folder, new files
    cannot change it.
    """
    root = os.path.dirname(pattern)
    while root and glob.escape(root) != root:
        root = os.path.dirname(root)
    return root


def _kinds() -> str:
    plain = ", ".join((*TEXT_SUFFIXES, ".jsonl"))
    return f"{plain} (plain, {', '.join(COMPRESSIONS)}), .parquet, .array_record"


def _printable(name: str) -> str:
    """File names are bytes on most systems; those that are not UTF-8 keep a distinct, printable
    form.
    """
    return os.fsencode(name).decode("utf-8", "backslashreplace")


# --- reading ---


@contextlib.contextmanager
def _open_plain(path: str) -> Iterator[BinaryIO]:
    """A file without its compression."""
    with open_binary(path) as file:
        if path.lower().endswith(".gz"):
            with gzip.GzipFile(fileobj=file, mode="rb") as plain:
                yield plain
        elif path.lower().endswith(".zst"):
            with io.BufferedReader(_ZstdFile(file), 2**17) as plain:
                yield plain
        else:
            yield file


class _TruncatedError(OSError):
    """A compressed file that ends before its end, or is damaged."""


class _ZstdFile(io.RawIOBase):
    """Frames of zstd as one stream; unlike the library's own reader it raises where the last frame
    is cut off.
    """

    def __init__(self, file: BinaryIO):
        try:
            import zstandard
        except ImportError as error:
            raise ConfigError(
                "a .zst file needs zstandard: pip install 'hunyuan_jax[data]'."
            ) from error
        self._file, self._library, self._frame, self._pending = (
            file,
            zstandard,
            None,
            memoryview(b""),
        )

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._pending:
            data = (
                self._file.read(2**17)
                if self._frame is None or not self._frame.unused_data
                else self._frame.unused_data
            )
            if self._frame is None or self._frame.eof:
                if not data:
                    return 0
                self._frame = self._library.ZstdDecompressor().decompressobj()
            if not data:
                raise _TruncatedError("truncated archive")
            try:
                self._pending = memoryview(self._frame.decompress(data))
            except self._library.ZstdError as error:
                raise _TruncatedError(f"damaged archive ({error})") from error
        count = min(len(buffer), len(self._pending))
        buffer[:count], self._pending = self._pending[:count], self._pending[count:]
        return count


def _fault_of(error: Exception) -> str:
    if isinstance(error, EOFError):
        return "truncated archive"
    return str(error) if isinstance(error, _TruncatedError) else f"damaged archive ({error})"


_ARCHIVE_ERRORS = (EOFError, zlib.error, gzip.BadGzipFile, _TruncatedError)


def _read_text(span: Span) -> Iterator[Document | Bad]:
    """One document, or one Bad."""
    try:
        with _open_plain(span.path) as file:
            data = file.read(_TEXT_AT_ONCE)
            if len(data) < _TEXT_AT_ONCE:
                yield Document(span.name, cut(_text_of(data)))
                return
            decoder = codecs.getincrementaldecoder("utf-8")()
            while data:
                decoder.decode(data)
                data = file.read(PART_CHARS)
            decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        yield Bad(span.name, f"not UTF-8 ({error.reason})")
    except _UnusableError as error:
        yield Bad(span.name, str(error))
    except _ARCHIVE_ERRORS as error:
        yield Bad(span.name, _fault_of(error))
    else:
        yield Document(span.name, _stream_text(span.path))


def _stream_text(path: str) -> Iterator[str]:
    """Parts of a text file that is known to be UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    text = ""
    with _open_plain(path) as file:
        while data := file.read(PART_CHARS):
            text += decoder.decode(data)
            if len(text) > 2 * PART_CHARS:
                *parts, text = cut(text)
                yield from parts
    yield from cut(text)


def cut(text: str) -> list[str]:
    """The text in parts of at most PART_CHARS, cut behind a line break that no blank follows,
    where there is one.

    No token spans such a place (of a HyTokenizer: `hy.SPLIT_PATTERN`), so the parts' tokens are
    those of the text.
    """
    parts, start = [], 0
    while len(text) - start > PART_CHARS:
        end = start + PART_CHARS
        while end > start and not (text[end - 1] == "\n" and not text[end].isspace()):
            end = text.rfind("\n", start, end - 1) + 1
        end = end if end > start else start + PART_CHARS
        parts.append(text[start:end])
        start = end
    return [*parts, text[start:]]


class _UnusableError(Exception):
    """Why one document cannot be used."""


def _read_rows(span: Span, text_field: str) -> Iterator[Document | Bad]:
    """One document a row; a blank line is not a row but keeps its number, which editors show."""
    row = span.first_row
    try:
        with _open_plain(span.path) as file:
            position = span.start
            if position:  # a row begins behind a line break, perhaps the one in front of the span
                file.seek(position - 1)
                position += _skip_line(file) - 1
            while span.stop is None or position < span.stop:
                line = file.readline(MAX_ROW_BYTES)
                if not line:
                    return
                position += len(line)
                where = f"{span.name}:{row}"
                if len(line) == MAX_ROW_BYTES and not line.endswith(b"\n"):
                    position += _skip_line(file)
                    yield Bad(where, f"longer than {MAX_ROW_BYTES} bytes")
                elif line.strip():
                    try:
                        yield Document(where, cut(_row_text(line, text_field)))
                    except _UnusableError as error:
                        yield Bad(where, str(error))
                row += 1
    except _ARCHIVE_ERRORS as error:
        yield Bad(f"{span.name}:{row}", _fault_of(error))


def _skip_line(file: BinaryIO) -> int:
    """Reads to the end of the line; returns the number of bytes."""
    count = 0
    while line := file.readline(PART_CHARS):
        count += len(line)
        if line.endswith(b"\n"):
            break
    return count


def _row_text(line: bytes, text_field: str) -> str:
    """The text of a .jsonl row."""
    try:
        row = json.loads(_text_of(line))
    except (ValueError, RecursionError) as error:
        raise _UnusableError(f"not JSON ({error})") from error
    if not isinstance(row, dict):
        raise _UnusableError(f"a {type(row).__name__}, not an object")
    if text_field not in row:
        raise _UnusableError(f"no field {text_field!r}, it has {list(row)[:5]}")
    text = row[text_field]
    if not isinstance(text, str):
        raise _UnusableError(f"field {text_field!r} is a {type(text).__name__}, not a string")
    text = text.removeprefix("\ufeff")
    if not text:
        raise _UnusableError("empty")
    return replace_surrogates(text)  # JSON can escape half of a surrogate pair


def _read_parquet(span: Span, text_field: str) -> Iterator[Document | Bad]:
    """One document a row; memory is that of one row group."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError(
            "a .parquet file needs pyarrow: pip install 'hunyuan_jax[data]'."
        ) from error
    row = 1
    try:
        with open_binary(span.path) as file, pyarrow.parquet.ParquetFile(file) as table:
            fields = {field.name: field.type for field in table.schema_arrow}
            if text_field not in fields:
                raise _UnusableError(f"no column {text_field!r}, it has {list(fields)[:5]}")
            kinds = (
                pyarrow.types.is_string,
                pyarrow.types.is_large_string,
                pyarrow.types.is_string_view,
            )
            if not any(is_kind(fields[text_field]) for is_kind in kinds):
                raise _UnusableError(f"column {text_field!r} is {fields[text_field]}, not string")
            for batch in table.iter_batches(_BATCH_ROWS, columns=[text_field]):
                for value in batch.column(0).cast(
                    pyarrow.large_binary()
                ):  # bytes: a string column may hold any
                    where, row = f"{span.name}:{row}", row + 1
                    try:
                        yield Document(where, cut(_text_of(value.as_py())))
                    except _UnusableError as error:
                        yield Bad(where, str(error))
    except _UnusableError as error:
        yield Bad(span.name, str(error))
    except pyarrow.ArrowException as error:
        yield Bad(f"{span.name}:{row}", f"damaged file ({' '.join(str(error).split())[:200]})")


def _read_array_record(span: Span) -> Iterator[Document | Bad]:
    """One document a record, which is UTF-8 text."""
    from array_record.python.array_record_module import ArrayRecordReader

    if "://" in span.path:
        yield Bad(span.name, "cannot be read (ArrayRecord files must be on this machine)")
        return
    row = 0
    try:
        reader = ArrayRecordReader(span.path)
        for row in range(reader.num_records()):
            [record] = reader.read([row])
            try:
                yield Document(f"{span.name}:{row + 1}", cut(_text_of(record)))
            except _UnusableError as error:
                yield Bad(f"{span.name}:{row + 1}", str(error))
        reader.close()
    except (ValueError, RuntimeError) as error:
        yield Bad(f"{span.name}:{row + 1}", f"damaged file ({' '.join(str(error).split())[:200]})")


def _text_of(data: bytes | None) -> str:
    """`data` as text without a byte order mark, known not to be empty."""
    data = (data or b"").removeprefix(codecs.BOM_UTF8)
    if not data:
        raise _UnusableError("empty")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise _UnusableError(
            f"not UTF-8 (byte {data[error.start]:#04x} at {error.start})"
        ) from error
