"""Bodies of every kind: the answer is 200 or says what is wrong, never a failure of the server."""

import json

import hypothesis
import pytest
from hypothesis import strategies as st

from hunyuan_jax.serve import fields

PATHS = {
    "/v1/completions": fields.COMPLETION,
    "/v1/chat/completions": fields.CHAT,
    "/tokenize": fields.TOKENIZE,
    "/detokenize": fields.DETOKENIZE,
}
# Answers stay short; a few fields are right more often than not, so that the others are reached.
RIGHT = {
    "prompt": st.sampled_from(["a", [5, 6], ["a", "b"], [[5], [6, 7]]]),
    "messages": st.just([{"role": "user", "content": "hi"}]),
    "tokens": st.lists(st.integers(0, 383), max_size=5),
    "max_tokens": st.integers(0, 3),
    "max_completion_tokens": st.integers(1, 3),
    "model": st.just("tiny"),
    "n": st.integers(1, 2),
}
NUMBERS = st.one_of(
    st.integers(-3, 130),
    st.floats(-2, 2),
    st.integers(),
    st.floats(),
    st.sampled_from([2**31, 2**63, -(2**63) - 1, 10**400, 1e308, 5e-324, -0.0]),
)
TEXTS = st.one_of(
    st.text(max_size=8),
    st.text(st.characters(), max_size=4),  # surrogates too
    st.sampled_from(["", "\ud800", "\udfff\ud800", "\0", "<|eos|>", "{{ 7*7 }}", "a" * 3000,
                     "user", "assistant", "http://127.0.0.1/", "file:///etc/passwd"]),
)  # fmt: skip
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "role": st.one_of(st.sampled_from(["user", "assistant", "system", "tool"]), SCALARS),
            "content": st.one_of(
                TEXTS,
                SCALARS,
                st.lists(
                    st.fixed_dictionaries(
                        {"type": st.sampled_from(["text", "image_url", "input_audio", 3])},
                        optional={"text": SCALARS, "image_url": SCALARS},
                    ),
                    max_size=2,
                ),
            ),
            "tool_calls": SCALARS,
        },
    ),
    max_size=3,
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(TEXTS, inner, max_size=3)
    ),
    max_leaves=8,
)
NESTED = st.builds(lambda depth: json.loads("[" * depth + "]" * depth), st.integers(1, 400))


@st.composite
def requests(draw):
    path = draw(st.sampled_from(sorted(PATHS)))
    names = sorted(PATHS[path])
    body = {
        name: draw(strategy)
        for name, strategy in RIGHT.items()
        if name in names and draw(st.integers(0, 9)) > 1
    }
    for name in draw(st.lists(st.one_of(st.sampled_from(names), TEXTS), max_size=4)):
        body[name] = draw(st.one_of(VALUES, MESSAGES, NESTED))
    body.setdefault("max_tokens", 2)
    text = json.dumps(body, ensure_ascii=draw(st.booleans()))
    data = text.encode("utf-8", "surrogatepass")
    if draw(st.integers(0, 19)) == 0:  # damaged
        cut = draw(st.integers(0, len(data)))
        data = data[:cut] + draw(st.binary(max_size=4)) + data[cut + draw(st.integers(0, 2)) :]
    return path, data


def ask(shared, path, data):
    status, headers, answer = shared.post(path, data)
    assert status in (200, 400, 404, 413), (status, data[:500], answer)
    if headers["Content-Type"].startswith("text/event-stream"):
        assert answer.endswith(b"data: [DONE]\n\n")
        assert b'"error"' not in answer
        return
    value = json.loads(answer, parse_constant=lambda name: pytest.fail(f"{name} in an answer"))
    if status != 200:
        assert set(value["error"]) == {"message", "type", "param", "code"}
        assert "\n" not in value["error"]["message"] and len(value["error"]["message"]) < 1000


def fuzz(shared, num):
    @hypothesis.settings(max_examples=num, database=None,
                         suppress_health_check=list(hypothesis.HealthCheck))  # fmt: skip
    @hypothesis.given(requests())
    def run(request):
        ask(shared, *request)

    run()
    assert shared.get("/ready")[0] == 200
    assert shared.is_idle()
    assert b'status="500"' not in shared.get("/metrics")[2]


@pytest.mark.heavy
def test_some_hundred_bodies(shared):
    fuzz(shared, 400)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_ten_thousand_bodies(shared):
    fuzz(shared, 10_000)
