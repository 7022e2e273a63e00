"""The server's edges: who may come in, limits, clients that leave, starting and stopping."""

import contextlib
import json
import socket
import threading
import time

import pytest

from hunyuan_jax.serve.http import Settings
from support import serving

JSON = {"Content-Type": "application/json"}
# An answer that does not end by itself.
LONG = {
    "prompt": "abc",
    "max_tokens": 10_000,
    "temperature": 0,
    "repetition_penalty": 1.0,
    "ignore_eos": True,
}
PATHS = ("/v1/completions", "/v1/chat/completions")


@pytest.fixture
def server(engine, pretrained):
    """Starts a server of the test's own."""

    def start(settings=None, wait=True):
        return serving.running(engine, serving.served(pretrained), settings, wait)

    return start


def connect(running, timeout=30.0):
    return socket.create_connection(("127.0.0.1", running.port), timeout=timeout)


def raw_post(path, body, **headers):
    """The bytes of a POST."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: localhost",
        *(f"{name}: {value}" for name, value in (JSON | headers).items()),
        f"Content-Length: {len(data)}",
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + data


def read_until_closed(connection):
    data = b""
    with contextlib.suppress(ConnectionError):
        while piece := connection.recv(65536):
            data += piece
    return data


def error_of(answer):
    status, headers, body = answer
    error = json.loads(body)["error"]
    assert headers["Content-Type"].startswith("application/json")
    assert set(error) == {"message", "type", "param", "code"}
    assert "\n" not in error["message"] and "Traceback" not in error["message"]
    return status, error


def figures(running):
    """(the figures that have vLLM's names, headers, all samples)."""
    status, headers, text = running.get("/metrics")
    assert status == 200
    samples = dict(
        line.rsplit(" ", 1) for line in text.decode().splitlines() if not line.startswith("#")
    )
    names = (
        "num_requests_running",
        "num_requests_waiting",
        "kv_cache_usage_perc",
        "num_preemptions_total",
        "prefix_cache_queries_total",
        "prefix_cache_hits_total",
        "prompt_tokens_total",
        "generation_tokens_total",
        "spec_decode_num_drafts_total",
        "spec_decode_num_draft_tokens_total",
        "spec_decode_num_accepted_tokens_total",
        "time_to_first_token_seconds_count",
        "e2e_request_latency_seconds_count",
        "inter_token_latency_seconds_count",
    )
    found = {name: float(samples[f'vllm:{name}{{model_name="tiny"}}']) for name in names}
    return found, headers, samples


def test_figures_have_the_names_of_vllm(server):
    with server() as running:
        before, _, _ = figures(running)
        body = {"prompt": "a", "max_tokens": 4, "ignore_eos": True}
        assert running.post("/v1/completions", body)[0] == 200
        after, headers, samples = figures(running)
    assert headers["Content-Type"].startswith("text/plain; version=0.0.4")
    value = {name: after[name] - before[name] for name in after}
    assert value["prompt_tokens_total"] == 1 and value["generation_tokens_total"] == 4
    assert value["time_to_first_token_seconds_count"] == 1
    assert value["e2e_request_latency_seconds_count"] == 1
    assert value["num_requests_running"] == value["num_requests_waiting"] == 0
    finished = 'vllm:request_success_total{model_name="tiny",finished_reason="length"}'
    assert float(samples[finished]) == 1
    assert 'vllm:time_to_first_token_seconds_bucket{model_name="tiny",le="+Inf"}' in samples


def test_state_and_version(shared):
    assert shared.get("/health")[0] == shared.get("/ready")[0] == 200
    assert json.loads(shared.get("/version")[2]).keys() == {"version"}
    assert error_of(shared.get("/nowhere"))[0] == 404
    assert error_of(shared.get("/v1/completions"))[0] == 405
    for path in ("/", "/health", "/nowhere", "/v1/models"):
        headers = shared.get(path)[1]
        assert headers["Server"] == "hunyuan_jax"  # no versions
        assert headers["X-Content-Type-Options"] == "nosniff"


def test_tokenize_and_back(shared, pretrained):
    tokenizer = serving.served(pretrained).tokenizer
    text = "Ünïcödé <|eos|> 😀"
    answer = json.loads(shared.post("/tokenize", {"prompt": text, "return_token_strs": True})[2])
    assert answer["tokens"] == tokenizer.encode(text, parse_special=True)
    assert tokenizer.special_id("<|eos|>") in answer["tokens"]
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
    assert answer["max_model_len"] == serving.CONTEXT
    back = shared.post("/detokenize", {"tokens": answer["tokens"]})
    assert json.loads(back[2]) == {"prompt": text}
    chat = {"messages": [{"role": "user", "content": "hi"}]}
    from_chat = json.loads(shared.post("/tokenize", chat)[2])["tokens"]
    assert tokenizer.decode(from_chat) == "<|startoftext|>hi<|extra_0|>"
    assert error_of(shared.post("/tokenize", {}))[0] == 400
    assert error_of(shared.post("/detokenize", {"tokens": [384]}))[0] == 400
    info = json.loads(shared.get("/tokenizer_info")[2])
    assert (info["bos_token"], info["eos_token"]) == ("<|startoftext|>", "<|eos|>")
    assert info["chat_template"] == tokenizer.chat_template


def test_a_key_is_asked_for(server):
    with server(Settings(api_key="sécret")) as running:
        for path in ("/health", "/ready", "/metrics", "/version", "/"):
            assert running.get(path)[0] == 200
        body = {"prompt": "a", "max_tokens": 1}
        for shown in ("", "Bearer ", "Bearer wrong", "Basic s\xc3\xa9cret", "sécret"):
            for answer in (
                running.post("/v1/completions", body, Authorization=shown.encode("latin-1")),
                running.get("/v1/models", Authorization=shown.encode("latin-1")),
                running.get("/tokenizer_info"),
                running.post("/tokenize", {"prompt": "a"}),
            ):
                status, error = error_of(answer)
                assert status == 401 and error["code"] == "invalid_api_key"
                assert "cret" not in error["message"]
        key = "Bearer sécret".encode()
        assert running.post("/v1/completions", body, Authorization=key)[0] == 200
        assert running.get("/v1/models", Authorization=b"bearer  s\xc3\xa9cret ")[0] == 200


def test_a_name_that_points_here_is_not_let_in(shared, server):
    """A page of a site whose name resolves to 127.0.0.1 could ask otherwise."""
    for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", ""):
        assert shared.get("/v1/models", Host=host)[0] == 403
    for host in ("localhost", "LOCALHOST:8000", "127.0.0.1:1", "[::1]:80", "a.localhost"):
        assert shared.get("/v1/models", Host=host)[0] == 200
    with server(Settings(is_local=False)) as running:
        assert running.get("/v1/models", Host="llm.example")[0] == 200


def test_a_form_of_another_page_is_not_read(shared):
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        answer = shared.post("/v1/completions", {"prompt": "a"}, **{"Content-Type": kind})
        assert error_of(answer)[0] == 415


@pytest.mark.parametrize("path", [*PATHS, "/tokenize", "/detokenize"])
def test_bodies_that_are_no_object_are_refused(shared, path):
    for body in (b"", b"{", b"[]", b"3", b'{"a": NaN}', b"\xff\xfe", b"[" * 200_000,
                 b'{"n": ' + b"1" * 5000 + b"}", b'{"temperature": 1e999}'):  # fmt: skip
        status, error = error_of(shared.post(path, body))
        assert status == 400
        assert len(error["message"]) < 300


def test_a_body_that_is_too_large_is_refused(server):
    with server(Settings(max_body_bytes=1000)) as running:
        body = {"prompt": "a" * 1000}
        assert error_of(running.post("/v1/completions", body))[0] == 413
        with connect(running) as connection:  # without a length
            head = raw_post("/v1/completions", b"").replace(
                b"Content-Length: 0", b"Transfer-Encoding: chunked\r\nConnection: close"
            )
            connection.sendall(head)
            with contextlib.suppress(ConnectionError):
                for _ in range(20):
                    connection.sendall(b"64\r\n" + b"a" * 100 + b"\r\n")
                connection.sendall(b"0\r\n\r\n")
            assert b" 413 " in read_until_closed(connection).split(b"\r\n")[0]
        assert running.post("/v1/completions", {"prompt": "a", "max_tokens": 1})[0] == 200


def test_all_bodies_together_have_a_limit(server):
    with server(Settings(max_bodies_bytes=3000)) as running:
        slow = [connect(running) for _ in range(2)]
        for connection in slow:
            connection.sendall(raw_post("/v1/completions", b" " * 1400)[:-1000])
        time.sleep(0.3)
        body = {"prompt": "a" * 400, "max_tokens": 1}
        status, error = error_of(running.post("/v1/completions", body))
        assert status == 429 and error["type"] == "rate_limit_error"
        for connection in slow:
            connection.close()
        time.sleep(0.3)
        assert running.post("/v1/completions", body | {"prompt": "a"})[0] == 200


def test_a_head_that_is_too_large_is_refused(shared):
    for head in (
        b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 20_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"X: a\r\n" * 20_000 + b"\r\n",
        b"\x16\x03\x01 this is no HTTP\r\n\r\n",
    ):
        with connect(shared) as connection:
            with contextlib.suppress(ConnectionError):
                connection.sendall(head)
            answer = read_until_closed(connection)
        assert answer == b"" or answer.startswith((b"HTTP/1.0 400", b"HTTP/1.1 400"))
        assert b"Traceback" not in answer
    assert shared.get("/health")[0] == 200


def test_who_sends_nothing_is_hung_up_on(server):
    settings = Settings(header_seconds=0.4, body_seconds=0.4)
    with server(settings) as running:
        with connect(running) as silent, connect(running) as slow:
            slow.sendall(b"GET /health HTTP/1.1\r\nHost: loc")
            for connection in (silent, slow):
                assert read_until_closed(connection) == b""
        with connect(running) as connection:
            connection.sendall(raw_post("/v1/completions", {"prompt": "a"})[:-3])
            assert b" 408 " in connection.recv(65536).split(b"\r\n")[0]
        with connect(running) as connection:  # who has spoken may be silent for longer
            get = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
            connection.sendall(get)
            assert b" 200 " in connection.recv(65536)
            time.sleep(0.8)
            connection.sendall(get)
            assert b" 200 " in connection.recv(65536)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("half", [False, True], ids=["closed", "half-closed"])
def test_a_client_that_leaves_frees_its_rows(server, stream, half):
    """In the queue as well as on a row; within a step or two, long before the answer ends."""
    with server() as running:
        body = LONG | {"stream": stream, "n": 2}
        before = running.engine.stats().generated_tokens
        connections = [connect(running) for _ in range(4)]
        for connection in connections:
            connection.sendall(raw_post("/v1/completions", body))
        end = time.monotonic() + 20
        # All eight choices have come, and there are rows for four.
        while running.num_unfinished() < 8 and time.monotonic() < end:
            time.sleep(0.005)
        assert running.num_unfinished() == 8 and running.engine.stats().waiting >= 4
        for connection in connections:
            if half:
                connection.shutdown(socket.SHUT_WR)
            else:
                connection.close()
        assert running.is_idle()
        assert running.engine.stats().generated_tokens - before < 3 * serving.CONTEXT
        for connection in connections:
            connection.close()
        assert running.post("/v1/completions", {"prompt": "a", "max_tokens": 1})[0] == 200
        assert 'abort"} 8' in running.get("/metrics")[2].decode()


def test_a_client_that_does_not_read_is_let_go(server):
    settings = Settings(send_seconds=0.5, quiet_seconds=0.05)
    with server(settings) as running:
        before = running.engine.stats().generated_tokens
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", running.port))
            body = LONG | {"stream": True, "n": 32, "logprobs": 20, "return_token_ids": True}
            connection.sendall(raw_post("/v1/completions", body))
            assert running.is_busy()
            assert running.is_idle(60)
            assert running.engine.stats().generated_tokens - before < 32 * 200
        assert running.post("/v1/completions", {"prompt": "a", "max_tokens": 1})[0] == 200


def test_a_quiet_stream_says_that_it_lives(server):
    with server(Settings(quiet_seconds=0.01)) as running:
        with connect(running) as busy, connect(running) as waiting:
            busy.sendall(raw_post("/v1/completions", LONG | {"n": 16}))
            assert running.is_running(4)
            body = {"prompt": "a", "max_tokens": 1, "stream": True}
            waiting.sendall(raw_post("/v1/completions", body, Connection="close"))
            data = read_until_closed(waiting)
        assert b"\n: waiting\n\n" in data.replace(b"\r\n", b"\n")
        assert b"data: [DONE]" in data


def test_it_is_ready_when_everything_is_compiled(server, engine, monkeypatch):
    goes_on, warm_up = threading.Event(), engine.warm_up
    monkeypatch.setattr(engine, "warm_up", lambda behind: (goes_on.wait(60), warm_up()))
    with server(wait=False) as running:
        assert running.get("/health")[0] == 200
        for answer in (running.get("/ready"), running.post(PATHS[0], {"prompt": "a"})):
            status, error = error_of(answer)
            assert status == 503 and error["type"] == "service_unavailable"
            assert int(answer[1]["Retry-After"]) > 0
        assert running.post("/tokenize", {"prompt": "a"})[0] == 200
        goes_on.set()
        end = time.monotonic() + 60
        while running.get("/ready")[0] != 200 and time.monotonic() < end:
            time.sleep(0.02)
        assert running.post(PATHS[0], {"prompt": "a", "max_tokens": 1})[0] == 200


def test_one_that_still_compiles_ends_at_once(server, engine, monkeypatch):
    goes_on = threading.Event()
    monkeypatch.setattr(engine, "warm_up", lambda behind: goes_on.wait(60))
    with server(wait=False) as running:
        assert running.get("/health")[0] == 200
        running.stop()
        end = time.monotonic() + 30
        while not running.status and time.monotonic() < end:
            time.sleep(0.02)
        assert running.status == [0] and running.server.is_still_busy
        goes_on.set()


def test_a_server_that_stops_finishes_what_it_began(server):
    found = []
    with server() as running:
        ask = threading.Thread(
            target=lambda: found.append(running.chunks(PATHS[0], LONG | {"max_tokens": 60}))
        )
        ask.start()
        assert running.is_busy()
        time.sleep(0.05)
        running.stop()
        time.sleep(0.1)
        if ask.is_alive():
            assert error_of(running.get("/ready"))[0] == 503
            assert error_of(running.post(PATHS[0], {"prompt": "a"}))[0] == 503
    ask.join(30)
    assert found[0][-1]["choices"][0]["finish_reason"] == "length"


def test_an_engine_that_fails_is_said_and_ends_the_server(server, engine, monkeypatch, capsys):
    with server() as running:

        def fail():
            raise RuntimeError("secret of the host")

        monkeypatch.setattr(engine, "step", fail)
        status, error = error_of(running.post(PATHS[0], {"prompt": "a"}))
        assert status == 500 and "secret" not in error["message"]
    assert running.status == [1]
    assert "secret of the host" in capsys.readouterr().err


def test_what_is_logged_holds_no_prompt(server, capfd):
    with server() as running:
        running.post("/v1/completions", {"prompt": "my secret", "max_tokens": 1})
        running.post(
            "/v1/chat/completions",
            {
                "messages": [{"role": "user", "content": "my secret"}],
                "stream": True,
                "max_tokens": 2,
            },
        )
        running.post("/v1/completions", {"prompt": {"my secret": 1}})
        running.get("/my%20secret")
        running.get("/v1/models/my%20secret")
    assert [line.rsplit(" ", 2)[0] for line in running.lines if "stopping" not in line] == [
        "POST /v1/completions 200",
        "POST /v1/chat/completions 200",
        "POST /v1/completions 400",
        "GET ? 404",
        "GET /v1/models/{name} 404",
    ]
    captured = capfd.readouterr()
    assert "secret" not in captured.err + captured.out
