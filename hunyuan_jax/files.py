"""Atomic file writes, on local disks and behind fsspec URLs.

fsspec is imported only for a URL: the import takes 0.25 s.
"""

import contextlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from hunyuan_jax.errors import ConfigError

_UPLOAD_BYTES = 2**24  # bytes of a file in memory, and in one request


def user_path(path: str) -> str:
    """Expands `~` in a path or URL of the user; every option that is a path goes through here."""
    return os.path.expanduser(path)


def filesystem(url: str, option: str) -> tuple[Any, str]:
    """Returns (fsspec file system, path in it without a final '/') of a URL or a local path.

    Args:
      url: the URL or path.
      option: name of its option, for errors.

    Raises:
      ConfigError: the protocol is unknown, or its package is not installed.
    """
    import fsspec.core

    try:
        fs, root = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ConfigError(
            f"{option} = {url!r} cannot be used: {error}. It must be a URL that fsspec knows, "
            "such as gs://BUCKET/PATH (pip install 'hunyuan_jax[gcs]'), s3://BUCKET/PATH (pip "
            "install s3fs) or file:///PATH."
        ) from error
    return fs, root.rstrip("/")


def upload(fs: Any, path: str, pieces: Iterable[bytes | memoryview]) -> None:
    """Writes a file of an fsspec file system.

    After an error the file does not exist or has its old contents; a local one may be truncated.
    `put_file` is not used: gcsfs sends small files between line feeds, and a file that ends in a
    carriage return may lose it.
    """
    from fsspec.implementations.local import LocalFileSystem

    # With autocommit, an error would commit the pieces so far.  Without it, a local file system
    # writes to the disk of /tmp first.
    is_local = isinstance(fs, LocalFileSystem)
    file = fs.open(path, "wb", block_size=_UPLOAD_BYTES, autocommit=is_local)
    try:
        with file:
            for piece in pieces:
                file.write(piece)
                del piece  # frees it before the next one is made
    except BaseException:
        # The discarded parts are invisible, and the first error says more.
        with contextlib.suppress(Exception):
            file.discard()
        raise
    if not is_local:
        file.commit()


def blocks(path: Path) -> Iterator[bytes]:
    """Yields the bytes of a local file, in blocks."""
    with path.open("rb") as file:
        while block := file.read(_UPLOAD_BYTES):
            yield block


def write_whole(path: Path, data: bytes) -> None:
    """Writes a local file atomically: after a crash it is complete or unchanged."""
    with replacing(path, path.with_name(f".{path.name}.{os.getpid()}")) as temporary:
        temporary.write_bytes(data)


@contextlib.contextmanager
def replacing(path: Path, temporary: Path) -> Iterator[Path]:
    """Yields `temporary`, and renames it to `path` when the block ends and it is on disk.

    Both must be on the same local disk.
    """
    yield temporary
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def json_object(where: str, text: bytes) -> dict[str, Any]:
    """Parses a JSON object; `where` names its file.

    Raises:
      ConfigError: it is not JSON, or not an object.
    """
    try:
        value = json.loads(text)
    except ValueError as e:  # not JSON, or not even UTF-8
        raise ConfigError(f"{where} is not valid JSON: {e}.") from e
    if not isinstance(value, dict):
        raise ConfigError(
            f"{where} holds a JSON {type(value).__name__}; it must be an object of fields."
        )
    return value
