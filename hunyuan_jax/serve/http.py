"""The HTTP server: routes, limits, keys, streams, and how it stops."""

import asyncio
import base64
import contextlib
import dataclasses
import hashlib
import hmac
import importlib.metadata
import ipaddress
import json
import math
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from importlib import resources
from typing import Any

from aiohttp import web

from hunyuan_jax.errors import ConfigError
from hunyuan_jax.infer.request import ContextTooLong, QueueFull
from hunyuan_jax.serve import metrics, openai
from hunyuan_jax.serve.answers import Answer, Delta
from hunyuan_jax.serve.errors import Refused
from hunyuan_jax.serve.fields import parse_json
from hunyuan_jax.serve.loop import Engine, EngineFailed, EngineLoop, Mail
from hunyuan_jax.serve.openai import Job, Served

# What a browser may do with the page: run the script it holds, and ask this server.
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{script}'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
# A signal that follows another one sooner is the same one.
_SAME_SIGNAL_SECONDS = 1.0
_HEADERS = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
_OPEN_PATHS = {"/", "/health", "/ready", "/metrics", "/version"}
_STREAM = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """How the server meets its clients.

    api_key: what they must show, or None; is_local: it listens to this machine only.
    """

    api_key: str | None = None
    is_local: bool = True
    drain_seconds: float = 30.0
    """Time for open answers to end after SIGTERM."""
    max_body_bytes: int = 2**23
    """Of one request."""
    max_bodies_bytes: int = 2**28
    """Of all requests that are being read."""
    header_seconds: float = 15.0
    """Time for a new connection to send the head of its first request."""
    body_seconds: float = 30.0
    """Time to send a body."""
    send_seconds: float = 60.0
    """Time in which a client must take what a stream sends."""
    quiet_seconds: float = 10.0
    """A stream without news sends a comment so often."""


Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Server:
    """Answers HTTP requests with one engine.

    is_still_busy: `run` has returned while the engine's thread compiles, or is in a long step.
    """

    def __init__(
        self,
        served: Served,
        engine: Engine,
        settings: Settings,
        log: Callable[[str], None] = lambda line: None,
    ):
        """`log` gets a line for each request; it never holds a prompt or an answer."""
        self._served, self._engine, self._settings, self._log = served, engine, settings, log
        self._metrics = metrics.Metrics(served.name)
        self._loop: EngineLoop | None = None
        self._is_draining = self.is_still_busy = False
        self._num_busy, self._num_body_bytes = 0, 0
        self._stop: asyncio.Event | None = None
        # Connections that have not sent the head of a request yet.
        self._silent: dict[asyncio.Protocol, asyncio.TimerHandle] = {}
        self._page = resources.files("hunyuan_jax.serve").joinpath("page.html").read_text("utf-8")

    async def run(
        self, listener: socket.socket, started: Callable[[], None] = lambda: None
    ) -> int:
        """Serves on a bound socket until SIGTERM, SIGINT or `stop`; returns the exit status.

        Args:
          started: called when requests are taken.
        """
        loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        self._loop = EngineLoop(self._engine, self._stop.set)
        runner = web.AppRunner(
            self._app(), access_log=None, handler_cancellation=True, shutdown_timeout=1.0
        )
        await runner.setup()
        listening = await loop.create_server(
            lambda: self._connection(runner.server), sock=listener
        )
        with self._signals(loop):
            self._loop.start()
            ready = asyncio.create_task(self._announce(started))
            await self._stop.wait()
            ready.cancel()
            status = 1 if self._loop.has_failed else 0
            self._is_draining = True
            await self._drained()
        listening.close()
        await runner.cleanup()
        self.is_still_busy = not self._loop.close()
        return status

    def stop(self) -> None:
        """Drains, then ends `run`."""
        if self._stop is not None:
            self._stop.set()

    # --- how it starts and stops

    async def _announce(self, started: Callable[[], None]) -> None:
        while not self._loop.is_serving:
            await asyncio.sleep(0.02)
        started()

    @contextlib.contextmanager
    def _signals(self, loop: asyncio.AbstractEventLoop):
        """SIGTERM or SIGINT drains; one that comes later ends the process as usual.

        Supervisors may send the same signal twice, to the process and to its group.
        """
        names = (signal.SIGTERM, signal.SIGINT)
        since: list[float] = []

        def stop() -> None:
            since.append(time.monotonic())
            if len(since) == 1:
                self._log("stopping; open answers are finished first")
                self.stop()
            elif since[-1] - since[0] > _SAME_SIGNAL_SECONDS:
                self._log("stopping at once")
                os._exit(128 + signal.SIGTERM)

        try:
            for name in names:
                loop.add_signal_handler(name, stop)
        except (RuntimeError, ValueError):  # not in the main thread, as in tests
            names = ()
        yield
        for name in names:
            loop.remove_signal_handler(name)

    async def _drained(self) -> None:
        end = time.monotonic() + self._settings.drain_seconds
        while self._num_busy and time.monotonic() < end and not self._loop.has_failed:
            await asyncio.sleep(0.02)
        # The last bytes of an answer are written after its handler has returned.
        await asyncio.sleep(0.05)

    def _connection(self, server: web.Server) -> asyncio.Protocol:
        """A new connection, closed if it does not send the head of a request in time."""
        protocol = server()

        def close() -> None:
            del self._silent[protocol]
            protocol.force_close()
            if protocol.transport is not None:
                protocol.transport.abort()

        loop = asyncio.get_running_loop()
        self._silent[protocol] = loop.call_later(self._settings.header_seconds, close)
        return protocol

    def _app(self) -> web.Application:
        app = web.Application(
            client_max_size=self._settings.max_body_bytes, middlewares=[self._guarded]
        )
        app.on_response_prepare.append(_name_server)
        app.add_routes(
            [
                web.get("/", self._get_page),
                web.get("/health", self._get_health),
                web.get("/ready", self._get_ready),
                web.get("/metrics", self._get_metrics),
                web.get("/version", self._get_version),
                web.get("/v1/models", self._get_models),
                web.get("/v1/models/{name:.+}", self._get_model),
                web.get("/tokenizer_info", self._get_tokenizer_info),
                web.post("/tokenize", self._post_tokenize),
                web.post("/detokenize", self._post_detokenize),
                web.post("/v1/completions", self._post_completion),
                web.post("/v1/chat/completions", self._post_chat),
            ]
        )
        return app

    # --- around every request

    @web.middleware
    async def _guarded(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Who may come in, and errors in OpenAI's shape."""
        if timer := self._silent.pop(request.protocol, None):
            timer.cancel()
        begin = time.perf_counter()
        try:
            self._check_host(request)
            self._check_key(request)
            response = await handler(request)
        except Refused as e:
            response = _error(e)
        except web.HTTPException as e:
            response = _error(Refused(_MEANING.get(e.status, e.reason), status=e.status))
            if "Allow" in e.headers:
                response.headers["Allow"] = e.headers["Allow"]
        except (ConnectionResetError, asyncio.CancelledError):
            self._log_answer(request, "gone", begin)
            raise
        except Exception as e:
            if not isinstance(e, EngineFailed):
                traceback.print_exc(file=sys.stderr)
            response = _error(Refused("the server failed at this request.", status=500))
        self._metrics.answers[response.status] += 1
        self._log_answer(request, response.status, begin)
        return response

    def _log_answer(self, request: web.Request, status: int | str, begin: float) -> None:
        if request.path not in _OPEN_PATHS:
            route = request.match_info.route.resource
            path = "?" if route is None else route.canonical
            seconds = time.perf_counter() - begin
            self._log(f"{request.method} {path} {status} {seconds:.3f} s")

    def _check_host(self, request: web.Request) -> None:
        """Keeps a page of another site, whose name was made to point here, from asking.

        A server for this machine without a key is asked by address or as localhost.
        """
        if not self._settings.is_local or self._settings.api_key is not None:
            return
        name = _host_name(request.headers.get("Host", ""))
        if name == "localhost" or name.endswith(".localhost") or _is_address(name):
            return
        raise Refused(
            "this server answers under localhost or an address only; start it with --api_key to "
            "serve it under a name.",
            status=403,
        )

    def _check_key(self, request: web.Request) -> None:
        key = self._settings.api_key
        if key is None or request.path in _OPEN_PATHS:
            return
        shown = request.headers.get("Authorization", "")
        scheme, _, shown = shown.partition(" ")
        is_right = hmac.compare_digest(
            shown.strip().encode("utf-8", "surrogateescape"), key.encode()
        )
        if scheme.lower() != "bearer" or not is_right:
            raise Refused(
                "the API key is missing or wrong; send Authorization: Bearer KEY.",
                status=401,
                code="invalid_api_key",
            )

    # --- figures and state

    async def _get_page(self, request: web.Request) -> web.Response:
        script = self._page.partition("<script>")[2].partition("</script>")[0]
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        headers = {"Content-Security-Policy": _POLICY.format(script=digest)}
        return web.Response(text=self._page, content_type="text/html", headers=headers)

    async def _get_health(self, request: web.Request) -> web.Response:
        if self._loop.has_failed:
            raise Refused("the engine has failed; start the server again.", status=503)
        return web.json_response({"status": "ok"})

    async def _get_ready(self, request: web.Request) -> web.Response:
        self._check_serving()
        if not self._loop.is_ready:
            raise Refused("some programs are still being compiled.", status=503, retry_after=5)
        return web.json_response({"status": "ready"})

    async def _get_metrics(self, request: web.Request) -> web.Response:
        text = self._metrics.text(self._loop.stats())
        return web.Response(body=text.encode(), headers={"Content-Type": metrics.CONTENT_TYPE})

    async def _get_version(self, request: web.Request) -> web.Response:
        try:
            version = importlib.metadata.version("hunyuan_jax")
        except importlib.metadata.PackageNotFoundError:  # a checkout that is not installed
            version = "unknown"
        return web.json_response({"version": version})

    async def _get_models(self, request: web.Request) -> web.Response:
        return web.json_response(openai.models(self._served))

    async def _get_model(self, request: web.Request) -> web.Response:
        openai.check_model(self._served, request.match_info["name"])
        return web.json_response(openai.model(self._served))

    async def _get_tokenizer_info(self, request: web.Request) -> web.Response:
        return web.json_response(openai.tokenizer_info(self._served))

    def _check_serving(self) -> None:
        if self._loop.has_failed:
            raise Refused("the engine has failed; start the server again.", status=503)
        if self._is_draining:
            raise Refused("the server is stopping.", status=503, retry_after=10)
        if not self._loop.is_serving:
            raise Refused("the server is compiling its programs.", status=503, retry_after=5)

    # --- work

    async def _post_tokenize(self, request: web.Request) -> web.Response:
        return web.json_response(await self._read(request, openai.tokenize))

    async def _post_detokenize(self, request: web.Request) -> web.Response:
        return web.json_response(await self._read(request, openai.detokenize))

    async def _post_completion(self, request: web.Request) -> web.StreamResponse:
        return await self._answer(request, openai.completion_job)

    async def _post_chat(self, request: web.Request) -> web.StreamResponse:
        return await self._answer(request, openai.chat_job)

    async def _read(
        self, request: web.Request, make: Callable[[Served, Mapping[str, Any]], Any]
    ) -> Any:
        """What `make` makes of the body; in a thread, since a long text takes a while."""
        if request.content_type != "application/json":
            raise Refused(
                f"the content type is {request.content_type!r}; it must be application/json.",
                status=415,
            )
        limit = self._settings.max_body_bytes
        num_bytes = min(limit if request.content_length is None else request.content_length, limit)
        if self._num_body_bytes + num_bytes > self._settings.max_bodies_bytes:
            raise _busy("too many bodies are on their way")
        self._num_body_bytes += num_bytes
        try:
            async with asyncio.timeout(self._settings.body_seconds):
                body = await request.read()
            return await asyncio.to_thread(lambda: make(self._served, parse_json(body)))
        except TimeoutError:
            raise Refused(
                f"the body did not arrive within {self._settings.body_seconds:g} s.", status=408
            ) from None
        finally:
            self._num_body_bytes -= num_bytes

    async def _answer(
        self, request: web.Request, make: Callable[[Served, Mapping[str, Any]], Job]
    ) -> web.StreamResponse:
        self._check_serving()
        self._num_busy += 1
        begin = time.perf_counter()
        try:
            job = await self._read(request, make)
            ids = [engine_request.id for engine_request in job.requests]
            answer = Answer(self._served, job)
            try:
                mail = self._loop.add(job.requests)
            except QueueFull:
                self._metrics.num_queue_full += 1
                raise _busy("the queue is full") from None
            except ContextTooLong as e:
                raise Refused(str(e), code="context_length_exceeded") from None
            except ConfigError as e:
                raise Refused(str(e)) from None
            try:
                deltas = self._deltas(answer, mail, begin)
                if job.options.stream:
                    return await self._streamed(request, answer, deltas)
                found = [delta async for news in deltas for delta in news]
                return web.json_response(answer.whole(found))
            finally:
                self._loop.abort(ids)
                self._count_finished(answer)
        finally:
            self._num_busy -= 1

    def _count_finished(self, answer: Answer) -> None:
        ended = answer.finish_reasons
        self._metrics.finished.update(ended)
        num_choices = len(answer.job.requests) * answer.job.options.n
        self._metrics.finished["abort"] += num_choices - len(ended)

    async def _deltas(
        self, answer: Answer, mail: asyncio.Queue[Mail], begin: float
    ) -> AsyncIterator[list[Delta]]:
        """What is new, at every step that tells something; [] after a quiet while."""
        last: dict[tuple[str, int], float] = {}
        while not answer.is_done:
            try:
                async with asyncio.timeout(self._settings.quiet_seconds):
                    news = await mail.get()
            except TimeoutError:
                yield []
                continue
            if isinstance(news, EngineFailed):
                raise news
            outputs, now = news
            deltas = []
            for output in outputs:
                if output.tokens:
                    self._observe(last, (output.id, output.choice), len(output.tokens), begin, now)
                delta, is_cut = answer.push(output)
                if is_cut:
                    self._loop.abort_choice(output.id, output.choice)
                if delta is not None:
                    if delta.finish_reason == "abort":
                        raise Refused("the server is stopping.", status=503, retry_after=10)
                    deltas.append(delta)
            if deltas:
                yield deltas
        self._metrics.whole_request.observe(time.perf_counter() - begin)

    def _observe(
        self,
        last: dict[tuple[str, int], float],
        choice: tuple[str, int],
        num_tokens: int,
        begin: float,
        now: float,
    ) -> None:
        before = last.get(choice)
        if before is None:
            self._metrics.time_to_first_token.observe(now - begin)
        else:
            self._metrics.between_tokens.observe((now - before) / num_tokens, num_tokens)
        last[choice] = now

    async def _streamed(
        self, request: web.Request, answer: Answer, news: AsyncIterator[list[Delta]]
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers=_STREAM)
        await response.prepare(request)
        await self._send(request, response, map(_event, answer.first_chunks()))
        try:
            async for deltas in news:
                events = [_event(answer.chunk(delta)) for delta in deltas] or [b": waiting\n\n"]
                await self._send(request, response, events)
            if answer.job.options.stream_options.include_usage:
                await self._send(request, response, [_event(answer.usage_chunk())])
        except (EngineFailed, Refused) as e:
            failed = Refused("the server failed at this request.", status=500)
            refused = e if isinstance(e, Refused) else failed
            await self._send(request, response, [_event(refused.body)])
        await self._send(request, response, [b"data: [DONE]\n\n"])
        await response.write_eof()
        return response

    async def _send(self, request: web.Request, response: web.StreamResponse, events: Any) -> None:
        """Writes events; a client that takes nothing for too long is gone."""
        try:
            async with asyncio.timeout(self._settings.send_seconds):
                await response.write(b"".join(events))
        except TimeoutError:
            if request.transport is not None:
                request.transport.abort()
            raise ConnectionResetError("the client takes nothing") from None


# What the server says where aiohttp refuses a request.
_MEANING = {
    404: "there is nothing at this address.",
    405: "this address has another method.",
    413: "the body is too large.",
}


async def _name_server(request: web.Request, response: web.StreamResponse) -> None:
    """Headers of every answer; in the place of aiohttp's own, which tells versions."""
    response.headers.update({**_HEADERS, "Server": "hunyuan_jax"})


def _busy(reason: str) -> Refused:
    return Refused(
        f"{reason}; try again later.", status=429, code="rate_limit_exceeded", retry_after=1
    )


def _error(refused: Refused) -> web.Response:
    headers = {}
    if refused.retry_after is not None:
        headers["Retry-After"] = str(math.ceil(refused.retry_after))
    if refused.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return web.json_response(refused.body, status=refused.status, headers=headers)


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def _host_name(host: str) -> str:
    """The name of a Host header, without the port."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].lower()


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
