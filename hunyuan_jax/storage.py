"""A folder that a user names by a local path, an fsspec URL or a hub id: byte ranges out, whole
files in, each in place only when it is complete.

A path is parsed here, once; what reads or writes there takes the `Place`.  fsspec is imported only
for a URL.
"""

import contextlib
import copy
import difflib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

from hunyuan_jax import files, hub
from hunyuan_jax.errors import ConfigError

_TEMPORARY = ".partial"


class Place:
    """Names below are relative to the folder, with '/'; "" is the place itself, which may be a
    file.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        option: str = "the folder",
        patterns: Sequence[str] | None = None,
    ):
        """Parses a path; of a hub id (`hub.hub_id`) the files that match are fetched.

        Args:
          path: of the user.
          option: name of the user's option, for errors.
          patterns: of names in the folder; None where a hub id is not a place.

        Raises:
          ConfigError: as `files.user_path` and `hub.fetch`, or a protocol that fsspec does not
            have here.
        """
        self.url = files.user_path(path, option, files.AnyPath)
        self._hub_id = None if patterns is None else hub.hub_id(self.url)
        self.is_on_hub = self._hub_id is not None
        if self.is_on_hub:
            self.url, self._hub_id = hub.fetch(self._hub_id, patterns)
        self.is_local = "://" not in self.url
        if self.is_local:
            self._root = os.path.abspath(self.url)
        else:
            self._fs, self._root = files.filesystem(self.url, option)

    def __str__(self) -> str:
        return self.url

    def inside(self, name: str) -> Self:
        """A folder or file in it."""
        return self._moved(lambda path: os.path.join(path, name))

    def parent(self) -> tuple[Self, str]:
        """(the folder that it lies in, its name there)."""
        return self._moved(os.path.dirname), os.path.basename(self._root)

    def _moved(self, move: Callable[[str], str]) -> Self:
        found = copy.copy(self)
        found.url, found._root = move(self.url), move(self._root)
        if self.is_on_hub:
            found._hub_id = self._hub_id._replace(folder=move(self._hub_id.folder))
        return found

    def path(self, name: str = "") -> str:
        """The path of a file for the file system; a real path when local."""
        return f"{self._root}/{name}" if name else self._root

    def fetch(self, patterns: Sequence[str]) -> None:
        """Fetches more files of a hub id, from the same commit.  Elsewhere all are there."""
        if self.is_on_hub:
            hub.fetch(self._hub_id, patterns)

    def nearest(self) -> str | None:
        """A folder of a similar name beside a local one that does not exist, or None."""
        beside, name = os.path.split(self.path())
        if not self.is_local or os.path.isdir(self.path()) or not os.path.isdir(beside):
            return None
        with os.scandir(beside) as found:
            folders = [entry.name for entry in found if entry.is_dir()]
        close = difflib.get_close_matches(name, folders, n=1)
        return os.path.join(beside, close[0]) if close else None

    def is_file(self, name: str = "") -> bool:
        """Whether there is such a file."""
        path = self.path(name)
        return os.path.isfile(path) if self.is_local else self._fs.isfile(path)

    def size(self, name: str = "") -> int:
        """Bytes of a file."""
        path = self.path(name)
        return os.path.getsize(path) if self.is_local else self._fs.size(path)

    def names(self) -> list[str]:
        """Names of the files directly in the folder; [] if there is none."""
        return list(self._listed(""))

    def sizes(self, folder: str = "") -> dict[str, int]:
        """Bytes of each file directly in a folder; empty if there is no such folder.

        Raises:
          ConfigError: a file system that does not tell sizes.
        """
        sizes = self._listed(folder)
        if None in sizes.values():  # a web server
            raise ConfigError(
                f"{self.url} does not tell the sizes of its files; copy the folder to a disk or a "
                "bucket first."
            )
        return sizes

    def _listed(self, folder: str) -> dict[str, Any]:
        path = self.path(folder)
        if self.is_local:
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
        return {
            entry["name"].rsplit("/", 1)[-1]: entry["size"]
            for entry in found
            if entry["type"] == "file"
        }

    def read(self, name: str = "", start: int | None = None, end: int | None = None) -> bytes:
        """The bytes [start, end) of a file; all by default."""
        path = self.path(name)
        if not self.is_local:
            return self._fs.cat_file(path, start=start, end=end)
        with open(path, "rb") as file:
            file.seek(start or 0)
            return file.read(-1 if end is None else end - file.tell())

    def read_json(self, name: str) -> dict[str, Any]:
        """The JSON object in a file.

        Raises:
          ConfigError: something else is in it.
        """
        text = self.read(name)
        return files.json_object(f"{self}/{name}", text)

    @contextlib.contextmanager
    def local_copy(self, suffixes: tuple[str, ...]) -> Iterator[Path]:
        """Yields a local path for readers that take no bytes: that of the place if it is local,
        else a temporary folder with its files whose names end in `suffixes`.
        """
        if self.is_local:
            yield Path(self.path())
            return
        with tempfile.TemporaryDirectory() as folder:
            for name in self.names():
                if name.endswith(suffixes):
                    Path(folder, name).write_bytes(self.read(name))
            yield Path(folder)

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
        if self.is_local:
            os.remove(self.path(name))
        else:
            self._fs.rm_file(self.path(name))

    def check_space(self, num_bytes: int) -> None:
        """Raises ConfigError if the local disk of this folder has less room; other file systems do
        not say.
        """
        if not self.is_local:
            return
        folder = self.path()
        while not os.path.isdir(folder):
            folder = os.path.dirname(folder)
        free = shutil.disk_usage(folder).free
        if free < num_bytes:
            raise ConfigError(
                f"{self.url}: not enough disk: {num_bytes / 1e9:.3f} GB are still to be written, "
                f"{free / 1e9:.3f} GB are free. Nothing "
                "was started; make room or use another --output."
            )


class HeldFiles(Place):
    """Files in memory that were made of one file, seen as a folder that can only be read.

    file: what they were made of.
    """

    def __init__(self, file: Place, held: dict[str, bytes]):
        """`held`: by name."""
        self.file, self._held = file, held
        self.url, self.is_local, self.is_on_hub = file.url, False, False

    def is_file(self, name: str = "") -> bool:
        """See `Place.is_file`."""
        return name in self._listed("")

    def _listed(self, folder: str) -> dict[str, int]:
        return {} if folder else {name: len(text) for name, text in self._held.items()}

    def read(self, name: str = "", start: int | None = None, end: int | None = None) -> bytes:
        """See `Place.read`."""
        if name not in self._held:
            raise FileNotFoundError(f"{self}/{name}")
        return self._held[name][start:end]
