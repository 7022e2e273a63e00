"""OpenAI's own Python client against the server."""

import math

import openai
import pytest

from support import serving

GREEDY = {"model": "tiny", "temperature": 0, "extra_body": {"repetition_penalty": 1.0}}
CHAT = {"messages": [{"role": "user", "content": "Who are you?"}], **GREEDY}


@pytest.fixture(scope="module")
def client(shared):
    with openai.OpenAI(base_url=f"{shared.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").max_model_len == serving.CONTEXT
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


def test_a_completion_is_that_of_the_model(client, pretrained):
    tokenizer = serving.served(pretrained).tokenizer
    ids = tokenizer.encode("The quick brown fox")
    expected = pretrained.generate([ids], max_new_tokens=12, eos_token_id=())[0, len(ids) :]
    expected = [int(token) for token in expected]
    ended = next((i for i, t in enumerate(expected) if t in tokenizer.stop_ids), None)
    answer = client.completions.create(prompt="The quick brown fox", max_tokens=12, **GREEDY)
    (choice,) = answer.choices
    assert choice.text == tokenizer.decode(expected[:ended], skip_special=True)
    assert choice.finish_reason == ("length" if ended is None else "stop")
    num_new = 12 if ended is None else ended + 1
    assert answer.usage.prompt_tokens == len(ids)
    assert answer.usage.completion_tokens == num_new
    assert answer.usage.total_tokens == len(ids) + num_new
    same = client.completions.create(prompt=ids, max_tokens=12, **GREEDY)
    assert same.choices[0].text == choice.text and same.id != answer.id


def test_sixteen_tokens_are_the_default_of_a_completion_and_what_fits_that_of_a_chat(client):
    options = {"logit_bias": {"2": -100, "3": -100}, **GREEDY}
    answer = client.completions.create(prompt="a", **options)
    assert answer.usage.completion_tokens == 16
    answer = client.chat.completions.create(**CHAT | options)
    assert answer.usage.total_tokens == serving.CONTEXT
    assert answer.choices[0].finish_reason == "length"


def test_a_chat_and_its_stream_say_the_same(client):
    whole = client.chat.completions.create(**CHAT, max_completion_tokens=20, n=2)
    assert whole.object == "chat.completion"
    assert [choice.message.role for choice in whole.choices] == ["assistant"] * 2
    stream = client.chat.completions.create(
        **CHAT, max_tokens=20, n=2, stream=True, stream_options={"include_usage": True}
    )
    said, reasons, roles = ["", ""], [None, None], [[], []]
    chunks = list(stream)
    for chunk in chunks:
        for choice in chunk.choices:
            said[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
            roles[choice.index] += [choice.delta.role] if choice.delta.role else []
    assert said == [choice.message.content for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert roles == [["assistant"]] * 2
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len(chunks) > 6  # it came bit by bit


def test_a_seed_repeats_and_its_choices_differ(client):
    def texts(**options):
        answer = client.completions.create(
            model="tiny", prompt="abc", max_tokens=12, temperature=1.0, n=3, **options
        )
        return [choice.text for choice in sorted(answer.choices, key=lambda c: c.index)]

    assert texts(seed=7) == texts(seed=7)
    assert len(set(texts(seed=7))) == 3
    assert texts(seed=8) != texts(seed=7)
    assert texts() != texts()


def test_several_prompts_are_numbered_by_prompt_then_choice(client):
    answer = client.completions.create(prompt=["ab", "cd"], n=2, max_tokens=4, **GREEDY)
    assert sorted(choice.index for choice in answer.choices) == [0, 1, 2, 3]
    text = {choice.index: choice.text for choice in answer.choices}
    assert text[0] == text[1] and text[2] == text[3]
    alone = client.completions.create(prompt="cd", max_tokens=4, **GREEDY)
    assert alone.choices[0].text == text[2]


def test_stop_strings_end_an_answer(client):
    free = client.completions.create(prompt="stop", max_tokens=30, **GREEDY).choices[0].text
    stop = free[6:9]
    cut = client.completions.create(prompt="stop", max_tokens=30, stop=stop, **GREEDY)
    assert cut.choices[0].text == free[: free.index(stop)]
    assert cut.choices[0].finish_reason == "stop"
    assert cut.choices[0].stop_reason == stop
    kept = client.completions.create(
        prompt="stop",
        max_tokens=30,
        stop=["never there", stop],
        model="tiny",
        temperature=0,
        extra_body={"include_stop_str_in_output": True, "repetition_penalty": 1.0},
    )
    assert kept.choices[0].text == free[: free.index(stop)] + stop


def test_logprobs_of_a_completion(client):
    answer = client.completions.create(prompt="abc", max_tokens=5, logprobs=3, **GREEDY)
    found = answer.choices[0].logprobs
    assert len(found.tokens) == len(found.token_logprobs) == len(found.text_offset) == 5
    for token, logprob, top in zip(
        found.tokens, found.token_logprobs, found.top_logprobs, strict=True
    ):
        assert top[token] == logprob == max(top.values()) and len(top) == 3
        assert math.fsum(map(math.exp, top.values())) <= 1 + 1e-6
    assert found.text_offset[0] == 0 and found.text_offset == sorted(found.text_offset)


def test_logprobs_of_a_chat(client):
    answer = client.chat.completions.create(**CHAT, max_tokens=5, logprobs=True, top_logprobs=2)
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens
    data = b"".join(bytes(entry.bytes) for entry in content)
    assert data.decode(errors="replace").startswith(answer.choices[0].message.content[:2])
    for entry in content:
        assert len(entry.top_logprobs) == 2
        assert entry.top_logprobs[0].logprob == entry.logprob
        assert entry.top_logprobs[0].token == entry.token
    plain = client.chat.completions.create(**CHAT, max_tokens=5)
    assert plain.choices[0].logprobs is None


def test_an_answer_begun_is_continued(client):
    """The same ids come after the beginning of an answer, told as one, as in the whole answer."""
    whole = client.chat.completions.create(**CHAT, max_tokens=10, logprobs=True)
    tokens = whole.choices[0].logprobs.content
    begun = bytes(tokens[0].bytes + tokens[1].bytes)
    if begun.decode(errors="replace") != "".join(t.token for t in tokens[:2]):
        pytest.skip("the model's answer begins inside a character")
    options = {
        **CHAT,
        "messages": [*CHAT["messages"], {"role": "assistant", "content": begun.decode()}],
    }
    options["extra_body"] = options["extra_body"] | {"continue_final_message": True}
    rest = client.chat.completions.create(**options, max_tokens=8)
    assert begun.decode() + rest.choices[0].message.content == whole.choices[0].message.content


@pytest.mark.parametrize(
    ("change", "error", "param", "code"),
    [
        ({"model": "gpt-4"}, openai.NotFoundError, "model", "model_not_found"),
        ({"temperature": -1}, openai.BadRequestError, "temperature", None),
        ({"n": 0}, openai.BadRequestError, "n", None),
        ({"messages": []}, openai.BadRequestError, "messages", None),
        (
            {"messages": [{"role": "user", "content": "x " * 400}]},
            openai.BadRequestError,
            "messages",
            "context_length_exceeded",
        ),
        ({"tools": [{"type": "function"}]}, openai.BadRequestError, "tools", None),
        (
            {"response_format": {"type": "json_object"}},
            openai.BadRequestError,
            "response_format",
            None,
        ),
        ({"top_logprobs": 2}, openai.BadRequestError, "top_logprobs", None),
    ],
)
def test_errors_are_those_of_the_client(client, change, error, param, code):
    with pytest.raises(error) as caught:
        client.chat.completions.create(**CHAT | change)
    assert caught.value.param == param and caught.value.code == code
    assert caught.value.type == "invalid_request_error"
    assert "\n" not in caught.value.message


def test_pictures_are_refused_and_their_addresses_not_opened(client):
    url = "http://127.0.0.1:9/picture.png"
    parts = [
        {"type": "text", "text": "what is this?"},
        {"type": "image_url", "image_url": {"url": url}},
    ]
    with pytest.raises(openai.BadRequestError, match="text parts only") as caught:
        client.chat.completions.create(**CHAT | {"messages": [{"role": "user", "content": parts}]})
    assert url not in caught.value.message
    texts = [{"type": "text", "text": "Who are "}, {"type": "text", "text": "you?"}]
    answer = client.chat.completions.create(
        **CHAT | {"messages": [{"role": "user", "content": texts}]}, max_tokens=6
    )
    expected = client.chat.completions.create(**CHAT, max_tokens=6)
    assert answer.choices[0].message.content == expected.choices[0].message.content


def test_a_full_queue_is_tried_again(pretrained, short_queue):
    """The client waits as long as Retry-After says, and a later try is answered."""
    with (
        serving.running(short_queue, serving.served(pretrained)) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as once,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=4) as patient,
    ):
        options = {"logit_bias": {"2": -100, "3": -100}, **GREEDY}
        busy = []
        for num in range(1, serving.LIMITS.max_rows + 1):
            busy.append(
                once.completions.create(prompt="a", max_tokens=240, stream=True, **options)
            )
            assert server.is_running(num)
        with pytest.raises(openai.RateLimitError) as caught:
            once.completions.create(prompt="b", n=2, max_tokens=1, **GREEDY)
        assert caught.value.response.headers["Retry-After"] == "1"
        assert caught.value.code == "rate_limit_exceeded"
        figures = server.get("/metrics")[2].decode()
        assert 'hunyuan_jax:queue_full_total{model_name="tiny"} 1\n' in figures
        for stream in busy:
            stream.close()
        assert patient.completions.create(prompt="b", max_tokens=1, **GREEDY).choices
