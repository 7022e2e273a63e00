"""lm-eval's tasks on our engine: its `TemplateLM`, and what runs tasks so that a bad one or a bad
sample leaves the others alone.
"""

import contextlib
import dataclasses
import difflib
import fnmatch
import logging
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from lm_eval import evaluator
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.api.task import Task
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from tqdm import tqdm

from hunyuan_jax.chat.render import render_chat
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.evals.answers import Answers, Failed, Prompt, short_limits
from hunyuan_jax.evals.perplexity import score_rolling
from hunyuan_jax.files import LocalPath, user_path
from hunyuan_jax.infer import text
from hunyuan_jax.infer.settings import Sampling

# Names of lm-eval's generation settings -> ours.
_SETTINGS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
}
# Settings that change nothing here, or that are read elsewhere.
_READ = {"do_sample", "until", "max_gen_toks", "num_beams", "num_return_sequences"}


@register_model("hunyuan_jax")
class HarnessModel(TemplateLM):
    """A model as lm-eval sees it.

    Scores are those of lm-eval's `hf` model on the same weights.  failed: (task, number of the
    document) -> why one of its requests has no answer; such a score is NaN and such a text empty.
    """

    def __init__(
        self,
        checkpoint: str | None = None,
        *,
        answers: Answers | None = None,
        max_length: int | None = None,
        add_bos: bool = False,
        batch_size: int | str | None = None,
        device: str | None = None,
        **more: Any,
    ):
        """A model folder or workdir, or `answers` of one that is loaded.

        Args:
          max_length: tokens that it reads at most; None takes the model's positions.
          add_bos: prompts begin with the tokenizer's bos.
          batch_size, device: of lm-eval's command line; the engine decides about both.

        Raises:
          ConfigError: no model there, or an argument that does not exist.
        """
        super().__init__()
        if more:
            raise ConfigError(f"{next(iter(more))} is not an argument of the model hunyuan_jax.")
        if answers is None:
            if checkpoint is None:
                raise ConfigError("checkpoint is missing; pass --model_args checkpoint=DIR.")
            lm = text.load(checkpoint)
            answers = Answers(lm, short_limits(lm, max_length))
        self._answers, self._add_bos = answers, add_bos
        self.tokenizer = answers.lm.tokenizer
        self.failed: dict[tuple[str | None, int | None], str] = {}

    def warm_up(self) -> None:
        """Compiles every program, so that no answer waits for one."""
        self._answers.warm_up()

    # -- what lm-eval asks about ----------------------------------------------

    @property
    def max_length(self) -> int:
        """Tokens that the model reads at most."""
        return self._answers.max_length

    @property
    def max_gen_toks(self) -> int:
        """Tokens of an answer where a task says nothing."""
        return 256

    @property
    def eot_token_id(self) -> int:
        """The id that ends a text."""
        return self.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The id that stands before a text without a context."""
        return self.tokenizer.bos_id

    @property
    def tokenizer_name(self) -> str:
        """Of the cache of requests."""
        return f"hunyuan_jax-{self.tokenizer.fingerprint()}"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template of the model's folder, for the record of a run."""
        return self.tokenizer.chat_template if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The text of a chat, which ends in the assistant's last message if no prompt for an
        answer is added.
        """
        ids = render_chat(
            chat_history,
            self.tokenizer,
            parse_special=True,
            add_generation_prompt=add_generation_prompt if self.tokenizer.chat_template else None,
        )
        written = self.tokenizer.decode(ids)
        if add_generation_prompt:
            return written
        last = chat_history[-1]["content"].strip()
        return written[: written.rindex(last) + len(last)]

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """The ids of a text in which names of special tokens are tokens.

        add_special_tokens: whether it begins with bos; None takes add_bos.  A text that has one
        gets no second.
        """
        ids = self.tokenizer.encode(string, parse_special=True)
        wants_bos = self._add_bos if add_special_tokens is None else add_special_tokens
        if wants_bos and ids[:1] != [self.tokenizer.bos_id]:
            return [self.tokenizer.bos_id, *ids]
        return ids

    # -- answers --------------------------------------------------------------

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """(log-probability, whether greedy decoding writes it) of each continuation."""
        found: list[tuple[float, bool]] = [(float("nan"), False)] * len(requests)
        good = []
        for place, request in enumerate(requests):
            if request.args[1]:
                good.append(place)
            else:
                self._fail(request, "the continuation is empty")
        self._asked = [requests[place] for place in good]
        scores = super().loglikelihood(self._asked, disable_tqdm) if good else []
        for place, score in zip(good, scores, strict=True):
            found[place] = score
        return found

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        with _bar("loglikelihood", len(pairs), disable_tqdm) as on_done:
            scores = self._answers.scores(pairs, on_done)
        results = []
        for (texts, *_), asked, score in zip(requests, self._asked, scores, strict=True):
            if isinstance(score, Failed):
                self._fail(asked, score.reason)
                results.append((float("nan"), False))
                continue
            results.append((score.logprob, score.is_greedy))
            self.cache_hook.add_partial("loglikelihood", texts, results[-1])
        return results

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """The log-probability of each text, all its tokens counted once."""
        rows = [self.tok_encode(request.args[0]) for request in requests]
        # A long text is done several times, once in each of its windows.
        with _bar("loglikelihood_rolling", None, disable_tqdm) as on_done:
            scores = score_rolling(self._answers, rows, self.prefix_token_id, on_done=on_done)
        results = []
        for request, found in zip(requests, scores, strict=True):
            if isinstance(found, Failed):
                self._fail(request, found.reason)
                results.append(float("nan"))
                continue
            results.append(found.logprob)
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, results[-1])
        return results

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each context, up to the first stop string."""
        found, places, prompts = [""] * len(requests), [], []
        for place, request in enumerate(requests):
            try:
                prompts.append(self._prompt(*request.args))
                places.append(place)
            except ValueError as e:
                self._fail(request, str(e))
        with _bar("generate_until", len(prompts), disable_tqdm) as on_done:
            answers = self._answers.texts(prompts, on_done)
        for place, answer in zip(places, answers, strict=True):
            request = requests[place]
            if isinstance(answer, Failed):
                self._fail(request, answer.reason)
                continue
            found[place] = answer
            if not request.args[1].get("do_sample", False):
                self.cache_hook.add_partial("generate_until", request.args, answer)
        return found

    def _prompt(self, context: str, given: Mapping[str, Any]) -> Prompt:
        settings = normalize_gen_kwargs(dict(given), self.max_gen_toks)
        unknown = settings.keys() - _SETTINGS.keys() - _READ
        if unknown:
            raise ConfigError(f"the generation setting {min(unknown)!r} does not exist here.")
        num_new = settings["max_gen_toks"]
        if not 1 <= num_new < self.max_length:
            raise ConfigError(
                f"max_gen_toks = {num_new} must be 1 to {self.max_length - 1}: the model reads "
                f"{self.max_length} tokens, and one is for the prompt."
            )
        values = {ours: settings[name] for name, ours in _SETTINGS.items() if name in settings}
        if not settings.get("do_sample"):
            values["temperature"] = 0.0
        sampling = Sampling(**values, max_new_tokens=num_new).resolved(
            {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
        )
        until = settings.get("until") or []
        stop = (until,) if isinstance(until, str) else tuple(until)
        stop = (*stop, self.tokenizer.decode([self.eot_token_id]))
        ids = self.tok_encode(context)[-(self.max_length - num_new) :]
        if not ids:
            raise ConfigError("the prompt is empty; it must have at least one token.")
        return Prompt(ids, sampling, stop)

    def _fail(self, request: Instance, reason: str) -> None:
        self.failed.setdefault((request.task_name, request.doc_id), reason)


@contextlib.contextmanager
def _bar(name: str, total: int | None, is_off: bool) -> Iterator[Callable[[int], None]]:
    """lm-eval's progress bar; yields what counts a request as done."""
    with tqdm(total=total, desc=f"Running {name} requests", disable=is_off) as bar:
        yield lambda place: bar.update()


# -- tasks --------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Settings:
    """How tasks are run.

    num_fewshot: examples before each question, None takes the task's; limit: documents of each
    task, the first ones, None takes all; is_chat: prompts are written with the chat template.
    """

    num_fewshot: int | None = None
    limit: int | None = None
    is_chat: bool = False


_AS_THE_TASKS = Settings()


class Tasks:
    """The tasks that there are: those of lm-eval, and the .yaml of a folder of the user.  It takes
    seconds to find them.

    problems: a line about each file of the user that is not YAML; its tasks are left out.
    """

    def __init__(self, include: str | None = None):
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        self._manager = TaskManager(include_path=include)
        self.problems = _unreadable(include) if include else []

    def expand(self, name: str, others: Iterable[str] = ()) -> list[str]:
        """The tasks that a name or a pattern stands for, or the path of a .yaml.

        others: names that are tasks too, for the nearest one.

        Raises:
          ConfigError: there is none, naming the nearest, or the file cannot be read.
        """
        known = self._manager.all_tasks
        if name in known:
            return [name]
        if name.endswith((".yaml", ".yml")):
            name = user_path(name, "--tasks", LocalPath)
            fault = _fault_of_yaml(Path(name))
            if fault is not None:
                raise ConfigError(fault)
            return [name]
        found = fnmatch.filter(known, name) if any(c in name for c in "*?[") else []
        if not found:
            raise ConfigError(unknown(name, [*others, *known]))
        return found

    def run(
        self, name: str, model: HarnessModel, settings: Settings = _AS_THE_TASKS
    ) -> dict[str, Any]:
        """Metrics of a task or group: scores[task][metric], samples[task], and failed, lines about
        the documents that have no score.

        Raises:
          ConfigError: the task cannot be loaded, or lm-eval ends with an error.
        """
        failed: list[str] = []
        try:
            loaded = self._manager.load([name])
            samples = {}
            for task_name, task in loaded["tasks"].items():
                samples[task_name] = _good(task_name, task, settings.limit, failed)
                _guard(task_name, task, samples[task_name], model, failed)
                if settings.num_fewshot is not None:
                    task.set_config(key="num_fewshot", value=settings.num_fewshot)
                elif task.get_config("num_fewshot") is None:
                    task.set_config(key="num_fewshot", value=0)
                task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
            # The seeds of lm-eval's own command.
            random.seed(DEFAULT_RANDOM_SEED)
            np.random.seed(DEFAULT_OTHER_SEED)
            found = evaluator.evaluate(
                model,
                loaded,
                samples=samples,
                log_samples=False,
                apply_chat_template=settings.is_chat,
                fewshot_as_multiturn=settings.is_chat,
            )
        except Exception as e:  # a task is a program of somebody else, and fails like one
            raise ConfigError(f"{name}: {_one_line(e)}") from e
        return {
            "scores": {
                task: {
                    metric: value
                    for metric, value in metrics.items()
                    if isinstance(value, int | float) and "," in metric
                }
                for task, metrics in found["results"].items()
            },
            "samples": {task: len(places) for task, places in samples.items()},
            "failed": failed,
        }


def unknown(name: str, known: Iterable[str]) -> str:
    """A line about a task that there is not, with the nearest one."""
    nearest = difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)
    return f"task {name!r} does not exist. Did you mean {nearest[0]}?"


def _good(task_name: str, task: Task, limit: int | None, failed: list[str]) -> list[int]:
    """Numbers of the documents that can be written as questions."""
    good = []
    docs = task.eval_docs
    for place in range(min(limit or len(docs), len(docs))):
        try:
            doc = docs[place]
            task.doc_to_text(doc)
            task.doc_to_target(doc)
            if task.OUTPUT_TYPE == "multiple_choice":
                task.doc_to_choice(doc)
        except Exception as e:  # a template of somebody else
            failed.append(f"{task_name}, document {place}: {_one_line(e)}")
        else:
            good.append(place)
    if not good:
        raise ValueError(failed[-1] if failed else "it has no documents")
    return good


def _guard(
    task_name: str, task: Task, places: Sequence[int], model: HarnessModel, failed: list[str]
) -> None:
    """Makes a document without an answer, or whose metric fails, one that is not counted.

    places: number of each document that is asked.
    """
    process: Callable = task.process_results

    def guarded(doc: Any, results: Sequence[Any]) -> Mapping[str, Any]:
        place = next(i.doc_id for i in task.instances if i.doc == doc)
        try:
            if (task_name, place) in model.failed:
                raise ValueError(model.failed[task_name, place])
            return process(doc, results)
        except Exception as e:  # a metric of somebody else
            failed.append(f"{task_name}, document {places[place]}: {_one_line(e)}")
            return {}

    task.process_results = guarded


def _unreadable(folder: str) -> list[str]:
    files = sorted(path for path in Path(folder).rglob("*.y*ml") if path.is_file())
    return [fault for fault in map(_fault_of_yaml, files) if fault is not None]


def _fault_of_yaml(path: Path) -> str | None:
    """Why a file is not YAML, or None."""
    try:
        yaml.compose(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
        return f"{path} cannot be read as YAML: {_one_line(e)}"
    return None


def _one_line(error: Exception) -> str:
    words = " ".join(str(error).split()) or type(error).__name__
    return words if len(words) <= 300 else f"{words[:297]}..."
