"""What users of other servers report, each as a test against this one.

The reports are named in docs/serving.md.
"""

import json
import random
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest

from support import serving

GREEDY = {"temperature": 0, "repetition_penalty": 1.0}
ENDLESS = {**GREEDY, "ignore_eos": True, "max_tokens": 10_000}
PATH, CHAT = "/v1/completions", "/v1/chat/completions"
QUESTION = {"messages": [{"role": "user", "content": "Who are you?"}]}


def answer_of(running, body, path=PATH):
    status, _, data = running.post(path, body)
    assert status == 200, data
    return json.loads(data)


def text_of(running, **body):
    return answer_of(running, {**GREEDY, **body})["choices"][0]["text"]


def begin(running, body, path=PATH):
    """A connection on which a request was sent, and nothing read."""
    connection = socket.create_connection(("127.0.0.1", running.port), timeout=30)
    data = json.dumps(body).encode()
    connection.sendall(
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(data)}\r\n\r\n".encode()
        + data
    )
    return connection


@pytest.mark.cases(1)
@pytest.mark.parametrize("stream", [False, True])
def test_1_a_client_that_leaves_during_its_prefill_ends_it(slow, stream):
    body = ENDLESS | {"prompt": list(range(5, 245)), "stream": stream}
    connection = begin(slow, body)
    assert slow.is_busy()
    connection.close()
    num_steps = len(slow.steps)
    assert slow.is_idle()
    assert len(slow.steps) <= num_steps + 3
    assert slow.steps[-1] - slow.steps[0] < 100


def test_2_aborts_at_any_moment_lose_no_page(shared):
    rng = random.Random(0)
    expected = text_of(shared, prompt="The", max_tokens=12)

    def leave(seed):
        body = ENDLESS | {"prompt": [5 + seed % 7] * (1 + seed % 90), "n": 1 + seed % 3}
        connection = begin(shared, body | {"stream": bool(seed % 2)})
        time.sleep(rng.random() * 0.1)
        connection.close()

    with ThreadPoolExecutor(8) as pool:
        good = [pool.submit(text_of, shared, prompt="The", max_tokens=12) for _ in range(4)]
        list(pool.map(leave, range(48)))
        assert {future.result() for future in good} == {expected}
    assert shared.is_idle()
    stats = shared.engine.stats()
    assert stats.pages_used == stats.running == stats.waiting == 0


def test_3_a_stop_string_across_tokens_does_not_leak_and_is_seen(shared):
    body = {"prompt": "abc", "max_tokens": 40, "return_token_ids": True, "ignore_eos": True}
    free = answer_of(shared, {**GREEDY, **body})["choices"][0]
    text = free["text"]
    for start in range(1, 20, 3):
        stop = text[start : start + 4]
        end = text.index(stop)
        cut = answer_of(shared, {**GREEDY, **body, "stop": ["absent", stop]})["choices"][0]
        assert (cut["text"], cut["finish_reason"], cut["stop_reason"]) == (
            text[:end],
            "stop",
            stop,
        )
        chunks = shared.chunks(PATH, {**GREEDY, **body, "stop": stop})
        pieces = [c["choices"][0]["text"] for c in chunks]
        assert "".join(pieces) == text[:end]
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert shared.is_idle()


def test_4_no_chunk_holds_half_a_character(shared):
    """The model writes bytes at random; each chunk is whole characters, and together the text."""
    for seed in range(3):
        body = {"prompt": "é", "max_tokens": 60, "temperature": 1.5, "seed": seed, "top_p": 1}
        whole = answer_of(shared, body)["choices"][0]["text"]
        pieces = [chunk["choices"][0]["text"] for chunk in shared.chunks(PATH, body)]
        assert "".join(pieces) == whole


def test_5_a_chat_goes_on_until_it_ends_or_the_context_is_full(shared):
    body = QUESTION | {**GREEDY, "ignore_eos": True}
    found = answer_of(shared, body, CHAT)
    assert found["choices"][0]["finish_reason"] == "length"
    assert found["usage"]["total_tokens"] == serving.CONTEXT
    found = answer_of(shared, body | {"max_tokens": 10**6}, CHAT)
    assert found["usage"]["total_tokens"] == serving.CONTEXT


def test_6_every_choice_says_once_why_it_ended(shared):
    text = text_of(shared, prompt="abc", max_tokens=30, ignore_eos=True)
    ids = answer_of(
        shared, {**ENDLESS, "prompt": "abc", "max_tokens": 30, "return_token_ids": True}
    )["choices"][0]["token_ids"]
    for change, reason in (
        ({}, "length"),
        ({"stop": text[3:5]}, "stop"),
        ({"stop_token_ids": [ids[4]]}, "stop"),
        ({"ignore_eos": False, "logit_bias": {"3": 100}}, "stop"),
        ({"max_tokens": 1}, "length"),
    ):
        body = {**ENDLESS, "prompt": "abc", "max_tokens": 30, "n": 2, **change}
        found = answer_of(shared, body)["choices"]
        assert [choice["finish_reason"] for choice in found] == [reason] * 2
        told = [choice for chunk in shared.chunks(PATH, body) for choice in chunk["choices"]]
        for index in range(2):
            reasons = [c["finish_reason"] for c in told if c["index"] == index]
            assert reasons[-1] == reason and set(reasons[:-1]) <= {None}


def test_7_streams_count_tokens_only_if_asked_and_break_nobody(shared):
    for path, body in ((PATH, {"prompt": "abc"}), (CHAT, QUESTION)):
        body = {**ENDLESS, **body, "max_tokens": 5}
        plain = shared.chunks(path, body)
        assert all("usage" not in chunk and chunk["choices"] for chunk in plain)
        *chunks, last = shared.chunks(path, body | {"stream_options": {"include_usage": True}})
        assert all(chunk["usage"] is None and chunk["choices"] for chunk in chunks)
        assert last["choices"] == [] and last["usage"]["completion_tokens"] == 5
        assert last["usage"] == answer_of(shared, body, path)["usage"]


def test_8_echoed_logprobs_are_those_of_the_model(shared, pretrained):
    rows = [list(range(5, 45)), [70, 3, 9, 200, 7], list(range(300, 380))]
    body = {"prompt": rows, "max_tokens": 1, "logprobs": 1, "echo": True, "seed": 1234}
    found = answer_of(shared, {**GREEDY, **body})["choices"]
    for row, choice in zip(rows, sorted(found, key=lambda c: c["index"]), strict=True):
        logprobs_TV = np.asarray(jax.nn.log_softmax(pretrained.logits([row])[0, :-1]))
        written = choice["logprobs"]
        assert written["token_logprobs"][0] is None and written["top_logprobs"][0] is None
        assert len(written["token_logprobs"]) == len(written["tokens"]) == len(row) + 1
        given = written["token_logprobs"][1:-1]
        expected = logprobs_TV[np.arange(len(row) - 1), row[1:]]
        np.testing.assert_allclose(given, expected, atol=1e-4)
        for logprob, top, token, logprobs_V in zip(
            given, written["top_logprobs"][1:-1], row[1:], logprobs_TV, strict=True
        ):
            is_greedy = logprob == max(top.values())
            assert is_greedy == (token == logprobs_V.argmax())
    score = answer_of(shared, body | {"max_tokens": 0})["choices"]
    for alone, choice in zip(score, found, strict=True):
        assert alone["finish_reason"] == "length"
        np.testing.assert_allclose(
            alone["logprobs"]["token_logprobs"][1:],
            choice["logprobs"]["token_logprobs"][1:-1],
            atol=1e-6,
        )


def test_9_prompt_logprobs_are_whole_after_a_cached_prompt(shared):
    row = list(range(20, 200))
    body = {"prompt": row, "max_tokens": 1, **GREEDY}
    first = answer_of(shared, body | {"prompt_logprobs": 2})["choices"][0]["prompt_logprobs"]
    text_of(shared, prompt=row, max_tokens=4)
    again = answer_of(shared, body | {"prompt_logprobs": 2})["choices"][0]["prompt_logprobs"]
    assert len(first) == len(again) == len(row) and first[0] is again[0] is None
    for one, other in zip(first[1:], again[1:], strict=True):
        for token, entry in one.items():
            assert entry["logprob"] == pytest.approx(other[token]["logprob"], abs=1e-5)


def test_10_a_seed_gives_the_same_alone_and_in_a_crowd_and_its_choices_differ(shared):
    body = {"prompt": "abc", "max_tokens": 16, "temperature": 1.0, "seed": 3, "n": 3}
    alone = [choice["text"] for choice in answer_of(shared, body)["choices"]]
    assert len(set(alone)) == 3
    with ThreadPoolExecutor(8) as pool:
        for seed in range(10, 16):
            pool.submit(answer_of, shared, body | {"seed": seed, "n": 1, "prompt": "xy" * seed})
        crowd = answer_of(shared, body)["choices"]
    assert [choice["text"] for choice in crowd] == alone


def test_11_greedy_answers_do_not_depend_on_the_crowd(shared):
    prompts = [[5 + i] * (1 + 9 * i) for i in range(8)]
    alone = [text_of(shared, prompt=prompt, max_tokens=16) for prompt in prompts]
    together = answer_of(shared, {**GREEDY, "prompt": prompts, "max_tokens": 16})["choices"]
    assert [c["text"] for c in sorted(together, key=lambda c: c["index"])] == alone


def test_12_a_cached_prompt_is_told_and_changes_nothing(shared):
    row = list(range(100, 300))[:180]
    first = answer_of(shared, {**GREEDY, "prompt": row, "max_tokens": 16, "cache_salt": "12"})
    again = answer_of(shared, {**GREEDY, "prompt": row, "max_tokens": 16, "cache_salt": "12"})
    assert again["choices"][0]["text"] == first["choices"][0]["text"]
    cached = [a["usage"]["prompt_tokens_details"]["cached_tokens"] for a in (first, again)]
    assert cached[0] == 0 < cached[1] < len(row)
    other = answer_of(shared, {**GREEDY, "prompt": row, "max_tokens": 1, "cache_salt": "else"})
    assert other["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


def test_13_14_nothing_is_compiled_or_allocated_by_what_comes_later(shared):
    """Every kind of request after the start, and every row at once with the most log-probs."""
    before = shared.engine.stats()
    answer_of(
        shared,
        {
            "prompt": [5] * 200,
            "n": 16,
            "max_tokens": 40,
            "logprobs": 20,
            "temperature": 1,
            "top_p": 0.9,
            "ignore_eos": True,
        },
    )
    for change in (
        {"top_k": 1},
        {"top_p": 0.5, "top_k": 50, "min_p": 0.1},
        {"repetition_penalty": 1.3, "presence_penalty": 1, "frequency_penalty": -1},
        {"logit_bias": {"7": 5}, "min_tokens": 3, "stop_token_ids": [8, 9]},
        {"prompt_logprobs": 20, "echo": True, "logprobs": 5},
        {"max_tokens": 0, "echo": True, "logprobs": 1},
        {"prompt": [9] * 250, "max_tokens": 6},
    ):
        answer_of(shared, {"prompt": "abc", "max_tokens": 8, "seed": 1} | change)
    stats = shared.engine.stats()
    assert stats.compilations == before.compilations
    assert stats.pages_total == before.pages_total


def test_15_pages_of_those_who_left_are_not_written_into_those_who_stay(shared):
    prompts = [[30 + i] * (3 + 20 * i) for i in range(6)]
    expected = [text_of(shared, prompt=prompt, max_tokens=24) for prompt in prompts]
    is_over = threading.Event()

    def come_and_go():
        seed = 0
        while not is_over.is_set():
            seed += 1
            begin(shared, ENDLESS | {"prompt": [seed % 300] * 90, "n": 2}).close()
            time.sleep(0.01)

    leaver = threading.Thread(target=come_and_go)
    leaver.start()
    try:
        with ThreadPoolExecutor(6) as pool:
            for _ in range(3):
                found = pool.map(
                    lambda prompt: text_of(shared, prompt=prompt, max_tokens=24), prompts
                )
                assert list(found) == expected
    finally:
        is_over.set()
        leaver.join()
    assert shared.is_idle()


def test_16_a_template_without_a_generation_prompt_is_answered(shared):
    """Hunyuan's templates write none; tags of thinking models are in test_answers.py."""
    found = answer_of(shared, QUESTION | {**GREEDY, "max_tokens": 4}, CHAT)
    assert found["choices"][0]["message"]["role"] == "assistant"
    ids = json.loads(shared.post("/tokenize", QUESTION)[2])["tokens"]
    assert text_of(shared, prompt=ids, max_tokens=4) == found["choices"][0]["message"]["content"]
