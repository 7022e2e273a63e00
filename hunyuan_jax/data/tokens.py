"""Tokenised documents with random access.

They come from text in memory, or from a folder written by `python -m hunyuan_jax tokenize`.

Shapes: P pieces.  A document is bos, its tokens, eos.  A piece is at most PIECE_PAIRS consecutive
(token, target) pairs of a document; n pairs are stored as n + 1 ids.  In memory a document is one
piece.  The pieces of a shard are sorted by the hash of their document's name.  Therefore

  * the documents of a shard are in random order,
  * the held-out documents are the start of each shard, whatever validation_fraction is,
  * a piece is followed by the rest of its document.

The index of a source is uint64 [3, P]: the rows `ends`, `hashes` and `numbers`.  On disk it is
memory-mapped.
"""

import functools
import hashlib
import json
import os
import resource
import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from hunyuan_jax.data import source
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.tokenizer import Tokenizer

KIND, FORMAT = "hunyuan_jax token shards", 1
PIECE_PAIRS = 2048
MANIFEST, INDEX, WORK = "manifest.json", "index.npy", "unfinished"
# Groups of one record, so that each can be read alone.  zstd:3 is 2 to 3 % smaller than zstd:1 and
# 1/6 slower.
WRITER_OPTIONS = "group_size:1,zstd:1"

# Largest text that every host tokenises at every start.  Larger text needs `tokenize`, once.
IN_MEMORY_BYTES = 2**28

# Number of the piece in its document, bytes of the document's name, bytes per id.
_HEADER = struct.Struct("<IHB")


class Tokens(Protocol):
    """Tokenised documents, stored as pieces."""

    ends: np.ndarray  # uint64 [P]: pairs up to and including each piece, over all shards
    hashes: np.ndarray  # uint64 [P]: of the document's name
    numbers: np.ndarray  # uint64 [P]: of the piece in its document, from 0
    shard_pieces: np.ndarray  # int64 [S + 1]: the first piece of each shard, and P
    num_documents: int

    def read(self, piece: int) -> np.ndarray:
        """Returns the ids of a piece, one more than its pairs."""

    def document(self, piece: int) -> str:
        """Returns the name of the document that a piece belongs to."""

    def identity(self) -> dict[str, Any]:
        """Returns a small dict of JSON values that differs for any other text."""


class MemoryTokens:
    """Tokens in memory: one shard, one piece per document."""

    def __init__(self, documents: Sequence[tuple[str, np.ndarray]], tally: source.Tally):
        """Takes (name, ids) of at least one document, and the counts of reading them."""
        hashes = np.array([name_hash(name) for name, _ in documents], np.uint64)
        order = np.argsort(hashes, kind="stable")
        self.ends = np.cumsum([len(documents[i][1]) - 1 for i in order], dtype=np.uint64)
        self.hashes, self.numbers = hashes[order], np.zeros_like(hashes)
        self.shard_pieces, self.num_documents = np.array([0, len(documents)]), len(documents)
        self._ids, self._names, self._tally = (
            np.concatenate([documents[i][1] for i in order]),
            [documents[i][0] for i in order],
            tally,
        )

    def read(self, piece: int) -> np.ndarray:
        """See `Tokens`."""
        # Each earlier piece has one id more than it has pairs.
        start = (int(self.ends[piece - 1]) if piece else 0) + piece
        return self._ids[start : int(self.ends[piece]) + piece + 1]

    def document(self, piece: int) -> str:
        """See `Tokens`."""
        return self._names[piece]

    def identity(self) -> dict[str, Any]:
        """See `Tokens`."""
        digest = hashlib.blake2b(self.hashes, digest_size=8)
        digest.update(self._ids)
        return {
            "num_documents": self.num_documents,
            "num_pairs": int(self.ends[-1]),
            "digest": digest.hexdigest(),
        }

    def __str__(self) -> str:
        return str(self._tally)


class ShardTokens:
    """Tokens in the shards of a folder.  Shards are opened when they are first read."""

    def __init__(self, folder: str | os.PathLike, manifest: dict[str, Any]):
        """Maps the index of a folder.

        Raises:
          ConfigError: the index is missing or truncated.
        """
        self._folder, self._manifest = Path(folder), manifest
        self.shard_pieces = np.cumsum([0, *(shard["num_pieces"] for shard in manifest["shards"])])
        try:
            self.ends, self.hashes, self.numbers = np.load(self._folder / INDEX, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{self._folder / INDEX} cannot be read ({error}); copy it again, or remove the "
                "folder and tokenize again."
            ) from error
        self.num_documents = manifest["num_documents"]

    @functools.cached_property
    def _records(self):
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        _allow_open_files(len(self._manifest["shards"]) + 256)
        paths = [
            f"{self._folder / shard['file']}[0:{shard['num_pieces']}]"
            for shard in self._manifest["shards"]
        ]
        # With the counts in the paths, it opens a file only when it is first read.
        return ArrayRecordDataSource(paths)

    def read(self, piece: int) -> np.ndarray:
        """See `Tokens`."""
        return _unpack(self._record(piece))[2]

    def document(self, piece: int) -> str:
        """See `Tokens`."""
        return _unpack(self._record(piece))[0]

    def identity(self) -> dict[str, Any]:
        """See `Tokens`."""
        digest = hashlib.blake2b(
            json.dumps([shard["sha256"] for shard in self._manifest["shards"]]).encode(),
            digest_size=8,
        )
        return {
            "num_documents": self.num_documents,
            "num_pairs": int(self.ends[-1]),
            "digest": digest.hexdigest(),
        }

    def _record(self, piece: int) -> bytes:
        records = self._records
        try:
            return records[piece]
        except (ValueError, RuntimeError, OSError) as error:
            shard = int(np.searchsorted(self.shard_pieces, piece, side="right")) - 1
            raise ConfigError(
                f"{self._folder / self._manifest['shards'][shard]['file']}: record "
                f"{piece - self.shard_pieces[shard]} cannot be read "
                f"({' '.join(str(error).split())[:200]}). The shard is damaged: `python -m "
                "hunyuan_jax data --verify` says which are; copy them again, or remove the folder "
                "and tokenize again."
            ) from error

    def __str__(self) -> str:
        return report_of(self._manifest)


def in_memory(
    spans: Iterable[source.Span],
    text_field: str,
    tokenizer: Tokenizer,
    tally: source.Tally,
    option: str,
) -> MemoryTokens:
    """Reads and tokenises text into memory.

    Raises:
      ConfigError: more than IN_MEMORY_BYTES, no usable document, or too many bad rows.
    """
    spans = list(spans)
    _check_size(sum(source.size_of(span.path) for span in spans), option)
    documents = []
    for span in spans:
        for item in source.read(span, text_field):
            if isinstance(item, source.Bad):
                tally.add_bad(span.name, item)
                continue
            documents.append(
                (item.name, np.concatenate([*document_ids(item, span.name, tokenizer, tally)]))
            )
        _check_size(tally.total.num_bytes, option)
    if not documents:
        raise ConfigError(
            f"{option} holds no usable document ({tally.total.num_bad} skipped: "
            f"{tally.total.first_bad or 'no rows'}); training needs UTF-8 text. Repair the files, "
            f"or set config.data.text_field (now {text_field!r}) to the field with the text."
        )
    return MemoryTokens(documents, tally)


def open_shards(
    folder: str | os.PathLike, tokenizer: Tokenizer, tokenizer_name: str
) -> ShardTokens:
    """Opens the token shards of a folder.

    Raises:
      ConfigError: they were made with another tokenizer or format, the folder is unfinished, or a
        shard is missing or has the wrong size.
    """
    manifest = read_manifest(folder)
    if manifest["tokenizer"]["fingerprint"] != tokenizer.fingerprint():
        raise ConfigError(
            f"{folder} was made with tokenizer {manifest['tokenizer']['name']!r} (fingerprint "
            f"{manifest['tokenizer']['fingerprint']}); config.data.tokenizer = {tokenizer_name!r} "
            f"has fingerprint {tokenizer.fingerprint()}. Use that tokenizer, or tokenize again."
        )
    for shard in manifest["shards"]:
        found = source.size_of(str(Path(folder) / shard["file"]))
        if found != shard["num_bytes"]:
            raise ConfigError(
                f"{Path(folder) / shard['file']} has {found} bytes, the manifest says "
                f"{shard['num_bytes']}; copy it again, or remove the folder and make it again "
                "with `python -m hunyuan_jax tokenize`."
            )
    if not manifest["shards"]:
        raise ConfigError(f"{folder} holds no tokens; tokenize text that has some.")
    return ShardTokens(folder, manifest)


def is_shards(folder: str | os.PathLike) -> bool:
    """Whether a path is an output folder of `tokenize`, finished or not."""
    path = Path(folder) / MANIFEST
    return (Path(folder) / WORK).is_dir() or (
        path.is_file()
        and f'"kind": "{KIND}"' in path.read_text(encoding="utf-8", errors="replace")
    )


def read_manifest(folder: str | os.PathLike) -> dict[str, Any]:
    """Returns the manifest of a finished folder.

    Raises:
      ConfigError: the manifest is missing, damaged or of another format.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise ConfigError(
            f"{folder} is unfinished: it has no {MANIFEST}. Run the same `python -m hunyuan_jax "
            "tokenize` again; it continues."
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(
            f"{path} is damaged ({error}); copy it again, or remove the folder and tokenize again."
        ) from error
    if manifest["format"] != FORMAT:
        raise ConfigError(
            f"{path} has format {manifest['format']}, this version reads {FORMAT}; tokenize again."
        )
    return manifest


def report_of(manifest: dict[str, Any]) -> str:
    """Returns a manifest's counts as text, formatted by `source.Tally`."""
    tally = source.Tally(1.0, "")
    for name, counts in manifest["files"].items():
        tally.add_file(name, source.FileCounts(**counts))
    return str(tally)


def damaged_files(folder: str | os.PathLike) -> list[str]:
    """Returns the files of a finished folder whose SHA-256 is not the manifest's.

    Reads all of them.
    """
    manifest = read_manifest(folder)
    files = [(shard["file"], shard["sha256"]) for shard in manifest["shards"]] + [
        (INDEX, manifest["index_sha256"])
    ]
    return [
        name
        for name, expected in files
        if not (Path(folder) / name).is_file() or file_digest(Path(folder) / name) != expected
    ]


def file_digest(path: str | os.PathLike) -> str:
    """Returns the SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def document_ids(
    document: source.Document, file: str, tokenizer: Tokenizer, tally: source.Tally
) -> Iterator[np.ndarray]:
    """Yields the ids of a document in parts, with bos and eos; counts it in `tally`."""
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    tally.add_document(file, 0)
    yield np.array([tokenizer.bos_id], dtype)
    for part in document.parts:
        tally.add_bytes(file, len(part.encode()))
        yield tokenizer.encode_array(part).astype(dtype, copy=False)
    yield np.array([tokenizer.eos_id], dtype)


def name_hash(name: str) -> int:
    """Returns a 64-bit hash that decides on which side of the split a document is.

    Unlike `hash`, it is the same in every process.
    """
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")


def pack_record(name: str, number: int, ids: np.ndarray) -> bytes:
    """Returns the bytes of a piece's record."""
    encoded = name.encode()[: 2**16 - 1]
    return (
        _HEADER.pack(number, len(encoded), ids.itemsize)
        + encoded
        + ids.astype(f"<u{ids.itemsize}", copy=False).tobytes()
    )


def _unpack(record: bytes) -> tuple[str, int, np.ndarray]:
    """Returns (document, number of the piece, ids) of a record."""
    number, length, itemsize = _HEADER.unpack_from(record)
    start = _HEADER.size + length
    return (
        record[_HEADER.size : start].decode(errors="replace"),
        number,
        np.frombuffer(record, f"<u{itemsize}", offset=start),
    )


def _check_size(num_bytes: int, option: str) -> None:
    if num_bytes > IN_MEMORY_BYTES:
        raise ConfigError(
            f"{option} holds {num_bytes / 1e6:,.0f} MB; text above {IN_MEMORY_BYTES / 1e6:,.0f} "
            "MB is not tokenised at every start. Do it once, with `python -m hunyuan_jax tokenize "
            "--input=... --output=DIR --tokenizer=...`, and point it at DIR."
        )


def _allow_open_files(count: int) -> None:
    """Raises this process's limit of open files to `count` if it is lower.

    Raises:
      ConfigError: the system's hard limit is lower.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if resource.RLIM_INFINITY != hard < count:
        raise ConfigError(
            f"reading the token shards takes up to {count} open files, this machine allows "
            f"{hard}. Raise `ulimit -Hn`, or make fewer shards with `tokenize --shard_mb`."
        )
    if resource.RLIM_INFINITY != soft < count:
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))
