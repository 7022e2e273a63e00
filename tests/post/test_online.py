"""Pairs that the policy writes: what judges say, how pairs are picked, and runs that stop and
continue.
"""

import contextlib
import http.server
import json
import os
import re
import signal
import threading

import numpy as np
import pytest

from hunyuan_jax import from_pretrained
from hunyuan_jax.config import OnlineConfig
from hunyuan_jax.data.prompts import Prompt
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.parallel.mesh import single_device_mesh
from hunyuan_jax.post import judges, online
from hunyuan_jax.post.build import build_objective
from hunyuan_jax.post.rollout import Completion
from hunyuan_jax.tokenizer import load_tokenizer
from hunyuan_jax.train import loop
from support import recipes, runs

PROMPT = Prompt("pairs.jsonl:1", (5, 6), "say 1", {"wanted": 1})


# --- Judges


@contextlib.contextmanager
def serving(answer_of):
    """An OpenAI-compatible API on this machine, which answers with `answer_of(number of the
    request, its message, its headers)`: (status, text); yields its URL.
    """
    count = iter(range(10**6))

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            assert self.path == "/v1/chat/completions"
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            [message] = body["messages"]
            status, text = answer_of(next(count), message["content"], self.headers)
            data = json.dumps({"choices": [{"message": {"content": text}}]}).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def answers_in(message):
    return re.findall(r"## Answer \d+\n\n(.*?)\n\n(?=#)", message, re.DOTALL)


def shortest(number, message, headers):
    """Prefers the shortest answer."""
    lengths = [len(answer) for answer in answers_in(message)]
    best, worst = 1 + int(np.argmin(lengths)), 1 + int(np.argmax(lengths))
    return 200, f'Short is good.\n{{"best": {best}, "worst": {worst}}}'


def endpoint(url, **changes):
    return judges.build_judge(OnlineConfig(**{"endpoint": url, "retries": 0, **changes}))


TEXTS = [["four", "three words", "1", "22"], ["a", "bb", "ccc", "dddd"]]


def test_an_endpoint_compares_with_the_key_of_the_environment(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "a key")
    seen = []

    def answer(number, message, headers):
        seen.append((message, headers["Authorization"]))
        return shortest(number, message, headers)

    with serving(answer) as url:
        found = endpoint(url, criterion="Short ones.")([PROMPT, PROMPT], TEXTS)
    np.testing.assert_array_equal(found[:, 0], [0.5, 0, 1, 0.5, 1, 0.5, 0.5, 0])
    assert {key for _, key in seen} == {"Bearer a key"}
    assert all("Short ones." in text and "user: say 1" in text for text, _ in seen)
    assert any(answers_in(text) not in TEXTS for text, _ in seen)  # in a drawn order


def test_an_endpoint_is_asked_again(monkeypatch):
    monkeypatch.setattr(judges, "_FIRST_WAIT", 0.01)

    def busy_at_first(number, *request):
        return (503, "busy") if number < 2 else shortest(number, *request)

    with serving(busy_at_first) as url:
        assert endpoint(url, retries=2)([PROMPT], TEXTS[1:])[0, 0] == 1


@pytest.mark.parametrize(
    ("answer", "line"),
    [
        ((200, "I like them all."), r"no verdict in its answer 'I like them all\.'\."),
        ((200, '{"best": 1, "worst": 9}'), r"its verdict \('1', '9'\) names no answer of 1 to 4"),
        ((401, "no"), r"status 401, .*no"),
        ((200, None), r"no verdict in its answer ''"),
        (None, r"Connection refused \(1 tries\)\."),
    ],
)
def test_a_judge_that_fails_stops_the_run_or_leaves_groups_out(capsys, answer, line):
    with serving(lambda *request: answer) as url:
        if answer:
            with pytest.raises(ConfigError, match=line):
                endpoint(url)([PROMPT], TEXTS[:1])
    if not answer:  # the server is down
        found = endpoint(url, on_bad_reward="skip")([PROMPT] * 2, TEXTS)
        assert np.isnan(found).all()
        said = capsys.readouterr().err
        assert re.search(line, said) and said.count("\n") == 1
        assert "online.endpoint: http://127" in said and "2 of 2 comparisons failed" in said
        assert "the first of pairs.jsonl:1" in said and said.endswith("groups are left out.\n")


@pytest.mark.heavy
def test_a_reward_model_says_yes_or_no(capsys):
    path = str(recipes.FOLDER)
    judge = judges.build_judge(OnlineConfig(reward_model=path, on_bad_reward="skip"))
    judge.start(single_device_mesh(), 256)
    texts = [["four", "x" * 600]]
    found = judge([PROMPT], texts)[:, 0]
    assert "1 of 2 chats are longer than the" in capsys.readouterr().err and np.isnan(found[1])
    model, tokenizer = from_pretrained(path), load_tokenizer(path)
    ids = judges.render_chat(
        [
            {"role": "user", "content": "say 1"},
            {"role": "assistant", "content": "four"},
            {"role": "user", "content": judges.QUESTION},
        ],
        tokenizer,
    )
    expected = []
    for verdict in map(tokenizer.encode, judges.VERDICTS):
        logits = np.asarray(model.logits([[*ids, *verdict]]))[0, len(ids) - 1 : -1]
        log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        expected.append(sum(log_probs[i, token] for i, token in enumerate(verdict)))
    np.testing.assert_allclose(found[0], expected[0] - expected[1], atol=2e-3)


def test_the_best_and_the_worst_answer_are_a_pair():
    group = [Completion([i, 9], [0.0, 0.0], False) for i in (7, 8, 7)]
    found = online.best_and_worst(PROMPT, group, np.array([1.0, 0.0, 0.5]))
    assert [list(text.ids) for text in found.texts] == [[5, 6, 7, 9], [5, 6, 8, 9]]
    assert [list(text.is_learned) for text in found.texts] == [[False, False, True, True]] * 2
    for score_G in ([0.5, 0.5, 0.5], [1.0, 0.5, 0.0], [1.0, 0.0, np.nan]):
        assert online.best_and_worst(PROMPT, group, np.array(score_G)) is None


# --- Runs

FUNCTIONS = """
def short(completions, wanted, **columns):
    return [-len(text) * w for text, w in zip(completions, wanted)]
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("online")
    (folder / "rewards.py").write_text(FUNCTIONS)
    rows = [
        {"prompt": f"say {i}", "chosen": "yes", "rejected": "no " * 3, "wanted": 1 + i % 2}
        for i in range(12)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def run(files, workdir, **changes):
    config = recipes.config_of(
        "dpo",
        files / "pairs.jsonl",
        **{
            # A dense model, which compiles sooner than a mixture.
            "train__init_from": str(recipes.FOLDER.with_name("dense_bias_untied")),
            "objective__dpo__online__share": 0.5,
            "objective__dpo__online__num_generations": 4,
            "objective__dpo__online__max_new_tokens": 6,
            "data__validation_fraction": 0.2,
            "train__seq_len": 40,
            "train__batch_size": 4,
            "train__num_epochs": 0.0,
            "train__num_steps": 4,
            "train__eval_every": 4,
            "schedule__peak_lr": 1e-2,
            "checkpoint__every": 2,
            **changes,
        },
    )
    with runs.on_one_device():
        assert loop.run(config, workdir, build_objective) == 0
    return [row for row in runs.rows(workdir) if "loss" in row or "validation_loss" in row]


@pytest.fixture(scope="module")
def finished(files, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    fields = {
        "objective__dpo__online__rewards": (f"{files / 'rewards.py'}:short",),
        "objective__dpo__online__from_average": True,
        "objective__dpo__online__steps_per_rollout": 2,
    }
    return workdir, fields, run(files, workdir, **fields)


@pytest.mark.heavy
def test_a_mixed_run_begins_at_ln_2_and_learns_from_both(finished):
    workdir, _, (first, *_, last, validated) = finished
    assert first["loss"] == pytest.approx(np.log(2) + 0.1 * first["nll_loss"], abs=1e-6)
    assert abs(first["rewards/margins"]) < 1e-6
    assert last["rewards/margins"] > 0 and validated["validation_margin"] != 0
    assert first["online/reward"] < 0 < first["online/reward_margin"]
    assert first["online/dropped"] in (0, 0.5) and 1 <= first["online/mean_length"] <= 6
    lines = (workdir / "completions.jsonl").read_text().splitlines()
    samples = [json.loads(line) for line in lines]
    assert [sample["step"] for sample in samples] == [1, 2, 3, 4]
    assert all(len(s["completions"]) == len(s["rewards"]) == 4 for s in samples)


@pytest.mark.slow
def test_a_run_that_is_stopped_within_a_rollout_continues_bit_equal(finished, files, tmp_path):
    workdir, fields, _ = finished
    original = loop.Log.step

    def stop_at_three(self, step, metrics):
        original(self, step, metrics)
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Log, "step", stop_at_three)
        run(files, tmp_path, **fields)
    run(files, tmp_path, **fields)
    assert runs.losses(tmp_path) == runs.losses(workdir)


@pytest.mark.slow
def test_adapters_learn_from_an_endpoint_alone(files, tmp_path):
    with serving(shortest) as url:
        first, *_, last = run(
            files,
            tmp_path,
            objective__dpo__online__share=1.0,
            objective__dpo__online__endpoint=url,
            objective__dpo__reference="adapter_off",
            model__lora__rank=2,
            train__ema_decay=0.0,
            train__num_steps=2,
        )
    assert first["loss"] == pytest.approx(np.log(2) + 0.1 * first["nll_loss"], abs=1e-5)
    assert last["rewards/margins"] != 0 and "validation_loss" not in last
