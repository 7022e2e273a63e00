"""The command `eval`."""

import contextlib
import difflib
import functools
import importlib.util
import itertools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hunyuan_jax import flags
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.files import LocalPath
from hunyuan_jax.infer.command import MODEL, load_lm_within

RULER, NEEDLE, MULTI_NEEDLE, PERPLEXITY = "ruler", "needle", "multi_needle", "perplexity"


@flags.command(
    *MODEL,
    flags.Option(
        "tasks",
        str,
        "Comma-separated: ruler, ruler/TASK, needle, multi_needle, perplexity, and tasks of "
        "lm-eval by name, pattern or path of a .yaml.",
        is_required=True,
    ),
    flags.Option(
        "lengths", str, "Tokens of the context, for ruler and needles.", "1024,2048,4096"
    ),
    flags.Option("depths", str, "Depths of a needle in percent.", "0,25,50,75,100"),
    flags.Option("samples", int, "Samples of each length, or length and depth.", 10, minimum=1),
    flags.Option(
        "haystack", LocalPath, "Text file of haystacks.", default_meaning="made-up sentences"
    ),
    flags.Option("text", LocalPath, "File or folder of texts, for perplexity."),
    flags.Option(
        "limit", int, "Documents of each lm-eval task.", default_meaning="all", minimum=1
    ),
    flags.Option(
        "num_fewshot",
        int,
        "Examples before a question of lm-eval.",
        default_meaning="the task's",
        minimum=0,
    ),
    flags.Option("include", LocalPath, "Folder with lm-eval tasks of your own, as .yaml."),
    flags.Option("chat", bool, "Asks by the model's chat template.", False),
    flags.Option("add_bos", bool, "Prompts begin with the tokenizer's bos.", False),
    flags.Option("max_context", int, "Tokens that the model reads at most.",
                 default_meaning="the model's positions", minimum=2),
    flags.Option("seed", int, "Random seed of the samples.", 0),
    flags.Option("output", LocalPath, "Folder for evaluation.json, which `report` draws."),
    flags.JSON,
)  # fmt: skip
def evaluate(values) -> int:
    """Evaluates a model: RULER, needles in a haystack, perplexity, and tasks of lm-eval.

    What cannot be scored is named in one line; the rest is scored, and the exit status is 2.
    """
    problems = _Problems()
    names, tasks = _expanded(values, problems)
    lengths = _numbers("lengths", values.lengths, 1, 2**31)
    depths = _numbers("depths", values.depths, 0, 100)
    if not names:
        raise ConfigError(f"no task of --tasks={values.tasks} can be run; see above.")
    texts, haystack = _texts(values, names), _haystack(values.haystack)
    if values.output is not None:
        Path(values.output).mkdir(parents=True, exist_ok=True)
    lm = _loaded(values)
    max_length = values.max_context or lm.model.config.max_position
    lengths = _fitting(lengths, max_length, problems, names)
    runner = _Runner(values, lm, lengths, depths, texts, haystack, tasks)
    results: dict[str, Any] = {}
    for name in names:
        start = time.perf_counter()
        try:
            result = runner.run(name)
        except ConfigError as e:
            problems.add(str(e))
            continue
        result["seconds"] = round(time.perf_counter() - start, 2)
        results[name] = result
        for line in result["failed"]:
            print(f"not scored: {line}", file=sys.stderr, flush=True)
        if not values.json:
            from hunyuan_jax.evals import tables

            print(tables.table(name, result), flush=True)
    whole = {"checkpoint": values.checkpoint, "tasks": results, "problems": problems.lines}
    if values.output is not None:
        path = Path(values.output) / "evaluation.json"
        path.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
        print(f"wrote {path}", file=sys.stderr)
    if values.json:
        print(json.dumps(whole))
    return 2 if problems.lines else 0


class _Problems:
    """Lines about what is left out, shown as they come."""

    def __init__(self):
        self.lines: list[str] = []

    def add(self, line: str) -> None:
        self.lines.append(line)
        print(f"error: {line}", file=sys.stderr, flush=True)


class _Runner:
    """Runs one task after the other with a loaded model."""

    def __init__(self, values, lm, lengths, depths, texts, haystack, tasks):
        self._values, self._lm = values, lm
        self._lengths, self._depths = lengths, depths
        self._texts, self._haystack = texts, haystack
        self._tasks = tasks

    @functools.cached_property
    def _answers(self) -> Any:
        from hunyuan_jax.evals import answers

        return answers.Answers(self._lm, answers.long_limits(self._values.max_context))

    def run(self, name: str) -> dict[str, Any]:
        """The result of a task: figures, and `failed`.

        Raises:
          ConfigError: it cannot be run.
        """
        from hunyuan_jax.evals import long_context, perplexity, ruler

        values, lengths, depths = self._values, self._lengths, self._depths
        if name == PERPLEXITY:
            with _progress("texts", len(self._texts)) as on_done:
                return perplexity.measure(self._answers, self._texts, on_done=on_done)
        kind, _, of_kind = name.partition("/")
        if kind == RULER:
            tasks = [of_kind] if of_kind else list(ruler.TASKS)
            num = len(tasks) * len(lengths) * values.samples
            with _progress(name, num) as on_done:
                return long_context.run_ruler(self._run(on_done), tasks, lengths)
        if kind in (NEEDLE, MULTI_NEEDLE):
            needles = long_context.NEEDLE if kind == NEEDLE else long_context.MULTI_NEEDLE
            with _progress(name, len(lengths) * len(depths) * values.samples) as on_done:
                return long_context.run_needles(self._run(on_done), needles, lengths, depths)
        return self._tasks.run(name, self._harness_model, self._harness_settings)

    def _run(self, on_done: Callable[[int], None]) -> Any:
        from hunyuan_jax.evals import long_context

        values = self._values
        return long_context.Run(
            self._answers,
            values.samples,
            is_chat=values.chat,
            add_bos=values.add_bos,
            text=self._haystack,
            seed=values.seed,
            on_done=on_done,
        )

    @functools.cached_property
    def _harness_model(self) -> Any:
        from hunyuan_jax.evals import answers, harness

        limits = answers.short_limits(self._lm, self._values.max_context)
        return harness.HarnessModel(
            answers=answers.Answers(self._lm, limits), add_bos=self._values.add_bos
        )

    @property
    def _harness_settings(self) -> Any:
        from hunyuan_jax.evals import harness

        values = self._values
        return harness.Settings(values.num_fewshot, values.limit, values.chat)


def _expanded(values, problems: _Problems) -> tuple[list[str], Any]:
    """The tasks to run, and those of lm-eval (`harness.Tasks`) if --tasks names one that is not
    ours and lm-eval is installed; the model is not needed to know them.
    """
    from hunyuan_jax.evals import ruler

    own = [RULER, *(f"{RULER}/{task}" for task in ruler.TASKS), NEEDLE, MULTI_NEEDLE, PERPLEXITY]
    asked = [name.strip() for name in values.tasks.split(",") if name.strip()]
    others = [name for name in asked if name not in own]
    tasks = None
    if others and importlib.util.find_spec("lm_eval") is not None:
        from hunyuan_jax.evals import harness

        tasks = harness.Tasks(values.include)
        for line in tasks.problems:
            problems.add(line)
    found = []
    for name in asked:
        if name in own:
            found.append(name)
            continue
        try:
            found += _others(name, own, tasks)
        except ConfigError as e:
            problems.add(str(e))
    return list(dict.fromkeys(found)), tasks


def _others(name: str, own: list[str], tasks: Any) -> list[str]:
    """Tasks of lm-eval; `tasks` is None where it is not installed."""
    if tasks is not None:
        return tasks.expand(name, own)
    nearest = difflib.get_close_matches(name, own, n=1)
    hint = f"Did you mean {nearest[0]}? " if nearest else ""
    raise ConfigError(
        f"task {name!r} does not exist here. {hint}Tasks of lm-eval need it: "
        "pip install -e '.[eval]'."
    )


def _numbers(name: str, text: str, least: int, most: int) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    wrong = next((p for p in parts if not p.isdecimal() or not least <= int(p) <= most), None)
    if wrong is not None:
        raise ConfigError(
            f"--{name}={text}: {wrong!r} must be a whole number of {least} to {most}; separate "
            "them by commas."
        )
    return sorted({int(part) for part in parts})


def _fitting(
    lengths: list[int], max_length: int, problems: _Problems, names: list[str]
) -> list[int]:
    """The lengths that the model can read; lm-eval and perplexity have none."""
    if not any(name.split("/")[0] in (RULER, NEEDLE, MULTI_NEEDLE) for name in names):
        return lengths
    for length in lengths:
        if length > max_length:
            problems.add(
                f"--lengths: {length} is more than the {max_length} tokens that the model reads; "
                "it is left out."
            )
    fitting = [length for length in lengths if length <= max_length]
    if not fitting:
        raise ConfigError(f"no length is left; use at most {max_length}.")
    return fitting


def _texts(values, names: list[str]) -> list[str]:
    """The documents of --text."""
    if PERPLEXITY not in names:
        return []
    if values.text is None:
        raise ConfigError("--text is missing; perplexity needs a file or folder of texts.")
    from hunyuan_jax.data import source

    texts = []
    for span in source.find_files(values.text, "--text"):
        for document in source.read(span, "text"):
            if isinstance(document, source.Bad):
                print(f"not scored: {document.where}: {document.reason}", file=sys.stderr)
            else:
                texts.append("".join(document.parts))
    if not any(texts):
        raise ConfigError(f"--text={values.text} holds no text.")
    return texts


def _haystack(path: str | None) -> list[str]:
    """The sentences of --haystack."""
    if path is None:
        return []
    from hunyuan_jax.evals import words

    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"--haystack={path} cannot be read: {e}.") from e
    if not text.strip():
        raise ConfigError(f"--haystack={path} is empty.")
    return words.split_sentences(text)


def _loaded(values) -> Any:
    """The model of --checkpoint."""
    lm = load_lm_within(values)
    if values.chat and lm.tokenizer.chat_template is None:
        lm.chat_ids([{"role": "user", "content": "?"}])  # raises where no chat can be written
    return lm


@contextlib.contextmanager
def _progress(label: str, total: int):
    """Counts what is done, on standard error."""
    from hunyuan_jax.progress import ProgressBar

    done = itertools.count(1)
    with ProgressBar(label, total) as bar:
        yield lambda *_: bar.update(next(done), "")
