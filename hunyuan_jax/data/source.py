"""Finds the text files of a source and reads their documents.

A document arrives in parts of about a million characters, so a file of any size takes little
memory.  Parts end after a line break, where no tokenizer here has a token across the cut.
Imports neither jax nor grain: a misspelled path is reported before anything slow is loaded.
"""

import codecs
import contextlib
import dataclasses
import fnmatch
import functools
import glob
import gzip
import io
import json
import os
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from hunyuan_jax import files
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.tokenizer.vocabulary import replace_surrogates

TEXT_SUFFIXES = (".txt", ".py", ".md")
SUFFIXES = (*TEXT_SUFFIXES, ".jsonl", ".parquet", ".array_record")
COMPRESSIONS = (".gz", ".zst")  # of text and .jsonl; the other formats compress inside

PART_CHARS = 2**20
MAX_ROW_BYTES = 2**26  # a longer .jsonl row is bad: parsing takes several times its size
_TEXT_AT_ONCE = 2**26  # bytes; a longer text file is read twice, first to check that it is UTF-8
_BATCH_ROWS = 256  # of .parquet and .array_record

# Name patterns of the folders and files that a walk skips.  In the standard library: tests, and
# files that depend on the build machine, so that one Python version gives one corpus.  In a user's
# folder: .git, .venv and the like.
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

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, slots=True)
class Span:
    """A file, or the rows of a .jsonl file that begin at bytes [start, stop)."""

    name: str  # relative to the source, with '/', printable
    path: str
    start: int = 0
    stop: int | None = None
    first_row: int = 1


@dataclasses.dataclass(frozen=True, slots=True)
class Document:
    """One text.

    name: that of its file, plus ':row' (from 1) if a file holds several.  It decides the split.
    parts: the text in parts.  A generator must be exhausted before the next document is read.
    """

    name: str
    parts: Iterable[str]


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """One row with all of its fields.

    name: that of its file and ':row', as for a Document.
    """

    name: str
    fields: dict[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Bad:
    """A file or row that cannot be used.

    where: name of the file, and the row if any.
    """

    where: str
    reason: str


@dataclasses.dataclass
class FileCounts:
    """Counts of one file."""

    num_documents: int = 0
    num_bytes: int = 0  # of UTF-8
    num_bad: int = 0
    first_bad: str = ""


class Tally:
    """Counts documents and bad rows per file; raises if there are too many bad rows."""

    def __init__(
        self,
        max_bad_fraction: float,
        option: str,
        others: Callable[[], tuple[int, int]] = lambda: (0, 0),
    ):
        """Starts at zero.

        Args:
          max_bad_fraction: limit of bad rows as a share of all rows.
          option: name of the limit, for errors.
          others: returns (documents, bad rows) counted elsewhere.
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
        """Adds the counts of a file."""
        for sums in (self.files.setdefault(file, FileCounts()), self.total):
            sums.num_documents += counts.num_documents
            sums.num_bytes += counts.num_bytes
            sums.num_bad += counts.num_bad
            sums.first_bad = sums.first_bad or counts.first_bad

    def check(self, last: str = "") -> None:
        """Compares the share of bad rows with the limit.

        The share is taken of at least 1000 rows, so one bad row of three does not stop a run
        unless the limit is 0.

        Raises:
          ConfigError: the share is above the limit.  The message names the `last` bad row, or the
            first if `last` is "".
        """
        num_documents, num_bad = self._others()
        num_bad += self.total.num_bad
        num_rows = num_documents + self.total.num_documents + num_bad
        if num_bad > self._max_bad_fraction * max(num_rows, 1000):
            example = f"the last is {last}" if last else f"the first is {self.total.first_bad}"
            raise ConfigError(
                f"{num_bad} of {num_rows} rows cannot be used, {example}. That is more than "
                f"{self._option} = {self._max_bad_fraction} allows (of at least 1000 rows). "
                "Repair or remove the file, or raise the limit."
            )

    def __str__(self) -> str:
        """Returns the lines of the log: sums, and the files with bad rows."""
        return (
            f"{self.total.num_documents} documents, {self.total.num_bytes / 1e6:.1f} MB"
            + self.skipped()
        )

    def skipped(self) -> str:
        """Returns the end of a line about a source that says how many rows were bad, and a line
        for each file with bad rows; "" if there are none.
        """
        bad = {name: counts for name, counts in self.files.items() if counts.num_bad}
        if not bad:
            return ""
        lines = [f"; {self.total.num_bad} bad row(s) skipped in {len(bad)} file(s)"]
        for name, counts in list(bad.items())[:_NUM_PATHS_SHOWN]:
            lines.append(f"  {name}: {counts.num_bad} skipped, first: {counts.first_bad}")
        if len(bad) > _NUM_PATHS_SHOWN:
            lines.append(f"  and {len(bad) - _NUM_PATHS_SHOWN} more file(s)")
        return "\n".join(lines)


def find_files(source: str, option: str) -> list[Span]:
    """Returns the files of a source, sorted by name.

    A source is "stdlib", or a folder, file or glob of text, local or an fsspec URL (gs://...).
    Hidden files and folders are skipped unless the source names them.  Links are followed, and a
    file that is found by several paths is listed once: by a path without links if there is one,
    else by the shortest.

    Args:
      source: see above.
      option: name of the source's option, for errors.

    Raises:
      ConfigError: the source does not exist, or has no file of a known kind.
    """
    source = files.user_path(source, option, files.AnyPath)
    if source == "stdlib":
        root = sysconfig.get_path("stdlib")
        found = [
            (Path(path).relative_to(root).as_posix(), path)
            for path in _walk(root, _STDLIB_SKIPPED, follow_links=False)
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
                f"glob of {_kinds()}. Correct the path (a relative one starts at {os.getcwd()})."
            )
    names = {_printable(name): path for name, path in found if _kind(path) is not None}
    if not names:
        raise ConfigError(
            f"{option} = {source!r} holds no {_kinds()} file; only these are read. Point it at a "
            "folder, file or glob that has some."
        )
    return [Span(name, path) for name, path in sorted(names.items())]


def read(span: Span, text_field: str) -> Iterator[Document | Bad]:
    """Yields the documents of a file or span in order, and a Bad for what cannot be used.

    Raises:
      ConfigError: the package for this kind of file is not installed, or a URL cannot be read.
    """

    def document_of_row(where: str, line: bytes) -> Document:
        return Document(where, cut(_row_text(line, text_field)))

    def document_of_text(where: str, text: bytes | None) -> Document:
        return Document(where, cut(_text_of(text)))

    kind = _kind(span.path)
    if kind == ".jsonl":
        found = _read_rows(span, document_of_row)
    elif kind == ".parquet":
        found = _read_parquet(span, text_field, document_of_text)
    elif kind == ".array_record":
        found = _read_array_record(span, document_of_text)
    else:
        found = _read_text(span)
    yield from _readable(span, found)


def read_records(span: Span) -> Iterator[Record | Bad]:
    """Yields the rows of a .jsonl, .parquet or .array_record file in order, and a Bad for what
    cannot be used.  A record of an .array_record file is a JSON object.

    Raises:
      ConfigError: as `read`.
    """

    def record_of_json(where: str, line: bytes) -> Record:
        return Record(where, _row_object(line))

    kind = _kind(span.path)
    if kind == ".jsonl":
        found = _read_rows(span, record_of_json)
    elif kind == ".parquet":
        found = _read_parquet(span, None, Record)
    elif kind == ".array_record":
        found = _read_array_record(span, record_of_json)
    else:
        found = iter(
            [Bad(span.name, "text, which has no fields; use .jsonl, .parquet or .array_record")]
        )
    yield from _readable(span, found)


def _readable(span: Span, found: Iterator[T]) -> Iterator[T | Bad]:
    """What is found in a file, and a Bad if it cannot be read further."""
    try:
        yield from found
    except OSError as error:
        if "://" in span.path:  # may be temporary, and the rest of the file would be lost
            raise ConfigError(
                f"{span.path} cannot be read ({error}); the same command may succeed later."
            ) from error
        yield Bad(span.name, f"cannot be read ({error.strerror or error})")


def open_binary(path: str) -> BinaryIO:
    """Opens a local file or an fsspec URL, without decompressing it."""
    if "://" not in path:
        return open(path, "rb")
    # The files of a bucket have no readline with a limit of their own.
    return io.BufferedReader(_fsspec().open(path, "rb").open(), 2**17)


def size_of(path: str) -> int:
    """Returns the stored bytes of a local file or an fsspec URL; 0 if it is missing."""
    try:
        return _fsspec().url_to_fs(path)[0].size(path) if "://" in path else os.path.getsize(path)
    except OSError:
        return 0


def can_split(path: str) -> bool:
    """Whether spans of a file can be read separately."""
    return path.lower().endswith(".jsonl")


def is_plain(path: str) -> bool:
    """Whether a file is about as large as its text."""
    return path.lower().endswith((*TEXT_SUFFIXES, ".jsonl"))


# --- finding ---


def _kind(path: str) -> str | None:
    """Returns the suffix that says how a file is read, or None."""
    lower = path.lower()
    stem = next(
        (lower.removesuffix(suffix) for suffix in COMPRESSIONS if lower.endswith(suffix)), lower
    )
    kind = os.path.splitext(stem)[1]
    if kind not in SUFFIXES or (stem != lower and kind in (".parquet", ".array_record")):
        return None
    return kind


def _find_local(path: str) -> list[tuple[str, str]]:
    """Returns (name relative to the source's root, path) of a file, folder or glob."""
    if os.path.isfile(path):
        return [(os.path.basename(path), path)]
    if os.path.isdir(path):
        found = _once(path, _walk(path, _FOLDER_SKIPPED, follow_links=True))
        return found or [("", path)]
    root = _glob_root(path)
    matches = _glob_all(root, path) if "**" in path.split("/") else glob.iglob(path)
    return _once(root, (match for match in matches if not os.path.isdir(match)))


def _glob_all(root: str, pattern: str) -> Iterator[str]:
    """As `glob.iglob(pattern, recursive=True)`, which enters loops of links until the system
    stops it.
    """
    patterns = os.path.relpath(pattern, root or ".").split("/")
    skipped = () if any(piece.startswith(".") for piece in patterns) else _FOLDER_SKIPPED
    for path in _walk(root or ".", skipped, follow_links=True):
        if _is_match(os.path.relpath(path, root or ".").split("/"), patterns):
            yield path if root else os.path.relpath(path)


def _is_match(names: Sequence[str], patterns: Sequence[str]) -> bool:
    """Whether a path matches a pattern with "**" for any number of folders, piece by piece."""
    if not patterns:
        return not names
    is_hidden = bool(names) and names[0].startswith(".")
    if patterns[0] == "**":
        enters = bool(names) and not is_hidden and _is_match(names[1:], patterns)
        return enters or _is_match(names, patterns[1:])
    return (
        bool(names)
        and fnmatch.fnmatchcase(names[0], patterns[0])
        and (not is_hidden or patterns[0].startswith("."))
        and _is_match(names[1:], patterns[1:])
    )


def _once(root: str, paths: Iterable[str]) -> list[tuple[str, str]]:
    """Returns (name relative to `root`, path), each file by one of its paths."""
    real_root, found = os.path.realpath(root), {}
    real_folder = functools.cache(os.path.realpath)
    for path in paths:
        folder, name = os.path.split(path)
        is_link = os.path.islink(path)
        real = os.path.realpath(path) if is_link else os.path.join(real_folder(folder), name)
        name = Path(path).relative_to(root).as_posix()
        key = (real != os.path.join(real_root, name), is_link, name.count("/"), name)
        if real not in found or key < found[real][0]:
            found[real] = (key, name, path)
    return [(name, path) for _, name, path in found.values()]


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
    import fsspec.core  # takes 0.25 s, which a local source saves

    return fsspec.core


def _walk(root: str, skipped: Sequence[str], follow_links: bool) -> Iterator[str]:
    """Yields the paths of the files under `root`.

    Folders and files whose name matches a pattern in `skipped` are left out, and links to a folder
    that they are in.
    """
    root = root.rstrip("/") or "/"
    for folder, folder_names, file_names in os.walk(root, followlinks=follow_links):
        folder_names[:] = [
            name
            for name in folder_names
            if not _matches_any(name, skipped)
            and not (follow_links and _is_loop(root, os.path.join(folder, name)))
        ]
        for name in file_names:
            path = os.path.join(folder, name)
            if not _matches_any(name, skipped) and (os.path.isfile(path) or os.path.islink(path)):
                yield path  # a link to nothing too: it is reported when it is read


def _is_loop(root: str, path: str) -> bool:
    """Whether `path` is a link to one of the folders between it and `root`, or to `root`."""
    if not os.path.islink(path):
        return False
    real = os.path.realpath(path)
    while path != root:
        path = os.path.dirname(path)
        if os.path.realpath(path) == real:
            return True
    return False


def _matches_any(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _glob_root(pattern: str) -> str:
    """Returns the folder before the first wildcard.

    Unlike the common folder of the matches, it does not change with new files.
    """
    root = os.path.dirname(pattern)
    while root and glob.escape(root) != root:
        root = os.path.dirname(root)
    return root


def _kinds() -> str:
    plain = ", ".join((*TEXT_SUFFIXES, ".jsonl"))
    return f"{plain} (plain, {', '.join(COMPRESSIONS)}), .parquet, .array_record"


def _printable(name: str) -> str:
    """Returns a file name with the bytes that are not UTF-8 as escapes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


# --- reading ---


@contextlib.contextmanager
def _open_plain(path: str) -> Iterator[BinaryIO]:
    """Opens a file and decompresses it by its suffix."""
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
    """A compressed file is truncated or damaged."""


class _ZstdFile(io.RawIOBase):
    """Reads all frames of a zstd file as one stream.

    Unlike the library's own reader, it raises if the last frame is truncated.
    """

    def __init__(self, file: BinaryIO):
        try:
            import zstandard
        except ImportError as error:
            raise ConfigError("a .zst file needs zstandard: pip install -e '.[data]'.") from error
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
    """Yields one Document, or one Bad."""
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
    """Yields the parts of a text file that is known to be UTF-8."""
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
    """Returns the text in parts of at most PART_CHARS characters.

    It is split after a newline that is not followed by whitespace, if there is one.  No token
    spans such a place (`hy.SPLIT_PATTERN` of a HyTokenizer), so the tokens of the parts are those
    of the text.
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
    """One document cannot be used; the message says why."""


def _read_rows(span: Span, make: Callable[[str, bytes], T]) -> Iterator[T | Bad]:
    """Yields make(name, line) of each row.  Blank lines are skipped but numbered."""
    row = span.first_row
    try:
        with _open_plain(span.path) as file:
            position = span.start
            if position:  # a row begins after a line break, maybe the one before the span
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
                        yield make(where, line)
                    except _UnusableError as error:
                        yield Bad(where, str(error))
                row += 1
    except _ARCHIVE_ERRORS as error:
        yield Bad(f"{span.name}:{row}", _fault_of(error))


def _skip_line(file: BinaryIO) -> int:
    """Skips the rest of the line; returns the number of bytes."""
    count = 0
    while line := file.readline(PART_CHARS):
        count += len(line)
        if line.endswith(b"\n"):
            break
    return count


def _row_object(line: bytes) -> dict[str, Any]:
    """Returns the object of a .jsonl row."""
    try:
        row = json.loads(_text_of(line))
    except (ValueError, RecursionError) as error:
        raise _UnusableError(f"not JSON ({error})") from error
    if not isinstance(row, dict):
        raise _UnusableError(f"a {type(row).__name__}, not an object")
    return row


def _row_text(line: bytes, text_field: str) -> str:
    """Returns the text of a .jsonl row."""
    row = _row_object(line)
    if text_field not in row:
        raise _UnusableError(f"no field {text_field!r}, it has {list(row)[:5]}")
    text = row[text_field]
    if not isinstance(text, str):
        raise _UnusableError(f"field {text_field!r} is a {type(text).__name__}, not a string")
    text = text.removeprefix("\ufeff")
    if not text:
        raise _UnusableError("empty")
    return replace_surrogates(text)  # JSON can escape half of a surrogate pair


def _read_parquet(
    span: Span, text_field: str | None, make: Callable[[str, Any], T]
) -> Iterator[T | Bad]:
    """Yields make(name, value) of each row: of its text as bytes, or of all its fields if
    text_field is None.  Holds one row group in memory.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError("a .parquet file needs pyarrow: pip install -e '.[data]'.") from error
    row = 1
    try:
        with open_binary(span.path) as file, pyarrow.parquet.ParquetFile(file) as table:
            fields = {field.name: field.type for field in table.schema_arrow}
            if text_field is None:
                for batch in table.iter_batches(_BATCH_ROWS):
                    for value in batch.to_pylist():
                        where, row = f"{span.name}:{row}", row + 1
                        yield make(where, value)
                return
            if text_field not in fields:
                raise _UnusableError(f"no column {text_field!r}, it has {list(fields)[:5]}")
            stored = fields[text_field]
            is_dictionary = pyarrow.types.is_dictionary(stored)
            held = stored.value_type if is_dictionary else stored
            kinds = (
                pyarrow.types.is_string,
                pyarrow.types.is_large_string,
                pyarrow.types.is_string_view,
                pyarrow.types.is_binary,
                pyarrow.types.is_large_binary,
                pyarrow.types.is_binary_view,
                pyarrow.types.is_null,  # no row has a text
            )
            if not any(is_kind(held) for is_kind in kinds):
                raise _UnusableError(f"column {text_field!r} is {stored}, not string")
            for batch in table.iter_batches(_BATCH_ROWS, columns=[text_field]):
                column = batch.column(0)
                if is_dictionary:
                    column = column.dictionary_decode()
                # Read as bytes: a string column may hold text that is not UTF-8.
                for value in column.cast(pyarrow.large_binary()):
                    where, row = f"{span.name}:{row}", row + 1
                    try:
                        yield make(where, value.as_py())
                    except _UnusableError as error:
                        yield Bad(where, str(error))
    except _UnusableError as error:
        yield Bad(span.name, str(error))
    except pyarrow.ArrowException as error:
        yield Bad(f"{span.name}:{row}", f"damaged file ({' '.join(str(error).split())[:200]})")


def _read_array_record(span: Span, make: Callable[[str, bytes], T]) -> Iterator[T | Bad]:
    """Yields make(name, bytes) of each record."""
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
                yield make(f"{span.name}:{row + 1}", record)
            except _UnusableError as error:
                yield Bad(f"{span.name}:{row + 1}", str(error))
        reader.close()
    except (ValueError, RuntimeError) as error:
        yield Bad(f"{span.name}:{row + 1}", f"damaged file ({' '.join(str(error).split())[:200]})")


def _text_of(data: bytes | None) -> str:
    """Decodes UTF-8 without its byte order mark.

    Raises:
      _UnusableError: empty, or not UTF-8.
    """
    data = (data or b"").removeprefix(codecs.BOM_UTF8)
    if not data:
        raise _UnusableError("empty")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise _UnusableError(
            f"not UTF-8 (byte {data[error.start]:#04x} at {error.start})"
        ) from error
