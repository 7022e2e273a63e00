"""Files that appear under their name only when they are whole, on this machine and behind fsspec
URLs.

fsspec is imported where there is a URL: it takes a quarter of a second.
"""

import contextlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from hunyuan_jax.errors import ConfigError

_UPLOAD_BYTES = 2**24  # of a file that are in memory, and in one request


def user_path(path: str) -> str:
    """A path or URL as a user types it, with `~` expanded; every option that is a path goes
    through here.
    """
    return os.path.expanduser(path)


def filesystem(url: str, option: str) -> tuple[Any, str]:
    """(fsspec file system, path in it without a final '/') of a URL or a local path; `option` is
    what errors call it.

    Raises:
      ConfigError: no such protocol, or its package is not installed.
    """
    import fsspec.core

    try:
        fs, root = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ConfigError(
            f"{option} = {url!r} cannot be used: {error}. It must be a URL that fsspec knows, "
            "such as gs://BUCKET/PATH "
            "(pip install 'hunyuan_jax[gcs]'), s3://BUCKET/PATH (pip install s3fs) or "
            "file:///PATH."
        ) from error
    return fs, root.rstrip("/")


def upload(fs: Any, path: str, pieces: Iterable[bytes | memoryview]) -> None:
    """Writes a file of a bucket, and the like; after an error there is none, or the one of before
    (a local one may be cut off).

    Not by `put_file`: gcsfs sends small files between line feeds, and one that ends in a carriage
    return may lose it.
    """
    from fsspec.implementations.local import LocalFileSystem

    # With autocommit, leaving the block by an error would put the pieces so far in place; a local
    # file system without it writes to the disk of /tmp first.
    is_local = isinstance(fs, LocalFileSystem)
    file = fs.open(path, "wb", block_size=_UPLOAD_BYTES, autocommit=is_local)
    try:
        with file:
            for piece in pieces:
                file.write(piece)
                del piece  # or it would be held while the next one is made
    except BaseException:
        with contextlib.suppress(
            Exception
        ):  # parts that nobody can see; the error that led here says more
            file.discard()
        raise
    if not is_local:
        file.commit()


def blocks(path: Path) -> Iterator[bytes]:
    """The bytes of a local file, in parts."""
    with path.open("rb") as file:
        while block := file.read(_UPLOAD_BYTES):
            yield block


def write_whole(path: Path, data: bytes) -> None:
    """Writes a local file so that after a crash it is there as a whole, or as it was before."""
    with replacing(path, path.with_name(f".{path.name}.{os.getpid()}")) as temporary:
        temporary.write_bytes(data)


@contextlib.contextmanager
def replacing(path: Path, temporary: Path) -> Iterator[Path]:
    """`temporary`, to write a local file at, which gets its name when it is on disk; on the same
    disk as `path`.
    """
    yield temporary
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def json_object(where: str, text: bytes) -> dict[str, Any]:
    """The object of fields that a file holds; `where` names it.

    Raises:
      ConfigError: it is not JSON, or another kind of value.
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
