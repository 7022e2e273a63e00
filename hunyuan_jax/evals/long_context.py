"""Runs RULER and needle tests over lengths, and depths, of the context."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from hunyuan_jax.evals import ruler
from hunyuan_jax.evals.answers import GREEDY, Answers, Failed, Prompt

# Of the needles of `needle` and `multi_needle`.
NEEDLE = ruler.Needles("essay")
MULTI_NEEDLE = ruler.Needles("essay", num_values=4)


class Run:
    """A model and how it is asked.

    answers: of the model; num_samples: of each task and length, or each length and depth;
    is_chat: the question is a user's turn, and the beginning of the answer the assistant's;
    add_bos: a prompt that is no chat begins with bos; text: sentences of essay haystacks, empty
    takes made-up ones; seed: of all samples.
    """

    def __init__(
        self,
        answers: Answers,
        num_samples: int,
        *,
        is_chat: bool = False,
        add_bos: bool = False,
        text: Sequence[str] = (),
        seed: int = 0,
        on_done: Callable[[], None] = lambda: None,
    ):
        self.answers, self.num_samples, self.seed, self.text = answers, num_samples, seed, text
        self._is_chat, self._add_bos, self._on_done = is_chat, add_bos, on_done

    def ids(self, prompt: str, prefix: str) -> list[int]:
        """Of a question with the beginning of its answer."""
        lm = self.answers.lm
        if self._is_chat:
            return [
                *lm.chat_ids([{"role": "user", "content": prompt}]),
                *lm.tokenizer.encode(prefix.lstrip()),
            ]
        bos = [lm.tokenizer.bos_id] * self._add_bos
        return bos + lm.tokenizer.encode(prompt + prefix)

    def count(self, prompt: str, prefix: str) -> int:
        """Tokens of `ids`."""
        if not self._is_chat:
            return len(self.ids(prompt, prefix))
        # Writing a chat takes its time, and what it adds to a prompt is always the same.
        tokenizer = self.answers.lm.tokenizer
        return (
            self._num_chat_tokens
            + len(tokenizer.encode(prompt))
            + len(tokenizer.encode(prefix.lstrip()))
        )

    @functools.cached_property
    def _num_chat_tokens(self) -> int:
        # Two more: a text may get one token more at either end beside those of the template.
        return len(self.ids("?", "")) - len(self.answers.lm.tokenizer.encode("?")) + 2

    def scores(self, samples: Sequence[ruler.Sample]) -> list[float | Failed]:
        """Of each sample, 0 to 1."""
        prompts = []
        for sample in samples:
            score = functools.partial(ruler.score, references=sample.references)
            prompts.append(
                Prompt(
                    self.ids(sample.prompt, sample.prefix),
                    dataclasses.replace(GREEDY, max_new_tokens=sample.num_new, stop_ids=None),
                    # What comes behind the last reference changes no score.
                    is_done=lambda text, score=score: score(text) == 1.0,
                )
            )
        texts = self.answers.texts(prompts, on_done=lambda place: self._on_done())
        return [
            text if isinstance(text, Failed) else ruler.score(text, sample.references)
            for text, sample in zip(texts, samples, strict=True)
        ]


def run_ruler(run: Run, tasks: Sequence[str], lengths: Sequence[int]) -> dict[str, Any]:
    """RULER's scores in percent: scores[task][length], mean[length] over the tasks, and
    by_depth[length][depths] of the tasks with needles.  failed: lines about what has no score.
    """
    samples, failed = _made(
        lambda task, length, index: ruler.sample(
            task, length, index, run.count, seed=run.seed, text=run.text
        ),
        itertools.product(tasks, lengths, range(run.num_samples)),
    )
    points = _scored(run, samples, failed)
    scores = {task: _means((s.length, x) for s, x in points if s.task == task) for task in tasks}
    is_whole = {
        length: all(length in of_length for of_length in scores.values()) for length in lengths
    }
    mean = {
        length: float(np.mean([of_length[length] for of_length in scores.values()]))
        for length in lengths
        if is_whole[length]
    }
    by_depth = {
        length: _means(
            (_depths(s.depth), x) for s, x in points if s.length == length and s.depth is not None
        )
        for length in lengths
    }
    return {
        "samples": run.num_samples,
        "scores": scores,
        "mean": mean,
        "by_depth": {length: row for length, row in by_depth.items() if row},
        "failed": failed,
    }


def run_needles(
    run: Run, needles: ruler.Needles, lengths: Sequence[int], depths: Sequence[float]
) -> dict[str, Any]:
    """A map of needles: scores[length][depth] in percent, mean[length], and failed.

    The first needle lies at the depth, further ones in even steps from there to the end.
    """
    num_needles = needles.num_keys * needles.num_values

    def make(length: int, depth: float, index: int) -> ruler.Sample:
        spread = np.linspace(depth, 100, num_needles + 1)[1:-1]
        name = f"{run.seed}/needle/{num_needles}/{length}/{index}"
        return ruler.needle_sample(
            "needle", needles, length, index, run.count, name, run.text, [depth, *spread.tolist()]
        )

    samples, failed = _made(make, itertools.product(lengths, depths, range(run.num_samples)))
    points = _scored(run, samples, failed)
    return {
        "samples": run.num_samples,
        "needles": num_needles,
        "scores": {
            length: _means((s.depth, x) for s, x in points if s.length == length)
            for length in lengths
        },
        "mean": _means((s.length, x) for s, x in points),
        "failed": failed,
    }


def _made(
    make: Callable[..., ruler.Sample], arguments: Iterable[tuple]
) -> tuple[list[ruler.Sample], list[str]]:
    """The samples that can be made, and a line about each length that is too short.

    The last argument is the number of a sample.
    """
    samples, failed = [], {}
    for values in arguments:
        if values[:-1] in failed:
            continue
        try:
            samples.append(make(*values))
        except ValueError as e:
            failed[values[:-1]] = str(e)
    return samples, list(failed.values())


def _scored(
    run: Run, samples: Sequence[ruler.Sample], failed: list[str]
) -> list[tuple[ruler.Sample, float]]:
    """Samples with their scores in percent; lines about the others are added to `failed`."""
    points = []
    for sample, found in zip(samples, run.scores(samples), strict=True):
        if isinstance(found, Failed):
            failed.append(f"{sample.task}, length {sample.length}: {found.reason}")
        else:
            points.append((sample, 100 * found))
    return points


def _means(pairs: Iterable[tuple[Any, float]]) -> dict[Any, float]:
    """Key -> mean of its values, by ascending key."""
    values: dict[Any, list[float]] = {}
    for key, value in pairs:
        values.setdefault(key, []).append(value)
    return {key: float(np.mean(values[key])) for key in sorted(values)}


def _depths(depth: float) -> str:
    """The fifth of the text that a depth in percent lies in."""
    first = min(int(depth // 20), 4) * 20
    return f"{first}-{first + 20}"
