"""The thread that steps the engine, and hands what comes out to the event loop."""

import asyncio
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from hunyuan_jax.infer.request import Output, Request, Stats

# Seconds after which an idle thread looks whether it is to end.
_IDLE_SECONDS = 0.2
# A step that takes longer is not waited for when the server ends.
_STEP_SECONDS = 30.0


class Engine(Protocol):
    """What this room uses of `infer.engine.Engine`; `infer/request.py` documents it."""

    def add(self, request: Request) -> None:
        """Queues a request."""

    def abort(self, id: str, choice: int | None = None) -> None:
        """Ends a request, or one of its choices."""

    def step(self) -> list[Output]:
        """Does a piece of the work that there is."""

    def wait(self, seconds: float) -> bool:
        """Waits until there is work."""

    def warm_up(self, behind: bool) -> None:
        """Compiles the programs, those that a request needs first."""

    @property
    def is_warm(self) -> bool:
        """Whether every program is compiled."""

    def stats(self) -> Stats:
        """Figures."""


class EngineFailed(RuntimeError):
    """The engine raised; nothing more can come of it."""


# (outputs of one request, seconds of time.perf_counter at which they came), or the failure.
Mail = tuple[list[Output], float] | EngineFailed


class EngineLoop:
    """Steps the engine in a thread of its own.

    All methods but the thread's own are called on the event loop.

    is_serving: requests are taken; is_ready: every program is compiled too; has_failed: the engine
    raised, and serves nobody any more.
    """

    def __init__(self, engine: Engine, on_failure: Callable[[], None]):
        """`on_failure` is called on the event loop when the engine has raised."""
        self.is_serving = self.is_ready = self.has_failed = False
        self._engine, self._on_failure = engine, on_failure
        self._loop = asyncio.get_running_loop()
        self._mail: dict[str, asyncio.Queue[Mail]] = {}
        self._is_closing = threading.Event()
        # A daemon: a process that is told twice to end does not wait for a step.
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Starts the thread, which compiles the programs first."""
        self._thread.start()

    def close(self) -> bool:
        """Ends the thread when its step is done; whether it has ended.

        Compiling cannot be interrupted, and is not waited for.
        """
        self._is_closing.set()
        if self.is_serving:
            self._thread.join(_STEP_SECONDS)
        return not self._thread.is_alive() and self.is_ready

    def add(self, requests: Sequence[Request]) -> asyncio.Queue[Mail]:
        """Hands requests to the engine; returns the queue into which their outputs come.

        Either all or none are added.

        Raises:
          EngineFailed: the engine has raised.
          QueueFull, ContextTooLong, ConfigError: as `Engine.add`.
        """
        if self.has_failed:
            raise EngineFailed
        queue: asyncio.Queue[Mail] = asyncio.Queue()
        added: list[Request] = []
        try:
            for request in requests:
                self._mail[request.id] = queue
                added.append(request)
                self._engine.add(request)
        except BaseException:
            self.abort([request.id for request in added])
            raise
        return queue

    def abort(self, ids: Sequence[str]) -> None:
        """Ends requests whose answers nobody waits for; finished ones are ignored."""
        for request_id in ids:
            if self._mail.pop(request_id, None) is not None:
                self._engine.abort(request_id)

    def abort_choice(self, request_id: str, choice: int) -> None:
        """Ends one choice."""
        self._engine.abort(request_id, choice)

    def stats(self) -> Stats:
        """The engine's figures."""
        return self._engine.stats()

    @property
    def num_open(self) -> int:
        """Requests whose answers somebody waits for."""
        return len(self._mail)

    def _run(self) -> None:
        try:
            self._engine.warm_up(behind=True)
            self.is_serving = True
            while not self._is_closing.is_set():
                self.is_ready = self._engine.is_warm
                if self._engine.wait(_IDLE_SECONDS):
                    outputs = self._engine.step()
                    if outputs:
                        now = time.perf_counter()
                        self._tell(self._deliver, outputs, now)
        except Exception:
            traceback.print_exc(file=sys.stderr)
            self._tell(self._fail)

    def _tell(self, function: Callable[..., None], *values: Any) -> None:
        """Calls a function on the event loop, unless that has ended without waiting for us."""
        try:
            self._loop.call_soon_threadsafe(function, *values)
        except RuntimeError:
            if not self._is_closing.is_set():
                raise

    def _deliver(self, outputs: list[Output], now: float) -> None:
        by_queue: dict[int, tuple[asyncio.Queue[Mail], list[Output]]] = {}
        for output in outputs:
            queue = self._mail.get(output.id)
            if queue is not None:
                by_queue.setdefault(id(queue), (queue, []))[1].append(output)
        for queue, found in by_queue.values():
            queue.put_nowait((found, now))

    def _fail(self) -> None:
        self.has_failed, self.is_serving, self.is_ready = True, False, False
        for queue in {id(queue): queue for queue in self._mail.values()}.values():
            queue.put_nowait(EngineFailed())
        self._on_failure()
