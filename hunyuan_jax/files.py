"""Paths of the user; atomic file writes, on local disks and behind fsspec URLs.

fsspec is imported only for a URL: the import takes 0.25 s.
"""

import contextlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NewType

from hunyuan_jax.errors import ConfigError

# Types of the options, config fields and arguments that name a file or folder.
LocalPath = NewType("LocalPath", str)
AnyPath = NewType("AnyPath", str)  # a path, or an fsspec URL such as gs://BUCKET/PATH

_UPLOAD_BYTES = 2**24  # bytes of a file in memory, and in one request
_PROTOCOL = re.compile(r"([a-z][a-z0-9+.-]+):/(/?)")


def user_path(path: str | os.PathLike, option: str, kind: NewType = LocalPath) -> str:
    """Returns a path that a user gave, as the library uses it.

    `~` is expanded and file:///PATH is PATH; "" and words such as "byte" stay.  Applied twice, it
    changes nothing.  Every option, config field and argument that is a path goes through here.

    Args:
      path: of the user.
      option: name of the option, field or argument, for errors.
      kind: LocalPath or AnyPath.

    Raises:
      ConfigError: a URL where only local paths are read or written, a URL that lost a slash, the
        home of an unknown user, or a NUL character.
    """
    given = os.fsdecode(path)
    path = given.removeprefix("file://")
    if "\0" in path:
        raise ConfigError(f"{option} = {given!r} holds a NUL character; no path can.")
    if kind is LocalPath and "://" in path:
        raise ConfigError(
            f"{option} = {given!r} is a URL; only a path of this machine can be used here, "
            "such as that of a mounted bucket."
        )
    lost = _PROTOCOL.match(path)
    if lost and not lost[2] and not os.path.lexists(lost[1] + ":"):
        raise ConfigError(
            f"{option} = {given!r} is a URL that lost a slash, as pathlib.Path does to URLs; pass "
            f"it as text: {lost[1]}://{path[lost.end() :]}."
        )
    path = os.path.expanduser(path)
    if path.startswith("~") and not os.path.lexists(path.partition("/")[0]):
        raise ConfigError(
            f"{option} = {given!r} begins with the home of an unknown user; write ./{path} for a "
            "folder of that name."
        )
    return path


def filesystem(url: str, option: str) -> tuple[Any, str]:
    """Returns (fsspec file system, path in it without a final '/') of a URL or a local path.

    Args:
      url: as `user_path` returns it.
      option: name of its option, for errors.

    Raises:
      ConfigError: the protocol is unknown, or its package is not installed.
    """
    import fsspec.core

    require_protocol(url, option)
    fs, root = fsspec.core.url_to_fs(url)
    return fs, root.rstrip("/")


def require_protocol(path: str, option: str) -> None:
    """Raises ConfigError if a path is a URL whose protocol is unknown or not installed."""
    if "://" not in path:
        return
    import fsspec

    try:
        for protocol in path.partition("://")[0].split("::"):
            fsspec.get_filesystem_class(protocol)
    except (ImportError, ValueError) as error:
        raise ConfigError(
            f"{option} = {path!r} cannot be used: {error}. It must be a URL that fsspec knows, "
            "such as gs://BUCKET/PATH (pip install -e '.[gcs]'), s3://BUCKET/PATH (pip "
            "install s3fs) or file:///PATH."
        ) from error


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
    except (ValueError, RecursionError) as e:  # not JSON, not even UTF-8, or nested without end
        raise ConfigError(f"{where} is not valid JSON: {e}.") from e
    if not isinstance(value, dict):
        raise ConfigError(
            f"{where} holds a JSON {type(value).__name__}; it must be an object of fields."
        )
    return value
