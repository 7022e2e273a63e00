"""`python -m hunyuan_jax serve` as a process: what it says, and how it ends."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.request

import pytest

from support import paths, serving

TINY = ("-m", "hunyuan_jax", "serve", f"--checkpoint={serving.FOLDER}", "--port=0")
SMALL = ("--max_rows=2", "--max_context=48")


class Process:
    """A server in a process of its own; `lines` are those of its standard error."""

    def __init__(self, *options):
        self.process = subprocess.Popen(
            [sys.executable, *TINY, *SMALL, *options],
            cwd=paths.ROOT,
            env={**os.environ, "PYTHONPATH": str(paths.ROOT)},
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

    def close(self):
        self.process.kill()
        self.process.wait()
        if self.url:
            self._reader.join(30)
        self.process.stderr.close()

    def post(self, body, **headers):
        request = urllib.request.Request(
            f"{self.url}/v1/completions",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json", **headers},
        )
        return urllib.request.urlopen(request, timeout=60)

    def end(self, signal_number=signal.SIGTERM):
        self.process.send_signal(signal_number)
        return self.process.wait(60)


@contextlib.contextmanager
def serving_process(*options):
    found = Process(*options)
    try:
        yield found.wait_until_it_serves()
    finally:
        found.close()


@pytest.mark.heavy
def test_it_answers_and_sigterm_lets_it_finish(tmp_path):
    key = tmp_path / "key"
    key.write_text("secret\n")
    with serving_process(f"--api_key_file={key}") as server:
        said = "\n".join(server.lines)
        assert "temperature 0.7, top_k 20, top_p 0.8, repetition_penalty 1.05" in said
        assert "warning" not in said
        body = {"model": "moe_top1", "prompt": "a", "max_tokens": 40, "ignore_eos": True}
        headers = {"Authorization": "Bearer secret"}
        with server.post(body | {"stream": True}, **headers) as answer:
            first = answer.readline()
            for _ in range(3):  # once to the process, once to its group
                server.process.send_signal(signal.SIGTERM)
            rest = answer.read()
        assert first.startswith(b"data: ") and rest.endswith(b"data: [DONE]\n\n")
        assert b'"finish_reason": "length"' in rest
        assert server.process.wait(60) == 0
    assert not any("Traceback" in line for line in server.lines)


@pytest.mark.heavy
def test_every_option_reaches_the_server():
    options = ("--model_name=a name", "--host=0.0.0.0", "--max_queue=1", "--invariant")
    with serving_process(*options) as server:
        assert any("--host=0.0.0.0 lets other machines in" in line for line in server.lines)
        with urllib.request.urlopen(f"{server.url}/v1/models", timeout=60) as answer:
            (model,) = json.load(answer)["data"]
        assert (model["id"], model["max_model_len"]) == ("a name", 48)
        with pytest.raises(urllib.error.HTTPError) as caught:
            server.post({"prompt": "a", "n": 2})
        with caught.value as answer:
            assert answer.code == 400 and "at most 1" in json.load(answer)["error"]["message"]
        with server.post({"prompt": "a", "max_tokens": 1}) as answer:
            assert answer.status == 200
        assert server.end(signal.SIGINT) == 0


def ends_with(*options):
    """(exit status, standard error) of a server that must not start."""
    found = subprocess.run(
        [sys.executable, *TINY, *options],
        cwd=paths.ROOT,
        env={**os.environ, "PYTHONPATH": str(paths.ROOT)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert "Traceback" not in found.stderr
    return found.returncode, found.stderr


def test_what_it_refuses(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status, error = ends_with(f"--port={port}")
        assert status == 2 and f"--port={port} cannot be listened to" in error
    (tmp_path / "empty").write_text(" \n")
    for options, message in (
        (("--api_key=a", f"--api_key_file={tmp_path / 'empty'}"), "are both given"),
        ((f"--api_key_file={tmp_path / 'empty'}",), "is empty"),
        ((f"--api_key_file={tmp_path / 'absent'}",), "cannot be read"),
        (("--host=256.0.0.1",), "cannot be listened to"),
        ((f"--checkpoint={tmp_path}",), "is not a model folder"),
        (("--max_rows=0",), "max_rows"),
        (("--max_context=1000",), "64 positions"),
    ):
        status, error = ends_with(*options)
        assert status == 2 and message in error, error
        assert error.splitlines()[-1].startswith("error: ")
