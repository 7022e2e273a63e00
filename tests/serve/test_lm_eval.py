"""lm-eval's own clients against the server: `local-completions` and `local-chat-completions`.

They run in a process of their own, since lm-eval may live in another environment: its program
`lm_eval` must be on the PATH.
"""

import json
import os
import shutil
import subprocess

import jax
import numpy as np
import pytest

from support import serving

LM_EVAL = shutil.which("lm_eval")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(LM_EVAL is None, reason="the program lm_eval is not on the PATH"),
]

QUESTIONS = [
    {"question": "The quick", "choices": [" brown", " fox", " the"], "answer": 0},
    {"question": "a b c", "choices": [" d", " e f g"], "answer": 1},
    {"question": "1 2 3", "choices": [" 4", " one", " 5 6"], "answer": 2},
]
TASKS = {
    "choose": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    },
    "write": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 12},
        "metric_list": [{"metric": "exact_match"}],
    },
    "roll": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}}",
        "metric_list": [{"metric": "word_perplexity"}],
    },
}


@pytest.fixture
def evaluate(shared, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    for name, task in TASKS.items():
        common = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test",
        }
        (tmp_path / f"{name}.yaml").write_text(json.dumps(common | task))  # JSON is YAML

    def run(model, path, tasks, *options):
        arguments = f"model=tiny,base_url={shared.url}{path},num_concurrent=4,max_retries=1"
        command = [LM_EVAL, "run", "--model", model, "--model_args", arguments, "--tasks", *tasks]
        command += ["--include_path", str(tmp_path), "--output_path", str(tmp_path / "out")]
        command += ["--log_samples", *options]
        env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        env |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "OPENAI_API_KEY": ""}
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return {
            name: [
                json.loads(line)
                for file in (tmp_path / "out").rglob(f"samples_{name}_*.jsonl")
                for line in file.read_text().splitlines()
            ]
            for name in tasks
        }

    return run


def scores(pretrained, context, continuation):
    """(log-probability of the continuation, whether it is the greedy one) by the model."""
    row = context + continuation
    logprobs_TV = np.asarray(jax.nn.log_softmax(pretrained.logits([row])[0, :-1]))
    logprobs_TV = logprobs_TV[len(context) - 1 :]
    picked = logprobs_TV[np.arange(len(continuation)), continuation]
    return picked.sum(), bool((logprobs_TV.argmax(-1) == continuation).all())


def test_local_completions(evaluate, shared, pretrained):
    samples = evaluate("local-completions", "/v1/completions", ["choose", "write", "roll"])
    tokenizer = serving.served(pretrained).tokenizer
    assert len(samples["choose"]) == len(QUESTIONS)
    for sample in samples["choose"]:
        question, choices = sample["doc"]["question"], sample["doc"]["choices"]
        context = tokenizer.encode(question)
        for (found,), choice in zip(sample["resps"], choices, strict=True):
            whole = tokenizer.encode(question + choice)
            expected = scores(pretrained, whole[: len(context)], whole[len(context) :])
            assert float(found[0]) == pytest.approx(expected[0], abs=1e-4)
            assert str(found[1]) == str(expected[1])
    for sample in samples["roll"]:
        row = [tokenizer.bos_id, *tokenizer.encode(sample["doc"]["question"])]
        expected, _ = scores(pretrained, row[:1], row[1:])
        assert float(sample["resps"][0][0]) == pytest.approx(expected, abs=1e-4)
    for sample in samples["write"]:
        body = {"prompt": sample["doc"]["question"], "temperature": 0, "max_tokens": 12}
        body["stop"] = ["\n\n", "<|eos|>"]
        answer = json.loads(shared.post("/v1/completions", body)[2])
        assert sample["resps"][0][0] == answer["choices"][0]["text"]


def test_local_chat_completions(evaluate, shared):
    samples = evaluate(
        "local-chat-completions", "/v1/chat/completions", ["write"], "--apply_chat_template"
    )
    for sample in samples["write"]:
        messages = [{"role": "user", "content": sample["doc"]["question"]}]
        body = {"messages": messages, "temperature": 0, "max_tokens": 12, "stop": ["\n\n"]}
        answer = json.loads(shared.post("/v1/chat/completions", body)[2])
        assert sample["resps"][0][0] == answer["choices"][0]["message"]["content"]
