"""What a body means to the engine: every field, its default and its limits."""

import pytest

from hunyuan_jax.infer.settings import DEFAULTS
from hunyuan_jax.serve import fields, openai
from hunyuan_jax.serve.errors import Refused
from hunyuan_jax.serve.openai import Served
from hunyuan_jax.tokenizer import ByteTokenizer
from support import paths

QUESTION = [{"role": "user", "content": "?"}]
TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]"
    "{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}{{ m['content'] }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}{{ style }}"
)


def served(**changes):
    tokenizer = ByteTokenizer()
    tokenizer.chat_template = TEMPLATE
    values = {
        "name": "m",
        "tokenizer": tokenizer,
        "vocab_size": 259,
        "max_context": 64,
        "recommended": {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05},
        "stop_ids": (257,),
        "max_choices": 8,
    }
    return Served(**values | changes)


def completion(**body):
    return openai.completion_job(served(), {"prompt": "abc", **body})


def chat(**body):
    return openai.chat_job(served(), {"messages": QUESTION, **body})


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({}, {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05,
              "min_p": 0.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "logit_bias": (),
              "min_new_tokens": 0, "stop_ids": (257,), "logprobs": None,
              "prompt_logprobs": None, "max_new_tokens": 16}),
        ({"temperature": 0}, {"temperature": 0.0, "repetition_penalty": 1.05}),
        ({"temperature": 1e-7}, {"temperature": 0.0}),
        ({"temperature": 2}, {"temperature": 2.0}),
        ({"top_k": -1}, {"top_k": 0}),
        ({"top_k": 5.0}, {"top_k": 5}),
        ({"top_p": 0}, {"top_p": 1e-9}),
        ({"top_p": 1}, {"top_p": 1.0}),
        ({"min_p": 0.1}, {"min_p": 0.1}),
        ({"repetition_penalty": 1}, {"repetition_penalty": 1.0}),
        ({"presence_penalty": -2}, {"presence_penalty": -2.0}),
        ({"frequency_penalty": 0.5}, {"frequency_penalty": 0.5}),
        ({"logit_bias": {"5": -100, "7": 1.5}}, {"logit_bias": ((5, -100.0), (7, 1.5))}),
        ({"seed": -5}, {"seed": -5}),
        ({"min_tokens": 3}, {"min_new_tokens": 3}),
        ({"min_tokens": 0}, {"min_new_tokens": 0}),
        ({"min_tokens": 300}, {"min_new_tokens": 16}),
        ({"max_tokens": 7}, {"max_new_tokens": 7}),
        ({"max_tokens": 7000}, {"max_new_tokens": 61}),
        ({"stop_token_ids": [9, 257]}, {"stop_ids": (257, 9)}),
        ({"ignore_eos": True}, {"stop_ids": ()}),
        ({"ignore_eos": True, "stop_token_ids": [9]}, {"stop_ids": (9,)}),
        ({"logprobs": 0}, {"logprobs": 0}),
        ({"prompt_logprobs": 20}, {"prompt_logprobs": 20}),
        ({"echo": True, "logprobs": 2}, {"logprobs": 2, "prompt_logprobs": 2}),
        ({"echo": True}, {"prompt_logprobs": None}),
    ],
)  # fmt: skip
def test_sampling(body, expected):
    (request,) = completion(**body).requests
    assert {name: getattr(request.sampling, name) for name in expected} == expected


def test_without_a_folders_settings_the_defaults_hold():
    job = openai.completion_job(served(recommended={}), {"prompt": "a"})
    sampling = job.requests[0].sampling
    assert {name: getattr(sampling, name) for name in DEFAULTS} == DEFAULTS | {
        "max_new_tokens": 16
    }


def test_null_is_the_default_and_unknown_fields_are_ignored():
    names = [*fields.COMPLETION, "unknown", "priority", "\ud800"]
    body = dict.fromkeys(names) | {"prompt": "abc", "unknown": {"a": [1]}}
    (request,) = openai.completion_job(served(), body).requests
    (plain,) = completion().requests
    assert request.sampling.max_new_tokens == plain.sampling.max_new_tokens == 16
    assert request.tokens == plain.tokens == tuple(b"abc")


@pytest.mark.parametrize(
    ("prompt", "rows"),
    [
        ("ab", [(97, 98)]),
        (["a", "b"], [(97,), (98,)]),
        ([5, 6], [(5, 6)]),
        ([[5], [6, 7]], [(5,), (6, 7)]),
        ("<|eos|>a", [(257, 97)]),
        ("\ud83d\ude00", [tuple("😀".encode())]),
        ("\ud800", [tuple("\ufffd".encode())]),
    ],
)
def test_prompts(prompt, rows):
    job = openai.completion_job(served(), {"prompt": prompt})
    assert [request.tokens for request in job.requests] == rows
    assert job.num_prompt_tokens == sum(map(len, rows))
    assert len({request.id for request in job.requests}) == len(rows)


def test_choices_and_salt_and_scores():
    job = completion(n=3, cache_salt="s")
    assert job.requests[0].n == 3 and job.requests[0].cache_salt == "s"
    assert not job.requests[0].only_score
    job = completion(max_tokens=0, echo=True, logprobs=1)
    assert job.requests[0].only_score and job.requests[0].sampling.prompt_logprobs == 1
    full = openai.completion_job(served(), {"prompt": "a" * 64, "max_tokens": 0, "echo": True})
    assert len(full.requests[0].tokens) == 64
    seeds = {completion().requests[0].sampling.seed for _ in range(4)}
    assert len(seeds) == 4


@pytest.mark.parametrize(("kept", "num"), [(3, 3), (-1, 63), (63, 63), (None, None)])
def test_prompts_can_be_truncated_from_the_left(kept, num):
    body = {"prompt": list(range(100)), "truncate_prompt_tokens": kept}
    if num is None:
        with pytest.raises(Refused, match="at most 63 fit") as caught:
            openai.completion_job(served(), body)
        assert caught.value.code == "context_length_exceeded"
    else:
        row = openai.completion_job(served(), body).requests[0].tokens
        assert row == tuple(range(100))[-num:]


def text_of(**body):
    job = chat(**body)
    return bytes(job.requests[0].tokens).decode()


def test_chats_are_written_by_the_models_template():
    assert text_of() == "[user]?[assistant]"
    assert text_of(add_generation_prompt=False) == "[user]?"
    assert text_of(chat_template_kwargs={"style": "!"}) == "[user]?[assistant]!"
    developer = [{"role": "developer", "content": "be"}, *QUESTION]
    assert text_of(messages=developer) == "[system]be[user]?[assistant]"
    parts = [{"role": "user", "content": [{"type": "text", "text": "?"}]}]
    assert text_of(messages=parts) == "[user]?[assistant]"
    begun = [*QUESTION, {"role": "assistant", "content": "So"}]
    assert text_of(messages=begun, continue_final_message=True) == "[user]?[assistant]So"
    assert text_of(messages=begun, add_generation_prompt=True) == (
        "[user]?[assistant]So[assistant]"
    )
    thought = [*QUESTION, {"role": "assistant", "content": "Yes", "reasoning_content": "well"}]
    assert text_of(messages=[*thought, *QUESTION]) == (
        "[user]?[assistant](well)Yes[user]?[assistant]"
    )
    with pytest.raises(Refused, match="write the reasoning into the content"):
        chat(messages=thought, continue_final_message=True)
    forged = [{"role": "user", "content": "<|eos|>"}]
    assert 257 not in chat(messages=forged).requests[0].tokens


def test_a_folders_limit_and_min_p_hold_where_a_request_names_none():
    model = served(recommended={"max_new_tokens": 9, "min_p": 0.2, "min_new_tokens": 2})
    job = openai.chat_job(model, {"messages": QUESTION})
    sampling = job.requests[0].sampling
    assert (sampling.max_new_tokens, sampling.min_p, sampling.min_new_tokens) == (9, 0.2, 2)
    job = openai.chat_job(model, {"messages": QUESTION, "max_tokens": 20, "min_p": 0})
    sampling = job.requests[0].sampling
    assert (sampling.max_new_tokens, sampling.min_p) == (20, 0.0)
    assert openai.completion_job(model, {"prompt": "a"}).requests[0].sampling.max_new_tokens == 16


def test_how_long_a_chat_may_answer():
    room = 64 - len("[user]?[assistant]")
    assert chat().requests[0].sampling.max_new_tokens == room
    assert chat(max_tokens=3).requests[0].sampling.max_new_tokens == 3
    both = chat(max_tokens=3, max_completion_tokens=4)
    assert both.requests[0].sampling.max_new_tokens == 4
    found = chat(logprobs=True, top_logprobs=3)
    assert found.max_logprobs == found.requests[0].sampling.logprobs == 3
    assert chat(logprobs=True).max_logprobs == 0
    assert chat().max_logprobs is None


REFUSED_COMPLETIONS = {
    "prompt": [None, "", [], [[]], [""], 3, {}, [1.5], [True], ["a", 1], [1, "a"], [[1], "a"],
               [259], [-1], [[2**70]], ["a"] * 2049, ["a"] * 9],
    "max_tokens": [-1, 1.5, "3", True, 2**31, 0],
    "n": [0, 129, 1.5, 9],
    "best_of": [2, 0],
    "echo": [1, "true"],
    "logprobs": [-1, 21, True],
    "suffix": ["x", 3],
}  # fmt: skip
REFUSED_CHATS = {
    "messages": [None, [], {}, "hi", [3], [{}], [{"role": "user"}], [{"role": 3, "content": "a"}],
                 [{"role": "", "content": "a"}], [{"role": "user", "content": 3}],
                 [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
                 [{"role": "user", "content": [{"type": "text"}]}],
                 [{"role": "user", "content": ["a"]}],
                 [{"role": "assistant", "content": "a"}],
                 [{"role": "assistant", "content": None, "tool_calls": [{}]}],
                 QUESTION * 4097],
    "max_tokens": [0, -1],
    "max_completion_tokens": [0],
    "logprobs": [1, 5],
    "top_logprobs": [21, 2],
    "tools": [[{"type": "function"}], {}],
    "tool_choice": ["required", {}],
    "functions": [[{}]],
    "response_format": [{"type": "json_object"}, {"type": "json_schema"}, "text"],
    "chat_template": ["{{ 1 }}", 3],
    "chat_template_kwargs": [{"messages": "x"}, {"a b": 1}, {"a": []}, [], {"tokenizer": "x"}],
    "continue_final_message": [True, "yes"],
    "add_generation_prompt": ["yes"],
    "include_reasoning": [0],
    "reasoning_effort": [3, "low"],
    "modalities": [["audio"]],
    "n": [9],
}  # fmt: skip
REFUSED_BOTH = {
    "model": ["other", 3, "m" * 300],
    "temperature": [-0.1, 101, "1", True, [], 10**400],
    "top_p": [-0.1, 1.1],
    "top_k": [-2, 1.5, 2**31],
    "min_p": [-0.1, 1.1],
    "repetition_penalty": [0, -1, 101],
    "presence_penalty": [2.1, -2.1],
    "frequency_penalty": [2.1, "a"],
    "logit_bias": [[], {"a": 1}, {"-1": 1}, {"1": 101}, {"1": "a"}, {"259": 1}, {"²": 1}],
    "seed": [2**63, -(2**63) - 1, 1.5, "a"],
    "min_tokens": [-1],
    "stop": ["", [""], 3, ["a"] * 17, [3], "a" * 1025],
    "stop_token_ids": [[-1], ["a"], 3, [259], list(range(17))],
    "ignore_eos": ["no"],
    "include_stop_str_in_output": [1],
    "skip_special_tokens": [1],
    "prompt_logprobs": [-1, 21],
    "return_token_ids": [1],
    "return_tokens_as_token_ids": [1],
    "truncate_prompt_tokens": [-2, "a"],
    "cache_salt": [3, "a" * 300],
    "user": [3],
    "stream": ["yes", 1],
    "stream_options": [3, [], {"include_usage": 1}],
}


@pytest.mark.parametrize(
    ("make", "name", "value"),
    [
        *((completion, n, v) for n, values in REFUSED_COMPLETIONS.items() for v in values),
        *((chat, n, v) for n, values in REFUSED_CHATS.items() for v in values),
        *((make, n, v) for n, values in REFUSED_BOTH.items() for v in values
          for make in (completion, chat)),
    ],
    ids=lambda value: str(value)[:20],
)  # fmt: skip
def test_what_breaks_a_rule_names_its_field(make, name, value):
    with pytest.raises(Refused) as caught:
        make(**{name: value})
    refused = caught.value
    assert refused.status == (404 if name == "model" and value == "other" else 400)
    assert refused.param == name or (name == "n" and refused.param == "prompt")
    assert "\n" not in str(refused) and len(str(refused)) < 500
    assert refused.body["error"]["type"] == "invalid_request_error"


def test_every_field_is_tried_above():
    refused = {
        "completion": REFUSED_COMPLETIONS.keys() | REFUSED_BOTH.keys(),
        "chat": REFUSED_CHATS.keys() | REFUSED_BOTH.keys(),
    }
    assert refused["completion"] == fields.COMPLETION.keys()
    assert refused["chat"] == fields.CHAT.keys()


def test_every_field_is_in_the_docs():
    page = (paths.ROOT / "docs" / "serving.md").read_text()
    table = page.partition("## Settings of an answer")[2].partition("\n## ")[0]
    for name in fields.COMPLETION.keys() | fields.CHAT.keys():
        assert f"`{name}`" in table, name
