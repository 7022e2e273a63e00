"""A server of a small random model, in a thread of the test's process."""

import asyncio
import contextlib
import json
import os
import re
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request

from hunyuan_jax.config import MoeConfig
from hunyuan_jax.infer.pretrained import Pretrained
from hunyuan_jax.infer.request import Limits
from hunyuan_jax.serve.http import Server, Settings
from hunyuan_jax.serve.openai import Served
from hunyuan_jax.tokenizer import load_tokenizer
from support import folders, paths, processes

FOLDER = paths.GOLDEN / "hf" / "moe_top1"
# As long as most prompts of tests need, and short enough that a test can fill it.
CONTEXT = 256
RECOMMENDED = {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05}


def model():
    """One dense layer with the vocabulary of FOLDER: its programs compile in a third of the time
    that a small mixture's take.
    """
    cfg = folders.small(
        vocab_size=384,
        max_position=CONTEXT,
        eos_token_ids=(3,),
        num_layers=1,
        cla_share_factor=1,
        moe=MoeConfig(),
    )
    return Pretrained(cfg, folders.random_params(cfg, seed=1))


# Of every engine here, so that all have the same programs.
LIMITS = Limits(max_rows=4, max_queue=64)


def engine_of(pretrained):
    """An engine of its own, compiled."""
    engine = pretrained.new_engine(LIMITS)
    engine.warm_up()
    return engine


def served(pretrained, **changes):
    """How the tests' clients see a model."""
    tokenizer = load_tokenizer(str(FOLDER))
    values = {
        "name": "tiny",
        "tokenizer": tokenizer,
        "vocab_size": pretrained.config.vocab_size,
        "max_context": CONTEXT,
        "recommended": RECOMMENDED,
        "stop_ids": tokenizer.stop_ids,
        "max_choices": 256,
    }
    return Served(**values | changes)


class Running:
    """A server that runs: its address, and what it logged."""

    def __init__(self, server, engine, loop, port, lines):
        self.server, self.engine, self.port, self.lines = server, engine, port, lines
        self._loop = loop
        self.status = []  # the exit status, when it has ended
        self.url = f"http://127.0.0.1:{port}"

    def get(self, path, **headers):
        """(status, headers, body) of a GET."""
        return self.send("GET", path, None, headers)

    def post(self, path, body, **headers):
        """(status, headers, body) of a POST of JSON, or of bytes as they are."""
        return self.send("POST", path, body, {"Content-Type": "application/json", **headers})

    def send(self, method, path, body, headers):
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(
            self.url + path, data=data, method=method, headers=headers
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.headers, answer.read()
        except urllib.error.HTTPError as e:
            with e:
                return e.code, e.headers, e.read()

    def chunks(self, path, body):
        """The objects of a stream; asserts that it ends as it should."""
        status, headers, data = self.post(path, {**body, "stream": True})
        assert status == 200, data
        assert headers["Content-Type"].startswith("text/event-stream")
        events = [event for event in data.decode().split("\n\n") if event[:1] not in ("", ":")]
        assert events[-1] == "data: [DONE]"
        return [json.loads(event.removeprefix("data: ")) for event in events[:-1]]

    def stop(self):
        """Tells the server to stop, as SIGTERM does."""
        with contextlib.suppress(RuntimeError):  # it has ended
            self._loop.call_soon_threadsafe(self.server.stop)

    def is_busy(self, seconds=20.0):
        """Whether the engine comes to have work."""
        end = time.monotonic() + seconds
        while not self.engine.has_work and time.monotonic() < end:
            time.sleep(0.002)
        return self.engine.has_work

    def is_running(self, num, seconds=20.0):
        """Whether the engine comes to compute that many choices."""
        end = time.monotonic() + seconds
        while self.engine.stats().running != num and time.monotonic() < end:
            time.sleep(0.002)
        return self.engine.stats().running == num

    def num_unfinished(self):
        """Choices that are computed or wait."""
        stats = self.engine.stats()
        return stats.running + stats.waiting

    def is_idle(self, seconds=20.0):
        """Whether the engine comes to hold nothing."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            stats = self.engine.stats()
            if not (self.engine.has_work or stats.running or stats.waiting or stats.pages_used):
                return True
            time.sleep(0.01)
        return False


class Process:
    """A server in a process of its own; `lines` are those of its standard error."""

    def __init__(self, command, env=os.environ):
        self.process = subprocess.Popen(
            command,
            cwd=paths.ROOT,
            env={**env, "PYTHONPATH": str(paths.ROOT)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines = []
        self.url = None

    def wait_until_it_serves(self):
        for line in self.process.stderr:
            self.lines.append(line.rstrip("\n"))
            if found := re.search(r" is served on (http://\S+);", line):
                self.url = found[1]
                break
        assert self.url, self.lines
        self._reader = threading.Thread(target=self.lines.extend, args=(self.process.stderr,))
        self._reader.start()
        return self

    def wait(self):
        """The exit status; `lines` are then all of them."""
        status = self.process.wait(60)
        if self.url:
            self._reader.join(30)
        return status

    def close(self):
        self.process.kill()
        self.wait()
        self.process.stderr.close()

    def post(self, body, **headers):
        request = urllib.request.Request(
            f"{self.url}/v1/completions",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json", **headers},
        )
        return urllib.request.urlopen(request, timeout=60)


@contextlib.contextmanager
def running(engine, served, settings=None, wait=True):
    """Serves in a thread of its own until the block ends; yields a `Running`."""
    listener = socket.create_server(("127.0.0.1", 0))
    # So that a client that does not read is noticed soon; connections inherit it.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**14)
    lines, ready = [], threading.Event()
    server = Server(served, engine, settings or Settings(drain_seconds=5.0), lines.append)
    loop = asyncio.new_event_loop()
    found = Running(server, engine, loop, listener.getsockname()[1], lines)

    def run():
        try:
            found.status.append(loop.run_until_complete(server.run(listener, ready.set)))
        finally:
            loop.close()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        if wait:
            assert ready.wait(processes.PATIENCE)
        yield found
    finally:
        found.stop()
        thread.join(60)
        listener.close()
    assert not thread.is_alive()
