"""`python -m hunyuan_jax serve` as a process: what it says, and how it ends."""

import contextlib
import json
import re
import signal
import socket
import sys
import urllib.request

import pytest

from hunyuan_jax import cli
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.serve import http
from support import serving

TINY = ("-m", "hunyuan_jax", "serve", f"--checkpoint={serving.FOLDER}", "--port=0")
SMALL = ("--max_rows=2", "--max_context=48")


@contextlib.contextmanager
def serving_process(*options):
    found = serving.Process([sys.executable, *TINY, *SMALL, *options])
    try:
        yield found.wait_until_it_serves()
    finally:
        found.close()


@pytest.mark.heavy
def test_every_option_reaches_it_and_sigterm_lets_it_finish(tmp_path):
    key = tmp_path / "key"
    key.write_text("secret\n")
    options = ("--model_name=a name", "--host=0.0.0.0", "--max_queue=1", "--invariant")
    with serving_process(f"--api_key_file={key}", *options) as server:
        said = "\n".join(server.lines)
        assert "temperature 0.7, top_k 20, top_p 0.8, repetition_penalty 1.05" in said
        assert "warning" not in said
        headers = {"Authorization": "Bearer secret"}
        with pytest.raises(urllib.error.HTTPError) as caught:
            server.post({"prompt": "a"})
        with caught.value as answer:
            assert answer.code == 401
        request = urllib.request.Request(f"{server.url}/v1/models", headers=headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            (model,) = json.load(answer)["data"]
        assert (model["id"], model["max_model_len"]) == ("a name", 48)
        with pytest.raises(urllib.error.HTTPError) as caught:
            server.post({"prompt": "a", "n": 2}, **headers)
        with caught.value as answer:
            assert answer.code == 400 and "at most 1" in json.load(answer)["error"]["message"]
        body = {"model": "a name", "prompt": "a", "max_tokens": 40, "ignore_eos": True}
        with server.post(body | {"stream": True}, **headers) as answer:
            first = answer.readline()
            # Once to the process, once to its group, and a Ctrl-C.
            for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
                server.process.send_signal(number)
            rest = answer.read()
        assert first.startswith(b"data: ") and rest.endswith(b"data: [DONE]\n\n")
        assert b'"finish_reason": "length"' in rest
        assert server.wait() == 0
    assert not any("Traceback" in line for line in server.lines)


def test_a_server_that_anybody_can_reach_is_warned_of(monkeypatch, capsys):
    class Reached(Exception):
        pass

    async def run(*_):
        raise Reached

    monkeypatch.setattr(http.Server, "run", run)
    with pytest.raises(Reached):
        cli.run([*TINY[2:], *SMALL, "--host=0.0.0.0"])
    assert "warning: --host=0.0.0.0 lets other machines in" in capsys.readouterr().err


def test_what_it_refuses(tmp_path):
    (tmp_path / "empty").write_text(" \n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for options, message in (
            ((f"--port={port}",), f"--port={port} cannot be listened to"),
            (("--api_key=a", f"--api_key_file={tmp_path / 'empty'}"), "are both given"),
            ((f"--api_key_file={tmp_path / 'empty'}",), "is empty"),
            ((f"--api_key_file={tmp_path / 'absent'}",), "cannot be read"),
            (("--host=256.0.0.1",), "cannot be listened to"),
            ((f"--checkpoint={tmp_path}",), "is not a model folder"),
            (("--max_rows=0",), "max_rows"),
            (("--max_context=1000",), "64 positions"),
        ):
            with pytest.raises(ConfigError, match=re.escape(message)):
                cli.run([*TINY[2:], *options])
