"""Documents to train on: where they come from, which ones are skipped and why, and their split into training and validation.

Imports neither jax nor grain, so that a misspelled path is answered before anything slow is loaded.
"""

import codecs
import dataclasses
import fnmatch
import glob
import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from hunyuan_jax.config import ConfigError, DataConfig
from hunyuan_jax.tokenizer.vocabulary import replace_surrogates

SUFFIXES = (".txt", ".py", ".md", ".jsonl")

# Folders and files left out of a walk, as name patterns.  The standard library loses its tests and what depends on the
# machine that built it, so that one Python version gives one corpus; a user's folder loses .git, .venv and the like.
_STDLIB_SKIPPED = ("site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "config-*", "_sysconfigdata*")
_FOLDER_SKIPPED = (".*",)

_NUM_PATHS_SHOWN = 5


@dataclasses.dataclass(frozen=True, slots=True)
class Document:
    """One text.  `name` is its path relative to the source, plus ':row' (from 1) in a .jsonl; it decides the split."""

    name: str
    utf8: bytes  # not str: one wide character would make the whole text two to four times as large

    @property
    def text(self) -> str:
        """The decoded text; it cannot fail, `open_source` has checked it."""
        return self.utf8.decode()


class _SkippedError(Exception):
    """Why one document cannot be used."""


@dataclasses.dataclass(frozen=True)
class SourceReport:
    """What was read and what was not; `str()` of it is meant for the log."""

    num_documents: int
    num_bytes: int  # UTF-8 bytes of the documents kept
    skipped: Mapping[str, tuple[int, str]]  # path -> (number of documents skipped, reason of the first)

    def __str__(self) -> str:
        lines = [f"{self.num_documents} documents, {self.num_bytes / 1e6:.1f} MB"]
        if self.skipped:
            num_skipped = sum(count for count, _ in self.skipped.values())
            lines[0] += f"; {num_skipped} skipped in {len(self.skipped)} file(s)"
        for path, (count, reason) in list(self.skipped.items())[:_NUM_PATHS_SHOWN]:
            lines.append(f"  {path}: {count} skipped, first: {reason}")
        if len(self.skipped) > _NUM_PATHS_SHOWN:
            lines.append(f"  and {len(self.skipped) - _NUM_PATHS_SHOWN} more file(s)")
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Documents(Sequence[Document]):
    """Documents in a fixed order (by name, rows of a file in file order), and the report of what was read."""

    items: tuple[Document, ...]
    report: SourceReport

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def open_source(config: DataConfig) -> Documents:
    """Reads every document of `config.source` into memory.

    Files that are not UTF-8, broken .jsonl rows and empty texts are skipped, counted and reported.  Hidden files and folders
    are not visited, unless the source names them.

    Raises:
      ConfigError: the source does not exist, holds no file of a known kind, or none of its documents can be used.
    """
    items: list[Document] = []
    skipped: dict[str, tuple[int, str]] = {}
    for name, path in _find_files(config.source):
        documents, reasons = _read_file(path, name, config.text_field)
        items += documents
        if reasons:
            skipped[name] = (len(reasons), reasons[0])
    if not items:
        first = next((f"{name}: {reason}" for name, (_, reason) in skipped.items()), "no rows")
        num_skipped = sum(count for count, _ in skipped.values())
        raise ConfigError(
            f"config.data.source = {config.source!r} holds no usable document ({num_skipped} skipped: {first}); training needs UTF-8 text. "
            f"Repair the files, or set config.data.text_field (now {config.text_field!r}) to the field with the text."
        )
    return Documents(tuple(items), SourceReport(len(items), sum(len(item.utf8) for item in items), skipped))


def split_documents(documents: Sequence[Document], validation_fraction: float) -> tuple[list[Document], list[Document]]:
    """(training, validation), each in the order of `documents`.

    A document is held out if the hash of its name falls below the fraction: other documents, their order and the seed have no
    say, so a corpus that grows does not move text from one side to the other.  Where that leaves a side empty (few documents),
    the one document whose hash is nearest to it moves over.

    Raises:
      ConfigError: a fraction above 0 with a single document.
    """
    if validation_fraction == 0:
        return list(documents), []
    if len(documents) < 2:
        raise ConfigError(
            f"config.data.validation_fraction = {validation_fraction} needs at least 2 documents, the source holds {len(documents)}; "
            "whole documents are held out. Set it to 0, or split the text into more files or rows."
        )
    hashes = [_unit_hash(document.name) for document in documents]
    num_held_out = sum(value < validation_fraction for value in hashes)
    num_held_out = min(max(num_held_out, 1), len(documents) - 1)
    held_out = set(sorted(range(len(documents)), key=hashes.__getitem__)[:num_held_out])
    training = [document for index, document in enumerate(documents) if index not in held_out]
    validation = [document for index, document in enumerate(documents) if index in held_out]
    return training, validation


def _unit_hash(name: str) -> float:
    """Uniform in [0, 1), the same in every process (unlike `hash`)."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") / 2**64


def _find_files(source: str) -> list[tuple[str, str]]:
    """Sorted (name, path) of the source's text files; the name is relative to the source, with '/', and printable."""
    if source == "stdlib":
        root = sysconfig.get_path("stdlib")
        paths = [path for path in _walk(root, _STDLIB_SKIPPED) if path.endswith(".py")]
    else:
        root, paths = _find_user_files(source)
    names = {_printable(Path(path).relative_to(root).as_posix()): path for path in paths if path.lower().endswith(SUFFIXES)}
    if not names:
        raise ConfigError(
            f"config.data.source = {source!r} holds no {_kinds()} file; only these are read. "
            "Point it at a folder, file or glob that has some."
        )
    return sorted(names.items())


def _find_user_files(source: str) -> tuple[str, list[str]]:
    """(root that names are relative to, paths) of a file, a folder or a glob."""
    path = os.path.expanduser(source)
    if os.path.isfile(path):
        return os.path.dirname(path), [path]
    if os.path.isdir(path):
        return path, list(_walk(path, _FOLDER_SKIPPED))
    found = [match for match in glob.glob(path, recursive=True) if os.path.isfile(match)]
    if not found:
        raise ConfigError(
            f"config.data.source = {source!r} does not exist; it must be 'stdlib', or a folder, file or glob of {_kinds()}. "
            f"Correct the path (a relative one starts at {os.getcwd()})."
        )
    return _glob_root(path), found


def _walk(root: str, skipped: Sequence[str]) -> Iterator[str]:
    """Paths of the files under `root`; names that match a pattern in `skipped` are neither entered nor returned."""
    for folder, folder_names, file_names in os.walk(root):
        folder_names[:] = [name for name in folder_names if not _matches_any(name, skipped)]
        yield from (os.path.join(folder, name) for name in file_names if not _matches_any(name, skipped))


def _matches_any(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _glob_root(pattern: str) -> str:
    """The folder in front of the first wildcard: unlike the matches' common folder, new files cannot change it."""
    root = os.path.dirname(pattern)
    while root and glob.escape(root) != root:
        root = os.path.dirname(root)
    return root


def _kinds() -> str:
    return ", ".join(SUFFIXES)


def _printable(name: str) -> str:
    """File names are bytes on most systems; those that are not UTF-8 keep a distinct, printable form."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _read_file(path: str, name: str, text_field: str) -> tuple[list[Document], list[str]]:
    """(documents, one reason per skipped document) of one file."""
    try:
        with open(path, "rb") as file:
            return _read_rows(file, name, text_field) if path.lower().endswith(".jsonl") else _read_text(file, name)
    except OSError as error:
        return [], [f"cannot be read ({error.strerror})"]


def _read_text(file: BinaryIO, name: str) -> tuple[list[Document], list[str]]:
    try:
        return [Document(name, _checked_utf8(file.read()))], []
    except _SkippedError as reason:
        return [], [str(reason)]


def _read_rows(file: BinaryIO, name: str, text_field: str) -> tuple[list[Document], list[str]]:
    """One document a row; a blank line is not a row but keeps its number, which editors show."""
    documents, reasons = [], []
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            documents.append(Document(f"{name}:{number}", _row_utf8(line, text_field)))
        except _SkippedError as reason:
            reasons.append(f"row {number}: {reason}")
    return documents, reasons


def _row_utf8(line: bytes, text_field: str) -> bytes:
    """The text of a .jsonl row."""
    try:
        row = json.loads(_checked_utf8(line))
    except (ValueError, RecursionError) as error:
        raise _SkippedError(f"not JSON ({error})") from error
    if not isinstance(row, dict):
        raise _SkippedError(f"a {type(row).__name__}, not an object")
    if text_field not in row:
        raise _SkippedError(f"no field {text_field!r}, it has {list(row)[:5]}")
    if not isinstance(row[text_field], str):
        raise _SkippedError(f"field {text_field!r} is a {type(row[text_field]).__name__}, not a string")
    return _checked_utf8(replace_surrogates(row[text_field]).encode())  # JSON can escape half of a surrogate pair


def _checked_utf8(data: bytes) -> bytes:
    """`data` without a byte order mark, known to be non-empty UTF-8."""
    data = data.removeprefix(codecs.BOM_UTF8)
    if not data:
        raise _SkippedError("empty")
    try:
        data.decode()
    except UnicodeDecodeError as error:
        raise _SkippedError(f"not UTF-8 (byte {data[error.start]:#04x} at {error.start})") from error
    return data
