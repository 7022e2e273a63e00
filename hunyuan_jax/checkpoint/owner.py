"""The owner of a workdir: one run at a time, on this machine and on others.

Two signs show that an owner lives.  The kernel's lock of WORKDIR/owner.lock ends with the process,
however it ends.  Not every network file system passes that lock on to other machines, so the owner
also writes a beat into the file.  A file that another machine has left is an owner until it has
not changed for `lease` seconds; the clocks of the machines do not matter.  No file that is left
behind needs a hand.  Imports no jax.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hunyuan_jax.errors import ConfigError

FILE = "owner.lock"
LEASE_SECONDS = 90.0  # longer than network file systems keep what they have read
_BEATS = 9  # in a lease
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@contextlib.contextmanager
def owned(
    workdir: str | os.PathLike,
    report: Callable[[str], None],
    *,
    boot: str | None = None,
    lease: float = LEASE_SECONDS,
) -> Iterator[Callable[[], None]]:
    """Owns a workdir inside; yields a function that raises ConfigError if it was lost meanwhile.

    The workdir is made if there is none, and removed again if nothing else was put into it.

    Args:
      workdir: folder of the run.
      report: prints a line for the user.
      boot: names the machine since it was started; None finds it.
      lease: seconds without a beat after which an owner on another machine is gone.

    Raises:
      ConfigError: another process owns it, or it cannot be written to.
    """
    folder, path = Path(workdir), Path(workdir) / FILE
    made = [f for f in (folder, *folder.parents) if not f.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise ConfigError(
            f"--workdir={workdir} cannot be written to: {error.strerror}. Choose a folder of your "
            "own with room."
        ) from error
    try:
        _require_lock(descriptor, path, workdir)
        boot = boot or _boot()
        _require_silence(path, workdir, boot, lease, report)
        beat = _Beat(path, boot, lease)
        try:
            yield lambda: beat.require(workdir)
        finally:
            if beat.stop():
                os.ftruncate(descriptor, 0)
                if made and not _has_files(folder):
                    path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)
        if made and not path.exists():
            with contextlib.suppress(OSError):  # the first that is not empty
                for empty in (folder / "checkpoints", *made):
                    if empty.is_dir():
                        empty.rmdir()


def _has_files(folder: Path) -> bool:
    return any(path.is_file() and path.name != FILE for path in folder.rglob("*"))


def _require_lock(descriptor: int, path: Path, workdir: str | os.PathLike) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise _in_use(workdir, _read(path)) from error
    except OSError as error:
        # A file system without locks: the beat alone decides.
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
    if not path.exists() or path.stat().st_ino != os.fstat(descriptor).st_ino:
        # A start that was refused has just removed it.
        raise _in_use(workdir, {})


def _require_silence(
    path: Path,
    workdir: str | os.PathLike,
    boot: str,
    lease: float,
    report: Callable[[str], None],
) -> None:
    """Returns when no other machine's owner beats."""
    found = _bytes(path)
    owner = _read(path)
    if not found or owner.get("boot") == boot:
        return  # the lock has told about this machine
    report(
        f"{workdir} was last in use by {_name(owner)}; waiting up to {lease:.0f} s for a sign of "
        "life."
    )
    deadline = time.monotonic() + lease
    while time.monotonic() < deadline:
        time.sleep(lease / _BEATS / 5)
        now = _bytes(path)
        if not now:
            return  # it has ended
        if now != found:
            raise _in_use(workdir, _read(path))


def owner_id(workdir: str | os.PathLike) -> str | None:
    """Returns what tells the present owner of a workdir from others; None if it has none."""
    return _read(Path(workdir) / FILE).get("id")


def _in_use(workdir: str | os.PathLike, owner: dict[str, Any]) -> ConfigError:
    return ConfigError(
        f"--workdir={workdir} is in use by {_name(owner)}. Wait for its end, stop it, or use "
        "another --workdir."
    )


def _name(owner: dict[str, Any]) -> str:
    if not owner:
        return "another run"
    return f"process {owner['pid']} on {owner['host']}, started {owner['started']}"


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""


def _read(path: Path) -> dict[str, Any]:
    try:
        owner = json.loads(_bytes(path))
        return {name: owner[name] for name in ("id", "boot", "pid", "host", "started")}
    except (ValueError, KeyError, TypeError):
        return {}


def _boot() -> str:
    """Names this machine since it was started; containers on it share the name and the locks."""
    try:
        return _BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:
        return socket.gethostname()


class _Beat:
    """Writes the owner and a count into the file, every ninth of a lease."""

    def __init__(self, path: Path, boot: str, lease: float):
        self._path, self._seconds = path, lease / _BEATS
        self._owner = {
            "id": uuid.uuid4().hex,
            "boot": boot,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        self._count, self._is_lost = 0, False
        self._stopping = threading.Event()
        self._write()
        self._thread = threading.Thread(target=self._work, name="owner", daemon=True)
        self._thread.start()

    def require(self, workdir: str | os.PathLike) -> None:
        """Raises ConfigError if another run has taken the workdir."""
        self._look()
        if self._is_lost:
            raise ConfigError(
                f"--workdir={workdir} was taken over by {_name(_read(self._path))}, which saw no "
                "sign of life of this process; this run stops without saving."
            )

    def stop(self) -> bool:
        """Ends the beat; returns whether the workdir is still owned."""
        self._stopping.set()
        self._thread.join()
        self._look()
        return not self._is_lost

    def _work(self) -> None:
        while not self._stopping.wait(self._seconds):
            with contextlib.suppress(OSError):  # a full disk, a server that is away for a while
                self._look()
                if self._is_lost:
                    return
                self._write()

    def _look(self) -> None:
        owner = _read(self._path)
        self._is_lost = self._is_lost or owner.get("id", self._owner["id"]) != self._owner["id"]

    def _write(self) -> None:
        # In place: a new file would not be the one that is locked.
        self._count += 1
        text = json.dumps(self._owner | {"count": f"{self._count:09d}"}) + "\n"
        descriptor = os.open(self._path, os.O_WRONLY)
        try:
            os.pwrite(descriptor, text.encode(), 0)
            os.ftruncate(descriptor, len(text.encode()))
        finally:
            os.close(descriptor)
