"""Judges of answers: functions, a model that says whether an answer is good, or an
OpenAI-compatible API that compares them.

Letters: P prompts, G answers of each, B = P G answers in the order of their prompts, R scores.
"""

import concurrent.futures
import http.client
import json
import os
import random
import re
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from jax.sharding import Mesh

from hunyuan_jax.chat.render import render_chat
from hunyuan_jax.config import OnlineConfig
from hunyuan_jax.data.prompts import Prompt
from hunyuan_jax.infer import score
from hunyuan_jax.infer.pretrained import load
from hunyuan_jax.infer.request import Limits
from hunyuan_jax.post.rewards import Reward, bad_reward, rewards_of
from hunyuan_jax.tokenizer import load_tokenizer
from hunyuan_jax.weights.open import open_model

# What a reward model is asked after an answer; docs/post_training.md tells how to train one.
QUESTION = "Is this a good answer? Say yes or no."
VERDICTS = ("yes", "no")

_NUM_REQUESTS = 8  # at the same time
_FIRST_WAIT = 1.0  # seconds before a request is made again; it doubles
_KEY = "OPENAI_API_KEY"
_VERDICT = re.compile(r'\{\s*"best"\s*:\s*(\d+)\s*,\s*"worst"\s*:\s*(\d+)\s*\}')


class Judge(Protocol):
    """Scores answers; more is better."""

    def start(self, mesh: Mesh, seq_len: int) -> None:
        """Takes the run's mesh and its tokens a row, once, before answers are judged."""

    def assist(self) -> None:
        """Takes part while process 0 judges; the other processes call it."""

    def __call__(self, prompts: Sequence[Prompt], texts_PG: Sequence[Sequence[str]]) -> np.ndarray:
        """Returns scores, float32 [B, R]; NaN where there is none.

        Raises:
          ConfigError: it failed, and on_bad_reward is "stop".
        """


def build_judge(cfg: OnlineConfig) -> Judge:
    """Returns the judge that a config names."""
    if cfg.rewards:
        return _Functions(cfg)
    return _Model(cfg) if cfg.reward_model else _Endpoint(cfg)


class _Functions:
    def __init__(self, cfg: OnlineConfig):
        self._cfg = cfg
        self._rewards = [Reward(place, f"config.{cfg.section}.rewards") for place in cfg.rewards]

    def start(self, mesh: Mesh, seq_len: int) -> None:
        """Needs nothing."""

    def assist(self) -> None:
        """Process 0 judges alone."""

    def __call__(self, prompts, texts_PG):
        return rewards_of(self._rewards, self._cfg, prompts, texts_PG)


class _Model:
    """A score is log p("yes") - log p("no") after the chat and QUESTION."""

    def __init__(self, cfg: OnlineConfig):
        self._cfg = cfg
        self._opened = open_model(cfg.reward_model)
        self._tokenizer = load_tokenizer(self._opened.tokenizer)

    def start(self, mesh: Mesh, seq_len: int) -> None:
        max_context = min(2 * seq_len, self._opened.cfg.max_position)
        limits = Limits(max_context=max_context, max_queue=sys.maxsize)
        self._engine = load(self._opened, mesh).new_engine(limits)

    def assist(self) -> None:
        """Computes this process's part of the model."""
        self._engine.follow()

    def __call__(self, prompts, texts_PG):
        try:
            return self._scores(prompts, texts_PG)
        finally:
            self._engine.pause()

    def _scores(self, prompts, texts_PG):
        verdicts = [self._tokenizer.encode(verdict) for verdict in VERDICTS]
        rows, starts, names, long = [], [], [], []
        for prompt, texts in zip(prompts, texts_PG, strict=True):
            for text in texts:
                ids = render_chat(asked(prompt, text), self._tokenizer)
                if len(ids) + max(map(len, verdicts)) > self._engine.max_context:
                    long.append(len(names))
                names.append(prompt.name)
                rows += [[*ids, *verdict] for verdict in verdicts]
                starts += [len(ids)] * len(verdicts)
        for place in long:
            rows[2 * place : 2 * place + 2] = [verdicts[0]] * 2  # scored and left out
            starts[2 * place : 2 * place + 2] = [len(verdicts[0])] * 2
        if long:
            fault = (
                f"{len(long)} of {len(names)} chats are longer than the "
                f"{self._engine.max_context} tokens of the model, the first of {names[long[0]]}."
            )
            bad_reward(self._cfg, "reward_model", fault)
        found = score.of_ends(self._engine, rows, starts)
        sums = np.array([sum(entry.logprob for entry in row) for row in found], np.float32)
        score_B = sums[::2] - sums[1::2]
        score_B[long] = np.nan
        return score_B[:, None]


def asked(prompt: Prompt, text: str) -> list[Mapping[str, Any]]:
    """The chat in which a reward model says its verdict."""
    return [
        *messages_of(prompt),
        {"role": "assistant", "content": text},
        {"role": "user", "content": QUESTION},
    ]


def messages_of(prompt: Prompt) -> list[Mapping[str, Any]]:
    """A prompt as messages."""
    if isinstance(prompt.prompt, str):
        return [{"role": "user", "content": prompt.prompt}]
    return list(prompt.prompt)


class _Failed(Exception):
    """The endpoint gave no verdict; the message is a clause."""


class _Endpoint:
    """The best answer of a prompt scores 1, the worst 0, the others 1/2."""

    def __init__(self, cfg: OnlineConfig):
        self._cfg = cfg

    def start(self, mesh: Mesh, seq_len: int) -> None:
        """Needs nothing."""

    def assist(self) -> None:
        """Process 0 judges alone."""

    def __call__(self, prompts, texts_PG):
        faults = []

        def of_prompt(prompt, texts):
            # The order is drawn, since models prefer the first or the last answer.
            order = random.Random(prompt.name).sample(range(len(texts)), len(texts))
            score_G = np.full(len(texts), 0.5, np.float32)
            try:
                best, worst = self._verdict(prompt, [texts[i] for i in order])
            except _Failed as error:
                faults.append((prompt.name, str(error)))
                return score_G * np.nan
            if best != worst:
                score_G[order[best]], score_G[order[worst]] = 1, 0
            return score_G

        with concurrent.futures.ThreadPoolExecutor(_NUM_REQUESTS) as pool:
            score_PG = list(pool.map(of_prompt, prompts, texts_PG))
        if faults:
            name, why = min(faults)
            count = f"{len(faults)} of {len(prompts)} comparisons failed, the first of {name}"
            bad_reward(self._cfg, "endpoint", f"{self._cfg.endpoint}: {count}: {why}.")
        return np.concatenate(score_PG)[:, None]

    def _verdict(self, prompt: Prompt, texts: Sequence[str]) -> tuple[int, int]:
        """0-based numbers of the best and the worst text."""
        content = self._ask(comparison(self._cfg.criterion, prompt, texts))
        found = _VERDICT.findall(content)
        if not found:
            raise _Failed(f"no verdict in its answer {content[-60:]!r}")
        best, worst = (int(number) - 1 for number in found[-1])
        if not {best, worst} <= set(range(len(texts))):
            raise _Failed(f"its verdict {found[-1]} names no answer of 1 to {len(texts)}")
        return best, worst

    def _ask(self, content: str) -> str:
        body = {"messages": [{"role": "user", "content": content}], "temperature": 0}
        if self._cfg.endpoint_model:
            body["model"] = self._cfg.endpoint_model
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(_KEY):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(
            f"{self._cfg.endpoint.rstrip('/')}/chat/completions",
            json.dumps(body).encode(),
            headers,
        )
        tries = self._cfg.retries + 1
        for number in range(tries):
            if number:
                time.sleep(_FIRST_WAIT * 2 ** (number - 1))
            try:
                with urllib.request.urlopen(request, timeout=self._cfg.timeout) as answer:
                    return json.load(answer)["choices"][0]["message"]["content"] or ""
            except urllib.error.HTTPError as error:
                with error:
                    text = " ".join(error.read(500).decode(errors="replace").split())
                why = f"status {error.code}, {text}"
                if error.code < 500 and error.code not in (408, 429):
                    raise _Failed(why) from error
            except (OSError, http.client.HTTPException) as error:
                why = str(getattr(error, "reason", error)) or type(error).__name__
            except (ValueError, LookupError, TypeError) as error:
                raise _Failed(f"its answer is not a chat completion ({error})") from error
        raise _Failed(f"{why} ({tries} tries)")


def comparison(criterion: str, prompt: Prompt, texts: Sequence[str]) -> str:
    """What an endpoint is asked about the answers to a prompt."""
    chat = "\n\n".join(f"{m['role']}: {m.get('content')}" for m in messages_of(prompt))
    answers = "\n\n".join(f"## Answer {i}\n\n{text}" for i, text in enumerate(texts, start=1))
    return (
        "Compare the answers of an assistant to the conversation below. "
        f"{criterion}\n\n# Conversation\n\n{chat}\n\n# Answers\n\n{answers}\n\n# Verdict\n\n"
        "End with one line that names the best and the worst answer by number, such as "
        '{"best": 2, "worst": 1}.'
    )
