"""Outputs of the engine become answers: characters, tags, stop strings, log-probabilities."""

import dataclasses
import shutil

import pytest

from hunyuan_jax.infer.request import Output, TokenLogprobs
from hunyuan_jax.serve import openai
from hunyuan_jax.serve.answers import Answer
from hunyuan_jax.serve.openai import Served
from hunyuan_jax.tokenizer import ByteTokenizer, load_tokenizer
from support import goldens

THINKING = (
    "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    "{% if enable_thinking %}<think>{% endif %}"
)


def served(template=None):
    tokenizer = ByteTokenizer()
    tokenizer.chat_template = template
    return Served("bytes", tokenizer, 259, 4096, {}, (257,), 8)


def said(answer, *outputs):
    """Texts and reasonings of the deltas, joined, and the whole answer."""
    deltas = [delta for delta, _ in map(answer.push, outputs) if delta]
    return deltas, answer.whole(deltas)["choices"][0]


def outputs(answer, text, finish="stop", size=1, index=0):
    """One output for each `size` bytes of a text, then its end."""
    data = text.encode()
    request = answer.job.requests[0].id
    pieces = [tuple(data[i : i + size]) for i in range(0, len(data), size)]
    last = Output(request, index, (257,) if finish == "stop" else (), finish_reason=finish)
    return [*(Output(request, index, piece) for piece in pieces), last]


def chat(template=None, **fields):
    body = {"messages": [{"role": "user", "content": "?"}], **fields}
    model = served(template or "{% for m in messages %}{{ m['content'] }}{% endfor %}")
    return Answer(model, openai.chat_job(model, body))


def completion(**fields):
    model = served()
    return Answer(model, openai.completion_job(model, {"prompt": "a€", **fields}))


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_no_chunk_holds_a_part_of_a_character(size):
    text = "é€😀 end"
    deltas, whole = said(answer := completion(), *outputs(answer, text, size=size))
    assert "".join(delta.text for delta in deltas) == whole["text"] == text
    assert "\ufffd" not in whole["text"]


def test_an_answer_cut_inside_a_character_says_so():
    answer = completion()
    request = answer.job.requests[0].id
    deltas, whole = said(
        answer,
        Output(request, 0, tuple("€".encode()[:2])),
        Output(request, 0, (), finish_reason="length"),
    )
    assert whole["text"] == "\ufffd" and whole["finish_reason"] == "length"
    assert len(deltas) == 1


@pytest.mark.parametrize("size", [1, 3])
def test_a_thinking_model_is_split_and_no_tag_leaks(size):
    text = "<think>\nwell\n</think>\n<answer>\nYes.\n</answer>"
    answer = chat(THINKING)
    deltas, whole = said(answer, *outputs(answer, text, size=size))
    assert whole["message"] == {
        "role": "assistant",
        "content": "Yes.",
        "reasoning_content": "well",
    }
    assert whole["finish_reason"] == "stop"
    said_so_far = [answer.chunk(delta)["choices"][0]["delta"] for delta in deltas]
    assert "".join(d.get("reasoning_content", "") for d in said_so_far) == "well"
    assert "".join(d.get("content", "") for d in said_so_far) == "Yes."
    assert not any("<" in str(d) for d in said_so_far)


def test_reasoning_can_be_left_out_and_may_begin_in_the_prompt():
    answer = chat(THINKING, include_reasoning=False)
    _, whole = said(answer, *outputs(answer, "<think>a</think>b"))
    assert whole["message"]["content"] == "b" and whole["message"]["reasoning_content"] is None
    answer = chat(THINKING, chat_template_kwargs={"enable_thinking": True})
    assert answer.job.starts_thinking
    _, whole = said(answer, *outputs(answer, "a</think>b"))
    assert whole["message"] == {"role": "assistant", "content": "b", "reasoning_content": "a"}


@pytest.mark.parametrize(
    ("begun", "is_open", "starts_thinking"),
    [
        ("I gue", True, True),
        ("I guess.</think>Y", True, False),
        ("<think>I gue", False, True),
        ("Y", False, False),
    ],
)
def test_a_message_that_is_continued_may_end_in_its_reasoning(begun, is_open, starts_thinking):
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": begun}]
    answer = chat(
        THINKING,
        messages=messages,
        continue_final_message=True,
        chat_template_kwargs={"enable_thinking": is_open},
    )
    assert answer.job.starts_thinking == starts_thinking
    _, whole = said(answer, *outputs(answer, "ss</think>es."))
    if starts_thinking:
        assert whole["message"]["reasoning_content"] == "ss"
        assert whole["message"]["content"] == "es."


@pytest.fixture(scope="module")
def hy3(tmp_path_factory):
    """A server's model whose tags are special tokens, with Hy3's names and efforts."""
    folder, source = tmp_path_factory.mktemp("hy3"), goldens.folder_of("moe_top1")
    for name in ("tokenizer_config.json", "config.json"):
        shutil.copyfile(source / name, folder / name)
    text = (source / "tokenizer.json").read_text()
    for was, name in (
        ("<|extra_1|>", "<think:opensource>"),
        ("<|extra_2|>", "</think:opensource>"),
    ):
        text = text.replace(was, name)
    (folder / "tokenizer.json").write_text(text)
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = (
        "{{ messages[0].content }}<think:opensource>"
        "{% if reasoning_effort == 'no_think' %}</think:opensource>{% endif %}"
    )
    return Served("hy3", tokenizer, tokenizer.vocab_size, 4096, {}, tokenizer.stop_ids, 8)


@pytest.mark.parametrize(("effort", "reasoning"), [("high", "why"), ("none", None)])
def test_tags_that_are_tokens_split_the_answer(hy3, effort, reasoning):
    body = {"messages": [{"role": "user", "content": "?"}], "reasoning_effort": effort}
    answer = Answer(hy3, openai.chat_job(hy3, body))
    assert answer.job.starts_thinking == (effort == "high")
    tokenizer, request = hy3.tokenizer, answer.job.requests[0].id
    ids = tokenizer.encode("because")
    if reasoning:
        ids = [*tokenizer.encode("why"), tokenizer.special_id("</think:opensource>"), *ids]
    stop = Output(request, 0, hy3.stop_ids[:1], finish_reason="stop")
    _, whole = said(answer, *(Output(request, 0, (i,)) for i in ids), stop)
    assert whole["message"]["reasoning_content"] == reasoning
    assert whole["message"]["content"] == "because"


def test_a_model_that_does_not_think_keeps_its_tags():
    answer = chat()
    _, whole = said(answer, *outputs(answer, "<think>a</think>b"))
    assert whole["message"] == {"role": "assistant", "content": "<think>a</think>b"}


def test_a_stop_string_across_outputs_ends_its_choice_only():
    answer = completion(stop=["END"], n=2)
    request = answer.job.requests[0].id
    text = []
    for byte in b"abENDx":
        delta, is_cut = answer.push(Output(request, 0, (byte,)))
        text += [delta.text] if delta else []
        if is_cut:
            assert delta.finish_reason == "stop" and delta.stop_reason == "END"
    assert "".join(text) == "ab"
    assert answer.finish_reasons == ["stop"] and not answer.is_done
    assert answer.num_tokens == 5  # what came after the stop string does not count
    answer.push(Output(request, 1, (65, 257), finish_reason="stop"))
    answer.push(Output(request, 0, (), finish_reason="abort"))
    assert answer.is_done and answer.finish_reasons == ["stop", "stop"]


@pytest.mark.parametrize(
    ("fields", "last", "reason", "stop_reason", "text"),
    [
        ({}, (257,), "stop", None, "ab"),
        ({"include_stop_str_in_output": True, "skip_special_tokens": False}, (257,), "stop", None,
         "ab<|eos|>"),
        ({"stop_token_ids": [99]}, (99,), "stop", 99, "ab"),
        ({"stop_token_ids": [99], "include_stop_str_in_output": True}, (99,), "stop", 99, "abc"),
        ({}, (99,), "length", None, "abc"),
    ],
)  # fmt: skip
def test_how_an_answer_ends(fields, last, reason, stop_reason, text):
    answer = completion(**fields)
    request = answer.job.requests[0].id
    _, whole = said(
        answer, Output(request, 0, (97, 98)), Output(request, 0, last, finish_reason=reason)
    )
    assert whole["finish_reason"] == reason and whole["stop_reason"] == stop_reason
    assert whole["text"] == text
    assert answer.usage()["completion_tokens"] == 3


def test_echoed_logprobs_stand_with_their_tokens():
    answer = completion(echo=True, logprobs=1, max_tokens=1)
    prompt = answer.job.requests[0].tokens
    assert answer.job.requests[0].sampling.prompt_logprobs == 1
    found = (None, *(TokenLogprobs(-float(i), ((7, -0.5),)) for i in range(1, len(prompt))))
    new = TokenLogprobs(-0.25, ((98, -0.25),))
    _, whole = said(
        answer,
        Output(answer.job.requests[0].id, 0, (98,), (new,), found, "length"),
    )
    assert whole["text"] == "a€b"
    written = whole["logprobs"]
    assert written["token_logprobs"] == [None, -1.0, -2.0, -3.0, -0.25]
    assert written["tokens"] == ["a", "bytes:\\xe2", "bytes:\\x82", "bytes:\\xac", "b"]
    assert written["text_offset"] == [0, 1, 1, 1, 2]
    assert written["top_logprobs"][1:] == [
        {"\x07": -0.5, "bytes:\\xe2": -1.0},
        {"\x07": -0.5, "bytes:\\x82": -2.0},
        {"\x07": -0.5, "bytes:\\xac": -3.0},
        {"b": -0.25},
    ]
    assert answer.usage() == {
        "prompt_tokens": 4,
        "completion_tokens": 1,
        "total_tokens": 5,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_tokens_of_the_same_text_do_not_hide_each_other():
    """Ids past the vocabulary all read U+FFFD; the best one keeps the text."""
    model = dataclasses.replace(served(), vocab_size=400)
    answer = Answer(model, openai.completion_job(model, {"prompt": "a", "logprobs": 3}))
    found = TokenLogprobs(-0.5, ((300, -0.5), (301, -1.0), (302, float("-inf"))))
    _, whole = said(answer, Output(answer.job.requests[0].id, 0, (300,), (found,), None, "length"))
    assert whole["logprobs"]["top_logprobs"] == [
        {"\ufffd": -0.5, "token_id:301": -1.0, "token_id:302": -9999.0}
    ]


def test_tokens_can_be_named_by_id_and_listed():
    answer = completion(logprobs=0, return_tokens_as_token_ids=True, return_token_ids=True)
    found = TokenLogprobs(-0.5, ())
    deltas, whole = said(
        answer, Output(answer.job.requests[0].id, 0, (98,), (found,), None, "length")
    )
    assert whole["logprobs"]["tokens"] == ["token_id:98"]
    assert whole["logprobs"]["top_logprobs"] == [{"token_id:98": -0.5}]
    assert whole["token_ids"] == [98]
    assert whole["prompt_token_ids"] == list("a€".encode())
    assert answer.chunk(deltas[0])["choices"][0]["token_ids"] == [98]


def test_prompt_logprobs_come_once_by_id():
    answer = completion(prompt_logprobs=1, max_tokens=2)
    prompt = answer.job.requests[0].tokens
    found = (None, *(TokenLogprobs(-2.0, ((7, -0.5),)) for _ in prompt[1:]))
    request = answer.job.requests[0].id
    deltas, whole = said(
        answer,
        Output(request, 0, (98,), None, found),
        Output(request, 0, (99,), finish_reason="length"),
    )
    assert whole["prompt_logprobs"][:2] == [
        None,
        {
            "226": {"logprob": -2.0, "rank": None, "decoded_token": "\ufffd"},
            "7": {"logprob": -0.5, "rank": 1, "decoded_token": "\x07"},
        },
    ]
    assert [delta.prompt_logprobs is None for delta in deltas] == [False, True]
    assert answer.chunk(deltas[0])["choices"][0]["prompt_logprobs"] == whole["prompt_logprobs"]


def test_counts_so_far_come_with_each_chunk_if_asked():
    answer = completion(
        stream=True, stream_options={"include_usage": True, "continuous_usage_stats": True}
    )
    deltas, _ = said(answer, *outputs(answer, "ab", "length"))
    assert answer.chunk(deltas[0])["usage"]["completion_tokens"] == 2
    assert answer.usage_chunk()["usage"]["total_tokens"] == 6
