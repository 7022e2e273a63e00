"""A folder that is local or behind an fsspec URL: byte ranges out, whole files in, each in place
only when it is complete.
"""

import difflib
import os
import shutil
from collections.abc import Iterable

from fsspec.implementations.local import LocalFileSystem

from hunyuan_jax import files
from hunyuan_jax.errors import ConfigError

_TEMPORARY = ".partial"


class Place:
    """Names below are relative to the folder, with '/'."""

    def __init__(self, url: str | os.PathLike, option: str = "the folder"):
        """`option` is the name of the user's option, for errors.

        Raises:
          ConfigError: as `files.user_path`, or a protocol that fsspec does not have here.
        """
        self.url = files.user_path(url, option, files.AnyPath)
        self._fs, self._root = files.filesystem(self.url, option)
        self.is_local = isinstance(self._fs, LocalFileSystem)

    def __str__(self) -> str:
        return self.url

    def path(self, name: str = "") -> str:
        """The path of a file for the file system; a real path when local."""
        return f"{self._root}/{name}" if name else self._root

    def nearest(self) -> str | None:
        """A folder of a similar name beside a local one that does not exist, or None."""
        beside, name = os.path.split(self.path().rstrip("/"))
        if not self.is_local or os.path.isdir(self.path()) or not os.path.isdir(beside):
            return None
        with os.scandir(beside) as found:
            folders = [entry.name for entry in found if entry.is_dir()]
        close = difflib.get_close_matches(name, folders, n=1)
        return os.path.join(beside, close[0]) if close else None

    def is_file(self, name: str) -> bool:
        """Whether there is such a file."""
        return self._fs.isfile(self.path(name))

    def sizes(self, folder: str = "") -> dict[str, int]:
        """Bytes of each file directly in a folder; empty if there is no such folder.

        Raises:
          ConfigError: a file system that does not tell sizes.
        """
        path = self.path(folder)
        if self.is_local:  # a few times quicker than asking fsspec for everything about each file
            if not os.path.isdir(path):
                return {}
            with os.scandir(path) as found:
                return {
                    entry.name: entry.stat().st_size
                    for entry in found
                    if entry.is_file() and not entry.name.endswith(_TEMPORARY)
                }
        try:
            found = self._fs.ls(path, detail=True)
        except FileNotFoundError:
            return {}
        sizes = {
            entry["name"].rsplit("/", 1)[-1]: entry["size"]
            for entry in found
            if entry["type"] == "file"
        }
        if None in sizes.values():  # a web server
            raise ConfigError(
                f"{self.url} does not tell the sizes of its files; copy the folder to a disk or a "
                "bucket first."
            )
        return sizes

    def read(self, name: str, start: int | None = None, end: int | None = None) -> bytes:
        """The bytes [start, end) of a file; all by default."""
        return self._fs.cat_file(self.path(name), start=start, end=end)

    def write(self, name: str, pieces: Iterable[bytes | memoryview]) -> None:
        """Writes a file that appears under its name only when all pieces are written; a killed
        process leaves none of it.
        """
        path = self.path(name)
        if not self.is_local:
            files.upload(self._fs, path, pieces)
            return
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path + _TEMPORARY, "wb") as f:
            for piece in pieces:
                f.write(piece)
                del piece  # or it would be held while the next one is made
        os.replace(path + _TEMPORARY, path)

    def remove(self, name: str) -> None:
        """Removes a file."""
        self._fs.rm_file(self.path(name))

    def check_space(self, num_bytes: int) -> None:
        """Raises ConfigError if the local disk of this folder has less room; other file systems do
        not say.
        """
        if not self.is_local:
            return
        folder = os.path.abspath(self.path())
        while not os.path.isdir(folder):
            folder = os.path.dirname(folder)
        free = shutil.disk_usage(folder).free
        if free < num_bytes:
            raise ConfigError(
                f"{self.url}: not enough disk: {num_bytes / 1e9:.3f} GB are still to be written, "
                f"{free / 1e9:.3f} GB are free. Nothing "
                "was started; make room or use another --output."
            )
