"""How process 0 tells the other processes of an engine what to run: a TCP connection to each.

Messages go beside the devices' network.  As a collective, the message about a step would wait
behind the step before it, and the devices would then wait for the hosts.
A message is a header of fixed size and the bytes of arrays, whose shapes both ends know from the
header.  A token that process 0 draws keeps strangers out.  Imports no jax.
"""

import collections
import contextlib
import enum
import hmac
import ipaddress
import os
import queue
import secrets
import socket
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, NoReturn

import numpy as np

from hunyuan_jax.errors import ConfigError

# Time for the others to connect, and for one of them to show the token.
_MEETING_SECONDS = 60.0
_HELLO_SECONDS = 5.0
# A process whose call has failed waits so long for the news that another one is gone, which is
# then the reason.
_REASON_SECONDS = 5.0
# A host that has vanished answers nothing: probes find out within about 20 s.  Not every system
# has every option.
_KEEPALIVE = {
    "TCP_KEEPIDLE": 5,
    "TCP_KEEPINTVL": 5,
    "TCP_KEEPCNT": 3,
    "TCP_USER_TIMEOUT": 20_000,
}
_TOKEN_BYTES = 16
_HELLO = struct.Struct(f"!{_TOKEN_BYTES}sI")
_HEADER = struct.Struct("!B8sIQ")
_TOGETHER = "the processes of an engine end together; start the same command everywhere again"


class Kind(enum.IntEnum):
    """What a message says.

    To the others: COMPILE a program; CALL it with the arrays that follow; PAUSE after all that,
    until more comes; STOP after all that, with exit status `size`; STOP_NOW, with a text that says
    why, or none.  To process 0: COMPILED; FAILED, with a text.
    """

    COMPILE = 1
    CALL = 2
    PAUSE = 3
    STOP = 4
    STOP_NOW = 5
    COMPILED = 6
    FAILED = 7


class Message(NamedTuple):
    """name, size: of a program, in at most 8 letters."""

    kind: Kind
    name: str = ""
    size: int = 0
    payload: bytes = b""


# Ends the process with a line and an exit status.
End = Callable[[str, int], Any]


def end_process(line: str, status: int) -> NoReturn:
    """Ends this process at once, whatever its threads wait for."""
    if line:
        print(line, file=sys.stderr, flush=True)
    os._exit(status)


def to_bytes(arrays: Sequence[Any]) -> bytes:
    """The bytes of arrays and numpy scalars, one after the other."""
    return b"".join(np.asarray(array).tobytes() for array in arrays)


def from_bytes(like: Sequence[Any], data: bytes) -> list[np.ndarray]:
    """The arrays that `to_bytes` was given.

    Args:
      like: arrays of their shapes and dtypes.

    Raises:
      ValueError: there are more or fewer bytes.
    """
    sizes = [np.asarray(array).nbytes for array in like]
    if sum(sizes) != len(data):
        raise ValueError(f"{len(data)} bytes came for arrays of {sum(sizes)}")
    arrays, start = [], 0
    for array, size in zip(map(np.asarray, like), sizes, strict=True):
        part = np.frombuffer(data, array.dtype, array.size, start)
        arrays.append(part.reshape(array.shape))
        start += size
    return arrays


class _Connection:
    """Messages over a connected socket.  Any thread may send, one may receive."""

    def __init__(self, sock: socket.socket):
        sock.settimeout(None)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEPALIVE.items():
            if hasattr(socket, name):
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self._socket, self._lock = sock, threading.Lock()

    def send(self, message: Message) -> None:
        """Raises OSError if the other end is gone."""
        kind, name, size, payload = message
        header = _HEADER.pack(kind, name.encode(), size, len(payload))
        with self._lock:
            self._socket.sendall(header + payload)

    def receive(self) -> Message:
        """Waits for a message; raises OSError if the other end is gone."""
        kind, name, size, num_bytes = _HEADER.unpack(self._read(_HEADER.size))
        payload = self._read(num_bytes)
        return Message(Kind(kind), name.rstrip(b"\0").decode(), size, payload)

    def close(self) -> None:
        """No more messages; the other end notices."""
        self._socket.close()

    def _read(self, num_bytes: int) -> bytes:
        found = bytearray(num_bytes)
        view = memoryview(found)
        while view:
            num = self._socket.recv_into(view)
            if not num:
                raise ConnectionError("the other end is gone")
            view = view[num:]
        return bytes(found)


class Alone:
    """As `Leader`, where there are no others."""

    def compile(self, name: str, size: int) -> None:
        """Nobody else compiles."""

    def wait_compiled(self, name: str, size: int) -> None:
        """Nobody is waited for."""

    def call(self, name: str, size: int, arrays: Sequence[Any]) -> None:
        """Nobody else calls."""

    def pause(self) -> None:
        """Nobody else does something else."""

    def stop(self, status: int, at_once: bool = False) -> None:
        """Nobody else ends."""

    def wait_for_reason(self) -> None:
        """Nobody is gone."""


class Leader(Alone):
    """Process 0's end.

    address: what the others need to know to connect.
    """

    def __init__(self, host: str, num_processes: int, end: End = end_process):
        """Listens.

        Args:
          host: name or address of process 0's host, as the others know it.
          end: called in a thread when another process is gone or has failed.

        Raises:
          ConfigError: the host is not this one.
        """
        self._num, self._end = num_processes, end
        self._token = secrets.token_bytes(_TOKEN_BYTES)
        try:
            self._listener = _listener(host)
        except OSError as e:
            raise ConfigError(
                f"process 0 cannot listen on {host}, the address at which the others have met it: "
                f"{e.strerror or e}. JAX_COORDINATOR_ADDRESS must name a host or address of the "
                "machine that process 0 runs on."
            ) from e
        self.address = f"{host} {self._listener.getsockname()[1]} {self._token.hex()}"
        self._others: dict[int, _Connection] = {}
        self._news = threading.Condition()
        self._num_compiled: collections.Counter[tuple[str, int]] = collections.Counter()
        self._loss, self._is_ending, self._is_paused = "", False, False

    def accept(self, seconds: float = _MEETING_SECONDS) -> None:
        """Waits until all others have connected.

        Raises:
          ConfigError: some have not.
        """
        until = time.monotonic() + seconds
        with self._listener as listener:
            while missing := set(range(1, self._num)) - self._others.keys():
                listener.settimeout(max(0.001, until - time.monotonic()))
                try:
                    sock = listener.accept()[0]
                except TimeoutError:
                    raise ConfigError(
                        f"processes {sorted(missing)} of {self._num} have not connected to "
                        f"{' port '.join(self.address.split()[:2])} within {seconds:g} s. Let the "
                        "hosts reach each other on every port."
                    ) from None
                process = self._shown(sock)
                if process in missing:
                    self._others[process] = _Connection(sock)
                else:
                    sock.close()
        for process in self._others:
            threading.Thread(target=self._listen, args=(process,), daemon=True).start()

    def compile(self, name: str, size: int) -> None:
        """Has the others begin to compile a program."""
        self._send(Message(Kind.COMPILE, name, size))

    def wait_compiled(self, name: str, size: int) -> None:
        """Waits until all others have compiled it."""
        with self._news:
            self._news.wait_for(
                lambda: self._loss or self._num_compiled[name, size] == self._num - 1
            )
        if self._loss:
            raise ConnectionError(self._loss)

    def call(self, name: str, size: int, arrays: Sequence[Any]) -> None:
        """Has the others call a program that all have compiled."""
        self._send(Message(Kind.CALL, name, size, to_bytes(arrays)))

    def pause(self) -> None:
        """Lets the others leave `Follower.messages` after all calls.  Until the next message a
        process may end unnoticed.
        """
        self._send(Message(Kind.PAUSE))

    def stop(self, status: int, at_once: bool = False) -> None:
        """Has the others end with an exit status: after all calls, or at once."""
        self._is_ending = True
        self._send(Message(Kind.STOP_NOW if at_once else Kind.STOP, size=status))

    def wait_for_reason(self) -> None:
        """Waits a while for the news that another process is gone, which ends this one."""
        with self._news:
            self._news.wait_for(lambda: self._loss, _REASON_SECONDS)

    def _send(self, message: Message) -> None:
        self._is_paused = message.kind == Kind.PAUSE
        for process, connection in self._others.items():
            try:
                connection.send(message)
            except OSError:
                self._lose(process, "is gone")

    def _shown(self, sock: socket.socket) -> int | None:
        """The number of the process that has connected; None for a stranger."""
        sock.settimeout(_HELLO_SECONDS)
        try:
            hello = sock.recv(_HELLO.size, socket.MSG_WAITALL)
        except OSError:
            return None
        token, process = _HELLO.unpack(hello.ljust(_HELLO.size, b"\0"))
        return process if hmac.compare_digest(token, self._token) else None

    def _listen(self, process: int) -> None:
        with contextlib.closing(self._others[process]) as connection:
            while True:
                try:
                    message = connection.receive()
                except (OSError, ValueError):
                    if not self._is_paused:  # else the next message will not reach it
                        self._lose(process, "is gone")
                    return
                if message.kind == Kind.FAILED:
                    self._lose(process, f"has failed: {message.payload.decode(errors='replace')}")
                    return
                with self._news:
                    self._num_compiled[message.name, message.size] += 1
                    self._news.notify_all()

    def _lose(self, process: int, what: str) -> None:
        line = f"error: process {process} of {self._num} {what}; {_TOGETHER}."
        with self._news:
            if self._is_ending:
                return
            self._is_ending, self._loss = True, line
            self._news.notify_all()
        text = Message(Kind.STOP_NOW, size=1, payload=line.encode())
        for other, connection in self._others.items():
            if other != process:
                with contextlib.suppress(OSError):
                    connection.send(text)
        self._end(line, 1)


class Follower:
    """The end of another process.

    status: that which process 0 has said, after `messages`.
    """

    def __init__(self, address: str, process: int, num_processes: int, end: End = end_process):
        """Connects.

        Args:
          address: the `Leader`'s.
          end: called in a thread when process 0 is gone or says so.

        Raises:
          ConfigError: it cannot be reached.
        """
        host, port, token = address.split()
        self._name, self._end = f"process {process} of {num_processes}", end
        self._first = f"process 0 of {num_processes}"
        try:
            sock = socket.create_connection((host, int(port)), _MEETING_SECONDS)
            sock.sendall(_HELLO.pack(bytes.fromhex(token), process))
        except OSError as e:
            raise ConfigError(
                f"{self._name} cannot connect to process 0 at {host} port {port}: "
                f"{e.strerror or e}. Let the hosts reach each other on every port."
            ) from e
        self._connection = _Connection(sock)
        self._queue: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self.status = 0

    def messages(self) -> Iterator[Message]:
        """Yields the programs to compile and to call, until process 0 pauses or stops.  After a
        pause it can be called again.
        """
        threading.Thread(target=self._listen, daemon=True).start()
        while (message := self._queue.get()).kind not in (Kind.PAUSE, Kind.STOP):
            yield message
        self.status = message.size

    def compiled(self, name: str, size: int) -> None:
        """Tells that a program is compiled."""
        self._send(Message(Kind.COMPILED, name, size))

    def failed(self, error: Exception) -> None:
        """Ends all processes: this one cannot go on.  Call it where the error is handled."""
        time.sleep(_REASON_SECONDS)  # if process 0 is gone, that ends this one
        traceback.print_exc(file=sys.stderr)
        text = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        self._send(Message(Kind.FAILED, payload=text.encode()))
        self._end(f"error: {self._name} has failed; {_TOGETHER}.", 1)

    def _send(self, message: Message) -> None:
        with contextlib.suppress(OSError):  # `_listen` notices that it is gone
            self._connection.send(message)

    def _listen(self) -> None:
        with contextlib.ExitStack() as stack:
            stack.callback(self._connection.close)
            while True:
                try:
                    message = self._connection.receive()
                except (OSError, ValueError):
                    self._end(f"error: {self._first} is gone; {_TOGETHER}.", 1)
                    return
                if message.kind == Kind.STOP_NOW:
                    self._end(message.payload.decode(), message.size)
                    return
                if message.kind == Kind.PAUSE:
                    stack.pop_all()
                self._queue.put(message)
                if message.kind in (Kind.PAUSE, Kind.STOP):
                    return


def _listener(host: str) -> socket.socket:
    family, _, _, _, (address, *_) = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
    # Many systems know their own name as an address that others cannot reach.
    is_own_name = ipaddress.ip_address(address).is_loopback and host not in (address, "localhost")
    return socket.create_server(("" if is_own_name else address, 0), family=family)
