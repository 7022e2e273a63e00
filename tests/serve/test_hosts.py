"""One server over two processes on loopback, with four CPU devices each."""

import concurrent.futures
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

import hunyuan_jax
from hunyuan_jax.config import MeshConfig, MoeConfig
from hunyuan_jax.infer.pretrained import Pretrained
from hunyuan_jax.infer.request import Request
from hunyuan_jax.infer.settings import Sampling
from hunyuan_jax.parallel.mesh import make_mesh
from support import folders, paths, processes, serving

FLAGS = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"
PROMPT = "The quick brown fox"
SIZES = ("--max_rows=4", "--max_context=48")
# Experts lie across the processes: 2 of 4 in each.
MESH = "--mesh=expert:4,tensor:2"
# Those of a request that the admit program prepares.
PENALTIES = {"repetition_penalty": 1.4, "presence_penalty": 0.5, "logit_bias": {"40": 3}}
GREEDY = {"prompt": PROMPT, "temperature": 0, "max_tokens": 8, "ignore_eos": True}
GREEDY |= {"top_k": 0, "top_p": 1, "repetition_penalty": 1, "return_token_ids": True}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A mixture of four experts with a tokenizer."""
    cfg = folders.small(
        vocab_size=384,
        max_position=64,
        eos_token_ids=(3,),
        num_layers=2,
        moe=MoeConfig(num_experts=4, num_shared_experts=1),
    )
    found = tmp_path_factory.mktemp("models") / "mixture"
    Pretrained(cfg, folders.random_params(cfg, seed=1)).save_pretrained(found)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(serving.FOLDER / name, found)
    return found


@pytest.fixture(scope="module")
def alone(folder):
    """The same model on this process's eight devices."""
    return hunyuan_jax.load(folder, mesh=make_mesh(MeshConfig(data=1, expert=4, tensor=2)))


def started(folder, *options_of_each):
    """A server for each tuple of options; the first answers."""
    command = [sys.executable, "-m", "hunyuan_jax", "serve", f"--checkpoint={folder}", "--port=0"]
    return [
        serving.Process([*command, *SIZES, *options], env)
        for env, options in zip(
            processes.environments(len(options_of_each), FLAGS), options_of_each, strict=True
        )
    ]


@pytest.fixture
def server(folder):
    """(process 0, process 1), which serve and have all programs."""
    both = started(folder, (MESH,), (MESH, "--api_key_file=/absent"))
    try:
        both[0].wait_until_it_serves()
        wait_until_ready(both[0])
        yield both
    finally:
        for process in both:
            process.close()


def wait_until_ready(server):
    for _ in range(processes.PATIENCE):
        try:
            urllib.request.urlopen(f"{server.url}/ready").close()
            return
        except urllib.error.HTTPError as e:  # 503
            e.close()
        time.sleep(1)
    raise AssertionError(server.lines)


def ended(process):
    """(exit status, lines of standard error)."""
    lines = process.process.communicate(timeout=processes.PATIENCE)[1].splitlines()
    return process.process.returncode, lines


def asked(server, **fields):
    with server.post(GREEDY | fields) as answer:
        return json.load(answer)


def expected(lm, **fields):
    """(ids, their log-probabilities) of a greedy answer of eight tokens."""
    sampling = Sampling(temperature=0, max_new_tokens=8, stop_ids=(), logprobs=0, **fields)
    request = Request("", tuple(lm.tokenizer.encode(PROMPT)), sampling.resolved({}))
    ids, logprobs = [], []
    for output in lm.model.engine.run([request]):
        ids += output.tokens
        logprobs += [entry.logprob for entry in output.logprobs]
    return ids, logprobs


def test_two_processes_answer_as_one_and_end_together(server, alone):
    first, second = server
    ids, logprobs = expected(alone)
    (choice,) = asked(first, logprobs=2)["choices"]
    assert choice["token_ids"] == ids
    assert choice["logprobs"]["token_logprobs"] == pytest.approx(logprobs, abs=1e-4)
    with first.post(GREEDY | {"stream": True}) as answer:
        events = answer.read().decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    parts = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    text = "".join(part["choices"][0]["text"] for part in parts if part["choices"])
    assert text == choice["text"]
    bias = tuple((int(token), value) for token, value in PENALTIES["logit_bias"].items())
    penalised = expected(alone, **{**PENALTIES, "logit_bias": bias})[0]
    assert penalised != ids
    assert asked(first, **PENALTIES)["choices"][0]["token_ids"] == penalised
    scored = asked(first, echo=True, max_tokens=0, logprobs=0)["choices"][0]["logprobs"]
    (of_prompt,) = alone.logprobs([PROMPT])
    assert scored["token_logprobs"][1:] == pytest.approx(of_prompt, abs=1e-4)
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        crowd = list(threads.map(lambda i: asked(first, max_tokens=8 - i % 3), range(8)))
    for i, found in enumerate(crowd):
        assert found["choices"][0]["token_ids"] == ids[: 8 - i % 3]
    # Process 1 waits for process 0, which finishes an answer first.
    second.process.send_signal(signal.SIGTERM)
    with first.post(GREEDY | {"stream": True, "max_tokens": 20}) as answer:
        begin = answer.readline()
        first.process.send_signal(signal.SIGTERM)
        assert (begin + answer.read()).endswith(b"data: [DONE]\n\n")
    assert first.wait() == 0
    status, lines = ended(second)
    assert status == 0
    assert lines == [
        "process 1 of 2 follows process 0",
        "process 1 of 2 ends with process 0; send signals there",
    ]


@pytest.mark.parametrize("killed", [1, 0])
def test_without_one_process_the_other_ends(server, killed):
    with server[0].post(GREEDY | {"stream": True, "max_tokens": 40}) as answer:
        answer.readline()
        server[killed].process.kill()
        begin = time.monotonic()
        status = server[1 - killed].wait()
        assert time.monotonic() - begin < 20
    assert status != 0
    if killed:
        assert status == 1
        lines = server[0].lines
    else:
        lines = ended(server[1])[1]
    assert sum(f"process {killed} of 2 is gone" in line for line in lines) == 1
    assert not any("Traceback" in line for line in lines)


def test_what_stops_all_before_they_serve(folder, tmp_path):
    absent = f"--checkpoint={tmp_path / 'absent'}"
    for options, message in (
        (((MESH,), (MESH, "--max_context=40")), "processes [1] see another limits"),
        (((MESH,), (MESH, "--quantize=int8")), "processes [1] see another options"),
        (((MESH,), (MESH, absent)), "process 1 of 2 has stopped: "),
        (((MESH, "--api_key_file=/absent"), (MESH,)), "--api_key_file=/absent cannot be read"),
        (((), ()), "--mesh is not given, and 2 processes have joined"),
    ):
        both = started(folder, *options)
        try:
            found = [ended(process) for process in both]
        finally:
            for process in both:
                process.close()
        assert [status for status, _ in found] == [2, 2], found
        assert message in found[0][1][-1], found
        assert not any("Traceback" in line for _, lines in found for line in lines)


def test_generate_over_two_processes(folder, alone):
    command = [sys.executable, "-m", "hunyuan_jax", "generate", f"--checkpoint={folder}", MESH]
    command += [f"--prompt={PROMPT}", "--temperature=0", "--max_new_tokens=8"]
    run = functools.partial(
        subprocess.run, command, cwd=paths.ROOT, capture_output=True, text=True
    )
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        both = [
            threads.submit(run, env=env, timeout=processes.PATIENCE, check=True)
            for env in processes.environments(2, FLAGS)
        ]
        first, second = (process.result() for process in both)
    completion = alone.generate(PROMPT, Sampling(temperature=0, max_new_tokens=8))
    # Gloo, which only CPUs use, writes to standard output too.
    assert PROMPT in first.stdout and first.stdout.endswith(f"{completion.text}\n")
    assert PROMPT not in second.stdout
    assert second.stderr == "process 1 of 2 follows process 0\n"
