"""Mirrors the finished checkpoints to a bucket or another fsspec file system: URL/STEP/...

Uploads run in the background and never stop the run.  A step whose upload fails in every attempt
is skipped with a warning.  The manifest is uploaded last: a step with a manifest is complete.
Each process uploads a share of the files.  Imports no jax.
"""

import posixpath
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from hunyuan_jax import files
from hunyuan_jax.checkpoint import manifest as manifest_lib
from hunyuan_jax.config import CheckpointConfig
from hunyuan_jax.errors import ConfigError

_ATTEMPTS = 8  # about two minutes with the pauses below
_PATIENCE = 4  # failed attempts before a warning: 7 s
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 30.0  # seconds between attempts, doubled each time
_POLL_SECONDS = 1.0
_PEER_SECONDS = 3600.0  # longest wait for the other processes to upload their share

Result = TypeVar("Result")


class MirrorError(ConfigError):
    """The mirror failed in every attempt."""


class Mirror:
    """The mirror of one run's checkpoints.  Every process of a run creates one."""

    def __init__(
        self,
        cfg: CheckpointConfig,
        folder: Path,
        index: int,
        count: int,
        report: Callable[[str], None],
    ):
        """Connects to cfg.mirror; `folder` holds the local steps; process `index` of `count`.

        Raises:
          ConfigError: the file system is unknown or its package is not installed.
        """
        self._cfg, self._folder, self._index, self._count = cfg, folder, index, count
        self._report = report
        self._fs, self._root = files.filesystem(cfg.mirror, "config.checkpoint.mirror")
        self._losses: dict[int, float | None] | None = None  # of the complete steps there
        self._queue: queue.Queue[int | None] = queue.Queue()
        self._thread: threading.Thread | None = None
        self.uploading: int | None = None

    # --- What is there

    def steps(self) -> list[int]:
        """Returns the complete steps, in rising order.

        Raises:
          MirrorError: the mirror cannot be read.
        """
        return [
            step
            for step in self._all_steps()
            if self._attempt(lambda step=step: self._is_complete(step))
        ]

    def manifest(self, step: int) -> dict[str, Any]:
        """Returns the manifest of a complete step.

        Raises:
          ValueError: the manifest is damaged.
          MirrorError: the mirror cannot be read.
        """
        return manifest_lib.parse(
            self._attempt(lambda: self._fs.cat_file(self._path(step, manifest_lib.FILE)))
        )

    def download(self, step: int, target: Path) -> str | None:
        """Downloads this process' share of a complete step's files to a folder.

        Returns:
          What is wrong with the files, or None.

        Raises:
          MirrorError: the mirror cannot be read.
        """
        try:
            manifest = self.manifest(step)
        except MirrorError:
            raise
        except ValueError as error:
            return str(error)
        names = self._share(manifest)
        for name in names:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            if not self._attempt(
                lambda name=name: self._get(self._path(step, name), target / name)
            ):
                return f"{name} is missing"
        return manifest_lib.problem(target, manifest, names)

    def set_aside(self, step: int) -> str:
        """Renames a damaged step so that it is not restored; returns its new address."""
        target = next(
            name
            for n in range(1, 1000)
            if not self._fs.exists(name := f"{self._root}/damaged-{step}{f'-{n}' * (n > 1)}")
        )
        self._attempt(lambda: self._fs.mv(self._path(step), target, recursive=True))
        return target

    # --- Uploading

    def remove_incomplete(self) -> None:
        """Removes interrupted uploads.  One process calls it, while no process uploads."""
        for step in set(self._all_steps()) - set(self.steps()):
            self._attempt(lambda step=step: self._rm(self._path(step)))

    def start(self, steps: list[int]) -> None:
        """Starts the upload thread; first it uploads the local `steps` that the mirror lacks."""
        for step in sorted(set(steps) - set(self.steps()) - set(self._queue.queue)):
            self._queue.put(step)
        self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)
        self._thread.start()

    def add(self, step: int) -> None:
        """Queues a local step; it is uploaded when its manifest exists."""
        self._queue.put(step)

    def close(self) -> None:
        """Waits until every queued step is uploaded or skipped."""
        if self._thread:
            self._queue.put(None)
            self._thread.join()

    def _work(self) -> None:
        while (step := self._queue.get()) is not None:
            self.uploading = step
            try:
                self._upload(step)
            except FileNotFoundError:
                self._report(
                    f"warning: step {step} was replaced by newer ones before it was uploaded to "
                    f"{self._cfg.mirror}."
                )
            except (OSError, ValueError) as error:
                reason = str(error).rstrip(".")
                self._report(
                    f"warning: step {step} was not uploaded to {self._cfg.mirror}: {reason}. The "
                    "next one will be tried again."
                )
            self.uploading = None

    def _upload(self, step: int) -> None:
        folder = self._folder / str(step)
        manifest = self._local_manifest(folder)
        for name in self._share(manifest):
            self._attempt(lambda name=name: self._put(folder / name, self._path(step, name)))
        if self._index == 0:
            if self._count > 1:
                self._wait_for(step, {name: size for name, (size, _) in manifest["files"].items()})
            self._attempt(
                lambda: self._put(folder / manifest_lib.FILE, self._path(step, manifest_lib.FILE))
            )
            self._delete_old(step, manifest)

    def _local_manifest(self, folder: Path) -> dict[str, Any]:
        """Waits for the manifest of a step, which process 0 may still be writing.

        Raises:
          FileNotFoundError: the step was deleted, or process 0 took too long.
        """
        deadline = time.monotonic() + _PEER_SECONDS
        while folder.is_dir() and time.monotonic() < deadline:
            if manifest := manifest_lib.read(folder):
                return manifest
            time.sleep(_POLL_SECONDS)
        raise FileNotFoundError(folder)

    def _put(self, source: Path, target: str) -> None:
        """Uploads one file and checks the size of the copy."""
        if not source.is_file():
            raise _GoneError(source)
        self._fs.makedirs(posixpath.dirname(target), exist_ok=True)
        files.upload(self._fs, target, files.blocks(source))
        self._fs.invalidate_cache()
        if (size := self._fs.info(target)["size"]) != source.stat().st_size:
            raise OSError(f"{target} has {size} bytes instead of {source.stat().st_size}")

    def _get(self, source: str, target: Path) -> bool:
        """Downloads one file; returns False if it does not exist."""
        self._fs.invalidate_cache()
        if not self._fs.exists(source):
            return False
        self._fs.get_file(source, str(target))
        return True

    def _wait_for(self, step: int, sizes: dict[str, int]) -> None:
        """Waits until the other processes have uploaded their files."""
        deadline = time.monotonic() + _PEER_SECONDS
        while True:
            found = self._attempt(lambda: self._sizes(step))
            missing = [name for name, size in sizes.items() if found.get(name) != size]
            if not missing:
                return
            if time.monotonic() > deadline:
                raise MirrorError(
                    f"{len(missing)} files of other processes did not come, such as {missing[0]}"
                )
            time.sleep(_POLL_SECONDS)

    def _is_complete(self, step: int) -> bool:
        return self._fs.exists(self._path(step, manifest_lib.FILE))

    def _sizes(self, step: int) -> dict[str, int]:
        self._fs.invalidate_cache()
        found = self._fs.find(self._path(step), detail=True)
        return {
            path.removeprefix(self._path(step) + "/"): info["size"] for path, info in found.items()
        }

    def _delete_old(self, step: int, manifest: dict[str, Any]) -> None:
        """Deletes old steps by the rule of the local ones."""
        if self._losses is None:
            self._losses = {
                other: self.manifest(other)["validation_loss"] for other in self.steps()
            }
        self._losses[step] = manifest["validation_loss"]
        for old in self._losses.keys() - manifest_lib.kept(
            self._losses, self._cfg.keep, self._cfg.keep_every, self._cfg.keep_best
        ):
            # The manifest goes first: a step without one is incomplete.
            self._attempt(lambda old=old: self._rm(self._path(old, manifest_lib.FILE)))
            self._attempt(lambda old=old: self._rm(self._path(old)))
            del self._losses[old]

    def _rm(self, path: str) -> None:
        self._fs.invalidate_cache()
        if self._fs.exists(path):
            self._fs.rm(path, recursive=True)

    # --- Everything

    def _share(self, manifest: dict[str, Any]) -> list[str]:
        return manifest_lib.share(
            {name: size for name, (size, _) in manifest["files"].items()}, self._index, self._count
        )

    def _all_steps(self) -> list[int]:
        def names():
            self._fs.invalidate_cache()
            return self._fs.ls(self._root, detail=False) if self._fs.exists(self._root) else []

        found = (posixpath.basename(path.rstrip("/")) for path in self._attempt(names))
        return sorted(int(name) for name in found if name.isdecimal())

    def _path(self, step: int, name: str = "") -> str:
        return posixpath.join(self._root, str(step), name).rstrip("/")

    def _attempt(self, function: Callable[[], Result]) -> Result:
        """Calls a function until it succeeds; returns its result.

        Raises:
          MirrorError: it failed in every attempt.
          FileNotFoundError: a local file that it needs was deleted.
        """
        pause = _FIRST_PAUSE
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                return function()
            except _GoneError as error:
                raise FileNotFoundError(error.path) from error
            except Exception as error:  # every file system has its own exceptions
                if attempt == _ATTEMPTS:
                    raise MirrorError(
                        f"config.checkpoint.mirror = {self._cfg.mirror!r} has failed {_ATTEMPTS} "
                        f"times: {type(error).__name__}: {error}. Check the address and the "
                        "credentials, or set it to '' to go on without a mirror."
                    ) from error
                if attempt == _PATIENCE:
                    self._report(
                        f"warning: {self._cfg.mirror} has failed {attempt} times ({error}); it is "
                        f"tried {_ATTEMPTS} times in all."
                    )
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
        raise AssertionError("not reached")


class _GoneError(Exception):
    """A local file was deleted with its step."""

    def __init__(self, path: Path):
        super().__init__(str(path))
        self.path = path
