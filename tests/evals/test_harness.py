"""lm-eval's tasks on our engine.  They need lm-eval; the comparison needs torch and transformers
too.
"""

import json
import math
import shutil

import pytest

from support import paths

pytest.importorskip("lm_eval")

from lm_eval import evaluator
from lm_eval.api.instance import Instance
from lm_eval.models.utils import handle_stop_sequences, postprocess_generated_text
from lm_eval.tasks import TaskManager

from hunyuan_jax.errors import ConfigError
from hunyuan_jax.evals import harness
from hunyuan_jax.evals.answers import Answers
from hunyuan_jax.infer import text
from hunyuan_jax.infer.request import Limits
from hunyuan_jax.tokenizer import load_tokenizer

# lm-eval and what it brings warn of many things of their own.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]
FOLDER = paths.GOLDEN / "hf" / "dense_bias_untied"  # reads 64 tokens
QUESTIONS = [
    {"question": "The quick", "choices": [" brown", " fox", " the"], "answer": 0},
    {"question": "a b c", "choices": [" d", " e f g"], "answer": 1},
    {"question": "1 2 3 " * 30, "choices": [" 4", " one", " 5 6"], "answer": 2},
    {"question": "Ends in blanks  ", "choices": ["x", " y", "z z"], "answer": 0},
    {"question": "", "choices": ["Begins", "<|startoftext|>here", "z"], "answer": 0},
]
CHOOSE = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}",
    "target_delimiter": "",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}
TASKS = {
    "choose": CHOOSE,
    "letters": {
        **CHOOSE,
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_choice": ["A", "B", "C"],
        "num_fewshot": 1,
        "fewshot_config": {"sampler": "first_n"},
        "fewshot_split": "test",
    },
    "roll": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}} and {{choices[0]}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "write": {
        "output_type": "generate_until",
        "doc_to_text": "Go on: {{question}}",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {
            "until": ["\n\n", "e"],
            "max_gen_toks": 12,
            "repetition_penalty": 1.0,
        },
        "metric_list": [{"metric": "exact_match"}],
    },
    "bad_doc": {
        **CHOOSE,
        "doc_to_text": "{{question}}{% if answer == 1 %}{{ 1 / 0 }}{% endif %}",
    },
    "bad_choice": {**CHOOSE, "doc_to_choice": "{{choices[:2] + ['' if answer == 2 else 'w']}}"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tasks as .yaml with their data."""
    root = tmp_path_factory.mktemp("tasks")
    data = root / "data.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    for name, task in TASKS.items():
        common = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test",
        }
        (root / f"{name}.yaml").write_text(json.dumps(common | task))  # JSON is YAML
    (root / "broken.yaml").write_text("task: [x\n  y: {")
    return root


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("hf")))
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The folder, ended by its tokenizer's eos only.  The random one names the id of "#" besides,
    which transformers leaves in a text as it is no special token.
    """
    path = tmp_path_factory.mktemp("model") / "checkpoint"
    shutil.copytree(FOLDER, path)
    settings = json.loads((path / "generation_config.json").read_text())
    settings["eos_token_id"] = load_tokenizer(str(path)).eos_id
    (path / "generation_config.json").write_text(json.dumps(settings))
    return str(path)


@pytest.fixture(scope="module")
def model(checkpoint):
    limits = Limits(max_rows=2, page_size=8, chunk_size=16)
    return harness.HarnessModel(answers=Answers(text.load(checkpoint), limits))


@pytest.fixture(scope="module")
def tasks(folder):
    return harness.Tasks(str(folder))


def evaluate(model, folder, names, **options):
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    return evaluator.simple_evaluate(
        model, tasks=names, task_manager=manager, bootstrap_iters=0, **options
    )


@pytest.mark.parametrize("is_chat", [False, True])
def test_scores_are_those_of_the_adapter_of_lm_eval(checkpoint, model, folder, is_chat):
    pytest.importorskip("torch")
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    theirs = huggingface.HFLM(checkpoint, device="cpu", dtype="float32", batch_size=2)
    assert (theirs.max_length, theirs.eot_token_id) == (model.max_length, model.eot_token_id)
    assert theirs.prefix_token_id == model.prefix_token_id
    names = ["choose", "letters", "roll", "write"]
    expected, found = (
        evaluate(one, folder, names, apply_chat_template=is_chat) for one in (theirs, model)
    )
    for name in names:
        for metric, value in expected["results"][name].items():
            if isinstance(value, int | float):
                assert found["results"][name][metric] == pytest.approx(value, rel=1e-5), metric
        pairs = zip(expected["samples"][name], found["samples"][name], strict=True)
        for one, other in pairs:
            assert one["arguments"] == other["arguments"]
            for (theirs_,), (ours,) in zip(one["resps"], other["resps"], strict=True):
                if name == "write":
                    assert ours == theirs_
                    continue
                if name != "roll":
                    (theirs_, was_greedy), (ours, is_greedy) = theirs_, ours
                    assert is_greedy == was_greedy
                # They add up in float32, whose step at 1824 nats is 1.2e-4.
                assert ours == pytest.approx(theirs_, abs=1e-4, rel=2e-7)


def requests(kind, *arguments):
    return [Instance(kind, {}, args, i, ("t", i, 1)) for i, args in enumerate(arguments)]


def test_answers_are_handed_to_the_cache(model):
    kept = {}

    class Hook:
        def add_partial(self, kind, key, answer):
            kept[kind, key[0]] = answer

    before, model.cache_hook = model.cache_hook, Hook()
    try:
        (score,) = model.loglikelihood(requests("loglikelihood", ("a b", " c")), True)
        (total,) = model.loglikelihood_rolling(requests("loglikelihood_rolling", ("a b",)), True)
        drawn = {"max_gen_toks": 2, "do_sample": True, "temperature": 1.0}
        written, _ = model.generate_until(
            requests("generate_until", ("a", {"max_gen_toks": 2}), ("b", drawn)), True
        )
    finally:
        model.cache_hook = before
    assert kept == {
        ("loglikelihood", "a b"): score,
        ("loglikelihood_rolling", "a b"): total,
        ("generate_until", "a"): written,
    }


def test_a_text_has_one_bos(model):
    bos, name = model.tokenizer.bos_id, "<|startoftext|>"
    with_bos = harness.HarnessModel(answers=model._answers, add_bos=True)
    assert model.tok_encode("a")[:1] != [bos]
    assert model.tok_encode("a", add_special_tokens=True)[0] == bos
    assert with_bos.tok_encode("a") == with_bos.tok_encode(f"{name}a")
    assert with_bos.tok_encode("a", add_special_tokens=False)[:1] != [bos]
    chat = with_bos.apply_chat_template([{"role": "user", "content": "Hi"}])
    assert with_bos.tok_encode(chat).count(bos) == 1


def test_a_chat_that_goes_on_with_an_answer_ends_in_it(model):
    history = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "So:"}]
    assert model.apply_chat_template(history, add_generation_prompt=False).endswith("So:")
    assert model.chat_template(True) == model.tokenizer.chat_template
    assert model.chat_template(False) is None


def test_stop_strings_are_not_part_of_a_text(model):
    eos = model.tokenizer.decode([model.eot_token_id])
    (whole,) = model.generate_until(
        requests("generate_until", ("a b c", {"max_gen_toks": 20})), True
    )
    stop = whole[len(whole) // 2 :][:1]
    given = {"max_gen_toks": 20, "until": stop}
    (cut,) = model.generate_until(requests("generate_until", ("a b c", given)), True)
    stops = handle_stop_sequences(stop, eos)
    assert cut == postprocess_generated_text(whole, stops, None)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"max_gen_toks": 64}, "max_gen_toks = 64 must be 1 to 63"),
        ({"temperatur": 1.0}, "'temperatur' does not exist"),
        ({"max_gen_toks": 2, "do_sample": True, "temperature": -1.0}, "temperature = -1.0"),
    ],
)
def test_a_request_that_cannot_be_served_fails_alone(model, settings, expected):
    model.failed.clear()
    good = ("a", {"max_gen_toks": 2})
    found = model.generate_until(requests("generate_until", ("a", settings), good), True)
    assert found[0] == "" and len(found) == 2
    assert list(model.failed) == [("t", 0)] and expected in model.failed["t", 0]
    model.failed.clear()
    scores = model.loglikelihood(requests("loglikelihood", ("a", ""), ("a", " b")), True)
    assert math.isnan(scores[0][0]) and scores[1][0] < 0
    assert model.failed == {("t", 0): "the continuation is empty"}
    model.failed.clear()


def test_a_document_that_raises_is_named_and_the_others_are_scored(model, tasks):
    found = tasks.run("bad_doc", model)
    assert found["failed"] == ["bad_doc, document 1: division by zero"]
    assert found["samples"] == {"bad_doc": 4} and "acc,none" in found["scores"]["bad_doc"]
    found = tasks.run("bad_choice", model)
    assert found["failed"] == ["bad_choice, document 2: the continuation is empty"]
    assert "acc,none" in found["scores"]["bad_choice"]


def test_limit_and_examples_are_those_of_the_settings(model, folder, tasks):
    settings = harness.Settings(limit=2, num_fewshot=0)
    assert tasks.run("letters", model, settings)["samples"] == {"letters": 2}
    whole = tasks.run("roll", model, harness.Settings(limit=2))
    expected = evaluate(model, folder, ["roll"], limit=2)["results"]["roll"]
    assert whole["scores"]["roll"]["bits_per_byte,none"] == expected["bits_per_byte,none"]


def test_bad_tasks_are_told_in_one_line(folder, tasks):
    (line,) = tasks.problems
    assert "broken.yaml cannot be read as YAML" in line and "\n" not in line
    with pytest.raises(ConfigError, match="task 'chose' does not exist. Did you mean choose"):
        tasks.expand("chose")
    with pytest.raises(ConfigError, match="Did you mean needle"):
        tasks.expand("needel", ["needle"])
    with pytest.raises(ConfigError, match="cannot be read as YAML"):
        tasks.expand(str(folder / "broken.yaml"))
    assert tasks.expand("bad_*") == ["bad_choice", "bad_doc"]
    assert tasks.expand("choose") == ["choose"]


def test_arguments_of_lm_evals_command_line():
    with pytest.raises(ConfigError, match="checkpoint is missing"):
        harness.HarnessModel.create_from_arg_string("")
    with pytest.raises(ConfigError, match="dtpye is not an argument"):
        harness.HarnessModel.create_from_arg_string(f"checkpoint={FOLDER},dtpye=float32")
    model = harness.HarnessModel.create_from_arg_string(f"checkpoint={FOLDER},max_length=32")
    assert model.max_length == 32
