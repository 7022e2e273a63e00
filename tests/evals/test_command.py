"""The command `eval` as a user types it: results, and one line for each thing that is wrong."""

import json

import pytest

from hunyuan_jax import cli
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.evals.command import evaluate
from support import paths

FOLDER = paths.GOLDEN / "hf" / "moe_top1"  # reads 64 tokens


def run(*arguments):
    return cli.run(["eval", f"--checkpoint={FOLDER}", *arguments])


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 4)
    return path


@pytest.mark.heavy
def test_perplexity_is_written_and_printed(text, tmp_path, capsys):
    out = tmp_path / "out"
    assert run("--tasks=perplexity", f"--text={text}", f"--output={out}", "--json") == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed == json.loads((out / "evaluation.json").read_text())
    figures = printed["tasks"]["perplexity"]
    assert figures["bytes"] == 180 and 0 < figures["bits_per_byte"] < 50
    assert figures["by_position"][-1][:2] == [64, 64] and printed["problems"] == []


@pytest.mark.heavy
def test_the_rest_is_scored_where_something_is_wrong(text, capsys):
    status = run("--tasks=perplexity,ruler/vtt,ruler/vt", f"--text={text}", "--lengths=64,128",
                 "--samples=1")  # fmt: skip
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert status == 2 and len(errors) == 2
    assert "task 'ruler/vtt' does not exist" in errors[0] and "ruler/vt?" in errors[0]
    assert errors[1] == (
        "error: --lengths: 128 is more than the 64 tokens that the model reads; it is left out."
    )
    assert "not scored: vt needs at least" in captured.err
    assert "bits_per_byte" in captured.out and "ruler/vt" in captured.out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--tasks=perplexity"], "--text is missing; perplexity needs"),
        (["--tasks=needle", "--lengths=1k"], "--lengths=1k: '1k' must be a whole number"),
        (
            ["--tasks=needle", "--depths=0,101"],
            "--depths=0,101: '101' must be a whole",
        ),
        (["--tasks=needle", "--lengths=65"], "no length is left; use at most 64"),
        (["--tasks=needle", "--haystack=/no/such"], "--haystack=/no/such cannot be read"),
        (["--tasks=perplexity", "--text=/no/such"], "/no/such"),
        (["--tasks=needel"], "no task of --tasks=needel can be run"),
        (["--tasks=needle", "--max_context=65"], "--max_context=65 is more than the 64 positions"),
        (["--tasks=needle", "--samples=0"], "samples"),
    ],
)
def test_what_is_refused(arguments, expected):
    with pytest.raises(ConfigError, match=".") as caught:
        run(*arguments)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_an_unknown_task_names_the_nearest(capsys):
    with pytest.raises(ConfigError):
        run("--tasks=needel")
    assert "needle" in capsys.readouterr().err


def test_help_names_the_tasks_of_our_own():
    assert "RULER" in evaluate.about
    (tasks,) = (option for option in evaluate.options if option.name == "tasks")
    assert all(name in tasks.meaning for name in ("ruler", "multi_needle", "perplexity"))


@pytest.mark.slow
def test_a_model_over_several_devices_gives_the_same_figures(text, capsys):
    def bits(*mesh):
        assert run("--tasks=perplexity", f"--text={text}", "--json", *mesh) == 0
        printed = json.loads(capsys.readouterr().out.splitlines()[-1])
        return printed["tasks"]["perplexity"]["bits_per_byte"]

    assert bits("--mesh=data:8") == pytest.approx(bits(), rel=1e-5)
